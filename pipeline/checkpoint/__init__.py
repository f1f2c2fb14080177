"""Checkpoints of a training run: their format on disk, saving, loading, conversion (reshard.py), and which are kept.

Reads and writes `checkpoints/step-NNNNNN/` of a run; imports config, distributed, io, the model, torch and DeepSpeed.
Hands on verified checkpoints: to training, the stages, tracking (which publishes them) and consolidation in post.
"""
