"""Training on a GPU: `python -m pipeline.bench.gpu OUT --what train`.

In: sizes, and configs/pldr-110m.yaml for the recipe; imports `pldr_model`, the trainer, the data stages, the timing in
`pipeline/bench/`. What needs DeepSpeed imports it when its part runs.
Out: results of parts, one by one, and what was wanted beside what was seen (summary.py).
"""
