"""Decoding with a KV-cache. Torch and safetensors only."""
