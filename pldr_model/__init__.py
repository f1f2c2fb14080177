"""PLDR-LLM, the mathematics: configuration, model, loss, caches, generation, reference checkpoints, parity, a benchmark.

In: a `ModelConfig` and token ids; imports torch and safetensors only.
Out: `PLDRModel` (model.py), its losses (loss.py) and generated tokens (generation.py), each imported from its own module.
"""
