"""Pretraining on the ranks of a job: the loop (trainer.py), the DeepSpeed engine, the freeze of G, and what is measured.

In: a `RunConfig`, a loader's batches (state.py, `TrainData`) and a checkpoint to resume from; imports `config`, `checkpoint`
and `tracking`, no other floor.
Out: committed checkpoints, metrics, and a `TrainState`.
"""
