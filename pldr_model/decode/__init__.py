"""Cached decoding: prepared weights, KV cache, one token per row and step."""
