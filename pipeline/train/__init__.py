"""Pretraining on the ranks of a job: the loop (trainer.py), the DeepSpeed engine, the freeze of G, and what is measured.

Reads a RunConfig, batches of a loader (state.py, TrainData) and a checkpoint to resume from; imports config, checkpoint and
tracking, never another floor. Hands on committed checkpoints, metrics, and a TrainState.
"""
