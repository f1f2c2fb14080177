"""Benchmark scores: lm-evaluation-harness is the engine, our model its `LM`, with the cached G_LM and live.

In: an opened model (`source`) and documents, as local JSONL files or from the hub. Imports `scoring`, `source`, `tracking`,
`report`, lm-eval; `serve` and `hf` do not import it.
Out: a folder with `results.json`, `evaluation.html` and `answers.jsonl`; metrics in the MLflow run that trained the model.
"""
