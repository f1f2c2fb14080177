"""PLDR-LLM, the mathematics: configuration, model, loss, caches, generation, conversion of checkpoints, parity and a benchmark.

Imports torch and safetensors, nothing else. Takes a ModelConfig and token ids.
Hands on PLDRModel (model.py), its losses (loss.py) and generated tokens (generation.py) to the pipeline.
"""
