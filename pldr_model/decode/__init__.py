"""Cached decoding: prepared weights, KV cache, one token per row and step.

In: a `PLDRModel`, or its configuration and weights (also packed ones), and token ids.
Out: `Decoder` (decoder.py) and its `KVCache` (cache.py); factors of G_LM for low-rank keys (low_rank.py).
"""
