"""Decoding or training (training/) on a GPU, in one run of at most eight minutes: `python -m pipeline.bench.gpu OUT`.

In: nothing but sizes, and for one part a folder with the reference implementation's code; imports `pldr_model`, the timing in
`pipeline/bench/`, and for one part the export's code in `pipeline/inference/hf/`.
Out: OUT/result.json, and of each part its results line by line and its log.
"""
