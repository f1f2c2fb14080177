"""`train.batch_warmup`: global batches that grow in the course of training, by more micro batches a step.

The batch of a step is a function of the step (pipeline/config/batches.py), the data order one of the position, so a resumed
run forms the batches of an uninterrupted one. DeepSpeed's engine is made for the last, largest batch: what it does with sums
over micro batches (in which precision, on which device) is decided then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from pipeline.config.batches import batch_at, stretches
from pipeline.config.train import TrainConfig
from pipeline.train.state import Batch, TrainData, TrainState


def of_step(data: TrainData, train: TrainConfig, step: int) -> TrainData:
    """The data in batches of a step's size."""
    return data if train.batch_warmup is None else data.of_batch(batch_at(train, step))


def batches_from(data: TrainData, train: TrainConfig, state: TrainState) -> Iterator[Batch]:
    """The global batches from a state to the last step."""
    if train.batch_warmup is None:
        return data.micro_batches(state.sequences_consumed, limit=train.steps - state.step)
    return _growing(data, train, state.step, state.sequences_consumed)


def _growing(data: TrainData, train: TrainConfig, step: int, position: int) -> Iterator[Batch]:
    for size, steps in stretches(train, step):
        for micro_batches, end in data.of_batch(size).micro_batches(position, limit=steps):
            yield micro_batches, end
            position = end


def accumulate(engine: Any, micro_batches: int) -> None:
    """Make the engine's next steps sum so many micro batches of each rank. Between two steps only."""
    if engine.gradient_accumulation_steps() == micro_batches:
        return
    engine.set_train_batch_size(micro_batches * engine.train_micro_batch_size_per_gpu() * dist.get_world_size())
    engine.micro_steps = 0  # a step ends where this count is a multiple of the number: DeepSpeed leaves it as it was
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = micro_batches  # ZeRO's own copy, read with offload
