"""A bundle as a directory that stock transformers, and what builds on it (vLLM, lm-eval), loads; and back.

In: an `OpenModel`, or a directory. `configuration_pldr.py` and `modeling_pldr.py` travel with an export and import nothing of
ours; everything else stays here. transformers is an extra (`pldr[hf]`): modules import it when they run.
Out: exports with their self-check, models in memory, and our tensors back, bit for bit.
"""
