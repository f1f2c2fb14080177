"""Measuring a model's invariance: prompts, deductive tensors over them, and what a cached G_LM does to the outputs.

In: a model, a G_LM and held-out sequences. Imports `distributed`, `errors` and `pldr_model`; reads and writes no files.
Out: plain numbers, the `measures` of a certificate; nothing is judged here.
"""
