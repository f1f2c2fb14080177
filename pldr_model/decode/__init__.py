"""Cached decoding: prepared weights, KV cache, products of packed weights, the rows that decode together.

In: a `PLDRModel`, or its packed tensors; token ids. Imports torch and safetensors only.
Out: `Decoder` (decoder.py) and its `KVCache` (cache.py), `Matrix` (linear.py), factors of G_LM for low-rank keys (low_rank.py);
tokens come from `pldr_model.generation`.
"""
