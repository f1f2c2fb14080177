"""A training run in MLflow: its record, metrics, published checkpoints, and what waits here while MLflow is unreachable.

In: the configuration, committed checkpoints, metrics and files; imports `checkpoint`, `config` and `io` only.
Out: a `TrackedRun` to the worker, the stages and the command line, and what MLflow knows of runs (query.py).
"""
