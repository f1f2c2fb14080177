"""Benchmarks: lm-evaluation-harness is the engine, our model its `LM`, and every task is scored with the cached G_LM and live.

Read first: `run.py`.
"""
