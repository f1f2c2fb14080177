"""`train.freeze_g`: once G_LM no longer depends on the input, its mean replaces it and the metric learner is removed.

When the order parameter of G stayed below a threshold for some validations in a row (or at a given step), the run

1. commits a checkpoint of the model with its metric learner,
2. takes the mean of G_LM over the next training sequences (they are still trained on),
3. makes a new engine of the same model with that G as a constant (v510G) or as a parameter that is trained further: the
   metric learner, W, b, P, a and b_a are neither in the graph nor in the optimizer; the other weights and Adam's moments
   are read from that checkpoint (pipeline/checkpoint/reshard.py),
4. continues, and commits a checkpoint of the frozen model after the next step.

The decision is in state.json: `evaluations_below` before, `frozen` after. A run that is killed in between freezes again, to
the same G; a resumed frozen run builds the frozen model at once. A rollback to before the freeze undoes it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.checkpoint.deepspeed_files import ZeroState
from pipeline.checkpoint.format import COMMITTED, checkpoint_name
from pipeline.checkpoint.reshard import carry_over
from pipeline.config.batches import stretches
from pipeline.config.run import RunConfig
from pipeline.config.train import TrainConfig
from pipeline.train.engine import device_of_rank, set_recipe
from pipeline.train.state import G_PARAMETER, TrainState, engine_of
from pipeline.train.targets import has_padding, masks, with_documents
from pldr_model.config import ModelConfig
from pldr_model.model import g_shape


class FreezeRule:
    """When a run freezes its G, and which checkpoints it needs for that."""

    def __init__(self, settings: TrainConfig) -> None:
        self._settings = settings
        self._not_before = 0  # a step; later when a save has failed

    def count(self, state: TrainState, order_parameter: float | None) -> None:
        """Count one more validation with this order parameter of G (None: not measured)."""
        rule = self._settings.freeze_g
        if rule is not None and rule.below is not None and order_parameter is not None:
            state.evaluations_below = state.evaluations_below + 1 if order_parameter < rule.below else 0

    def is_due(self, state: TrainState) -> bool:
        """Whether G is to be frozen before the next step."""
        rule = self._settings.freeze_g
        if rule is None or state.frozen is not None or state.step < self._not_before:
            return False
        reached = rule.at_step is not None and state.step >= rule.at_step
        return reached or (rule.below is not None and state.evaluations_below >= rule.evaluations)

    def needs_checkpoint(self, state: TrainState) -> bool:
        """Whether a checkpoint is saved after this step: right before the freeze, and after the first step after it."""
        return self.is_due(state) or state.step - 1 == state.frozen

    def source(self, checkpoints: Path, state: TrainState) -> ZeroState | None:
        """The checkpoint of this step, which the frozen model is made from; None when it was not saved. Collective."""
        folder = checkpoints / checkpoint_name(state.step)
        saved = [(folder / COMMITTED).is_file()]
        dist.broadcast_object_list(saved)  # as rank 0 sees it
        return ZeroState(folder / folder.name) if saved[0] else None

    def postpone(self, state: TrainState) -> None:
        """The checkpoint was not saved: do not freeze before the next one."""
        self._not_before = state.step + self._settings.checkpoint_every


def num_batches(settings: TrainConfig, step: int) -> int:
    """How many global batches from this step on the mean is taken over."""
    assert settings.freeze_g is not None
    left, count = settings.freeze_g.sequences, 0
    for size, steps in (*stretches(settings, step), (settings.global_batch, left)):
        taken = min(-(-left // size), steps)
        left, count = left - taken * size, count + taken
        if left <= 0:
            break
    return count


def freeze(config: RunConfig, source: ZeroState, g_lm_LHKK: Tensor) -> Any:
    """The engine of the frozen model, with the weights and moments of the checkpoint before the freeze; collective.

    The caller has released and dropped the old engine: its memory is freed first.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    engine = engine_of(config, g_lm_LHKK)
    new = {f"layers.{layer}{G_PARAMETER}": g for layer, g in enumerate(g_lm_LHKK)}
    carry_over(engine, source, new=new)
    set_recipe(engine, config.train)
    return engine


@torch.no_grad()
def mean_g(engine: Any, config: ModelConfig, batches: Iterable[Sequence[np.ndarray]]) -> Tensor:
    """Mean G_LM [L,H,K,K] over sequences, summed in fp64; collective. batches: this rank's micro batches [n, S+1] of each
    global batch (or with document masks [2, n, S+1]: G as training has it); every rank has as many."""
    training = engine.training
    engine.eval()
    total = torch.zeros(g_shape(config), dtype=torch.float64, device=device_of_rank())
    count = 0
    for batch in batches:
        for micro, documents in map(with_documents, batch):
            ids = torch.from_numpy(micro.astype(np.int64)).to(device_of_rank())
            padded, apart = has_padding(micro, config.pad_id), masks(documents, device_of_rank())
            _, outputs = engine(ids[:, :-1], padded=padded, return_outputs=True, last_only=True, **apart)
            total += torch.stack([layer.G_LM.double().sum(dim=0) for layer in outputs])
            count += len(micro)
    dist.all_reduce(total)
    engine.train(training)
    return (total / (count * dist.get_world_size())).float().cpu()
