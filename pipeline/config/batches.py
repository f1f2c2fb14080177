"""How many sequences each step trains on (`train.global_batch`, `train.batch_warmup`): pure functions of the configuration."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.train import TrainConfig


def batch_at(train: TrainConfig, step: int) -> int:
    """Sequences of the global batch of a step, from 0."""
    return next(size for begin, end, size in _stretches(train) if begin <= step < end)


def batch_sizes(train: TrainConfig) -> list[int]:
    """Every size that a global batch has in the course of the run, in order."""
    return [size for _, _, size in _stretches(train)]


def stretches(train: TrainConfig, step: int) -> Iterator[tuple[int, int]]:
    """(sequences of a global batch, steps that have it), from a step to the last one."""
    for begin, end, size in _stretches(train):
        if end > step:
            yield size, end - max(begin, step)


def planned_sequences(train: TrainConfig, *, from_step: int = 0) -> int:
    """Sequences that the steps from this one to the last train on, when nothing is left out."""
    return sum(size * steps for size, steps in stretches(train, from_step))


def _stretches(train: TrainConfig) -> Iterator[tuple[int, int, int]]:
    """(first step, step after the last, sequences of a global batch)."""
    begin = 0
    for stretch in train.batch_warmup or ():
        yield begin, begin + stretch.steps, stretch.batch
        begin += stretch.steps
    yield begin, train.steps, train.global_batch
