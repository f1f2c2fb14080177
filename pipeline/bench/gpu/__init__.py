"""Decoding on a GPU, in one run of at most eight minutes: `python -m pipeline.bench.gpu OUT`.

Needs torch, and for two of its parts transformers and sentencepiece; no MLflow, no DeepSpeed, no network. Every part is a
process of its own with a limit, so that one that fails or hangs costs the others nothing; what it measured until then stays.
"""
