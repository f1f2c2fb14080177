"""Checkpoints of a training run: their format on disk, saving, loading, conversion (reshard.py), and which are kept.

In: `checkpoints/step-NNNNNN/` of a run, an engine's state; imports `config`, `distributed`, `io`, the model and DeepSpeed.
Out: verified checkpoints for training, the stages, tracking (which publishes them) and consolidation in `post`.
"""
