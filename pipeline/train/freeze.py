"""`train.freeze_g`: once G_LM has stopped depending on the input, its mean takes its place and the metric learner goes.

When the order parameter of G stayed under a threshold for some evaluations (or at a step), the run

1. commits a checkpoint of the whole model,
2. takes the mean of G_LM over the training sequences that come next (they are trained on afterwards all the same),
3. makes a new engine of the same model with that G as a constant (v510G) or as a parameter that trains on: the metric
   learner, W, b, P, a and b_a are neither in the graph nor in the optimizer; the other weights and Adam's moments are read from
   that checkpoint (reshard.py),
4. goes on, and commits a checkpoint of the frozen model after the next step.

What was decided is in state.json: `calm_evaluations` before, `frozen` after. A run that is killed in between freezes again,
to the same G; a resumed frozen run builds the frozen model at once. A rollback behind the freeze thaws.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.checkpoint import load
from pipeline.checkpoint.deepspeed_files import ZeroState
from pipeline.checkpoint.reshard import carry_over
from pipeline.config.run import RunConfig
from pipeline.config.train import TrainConfig
from pipeline.train.engine import build_engine, device_of_rank, set_recipe
from pldr_model.config import ModelConfig
from pldr_model.model import PLDRModel, g_shape

PARAMETER = ".attention.plga.G_LM"


def calm(settings: TrainConfig, evaluations: int, order_parameter: float | None) -> int:
    """How many evaluations in a row the order parameter of G is under the threshold, after one more."""
    rule = settings.freeze_g
    if rule is None or rule.below is None or order_parameter is None:
        return evaluations
    return evaluations + 1 if order_parameter < rule.below else 0


def is_due(settings: TrainConfig, step: int, calm_evaluations: int) -> bool:
    """Whether G is to be frozen now, before the step after `step`."""
    rule = settings.freeze_g
    if rule is None:
        return False
    reached = rule.at_step is not None and step >= rule.at_step
    return reached or (rule.below is not None and calm_evaluations >= rule.evaluations)


def num_batches(settings: TrainConfig) -> int:
    """Global batches that the mean is over."""
    assert settings.freeze_g is not None
    return -(-settings.freeze_g.sequences // settings.global_batch)


def engine_of(config: RunConfig, g_lm_LHKK: Tensor | None) -> Any:
    """A DeepSpeed engine with its safe checkpoints, of the whole model, or of the frozen one with this G."""
    torch.manual_seed(config.seed)  # the same weights on every rank and at every world size
    chosen = config.trained_model(frozen=g_lm_LHKK is not None)
    model = PLDRModel(chosen, g_lm_LHKK=g_lm_LHKK if chosen.g_source == "file" else None)
    engine = build_engine(model, config.train, dist.get_world_size())
    load.make_safe(engine)
    return engine


def frozen_g(source: ZeroState) -> Tensor:
    """The G [L,H,K,K] of a frozen run's checkpoint."""
    if "g_lm" in source.buffers:
        return source.buffers["g_lm"].detach().float()
    return torch.stack([source.tensor(name) for name in source.shapes if name.endswith(PARAMETER)])


def freeze(config: RunConfig, source: ZeroState, g_lm_LHKK: Tensor) -> Any:
    """The engine of the frozen model, with the weights and moments of a checkpoint of the whole one; collective.

    The old engine has been released and dropped: what it held is freed first.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    engine = engine_of(config, g_lm_LHKK)
    new = {f"layers.{layer}{PARAMETER}": g for layer, g in enumerate(g_lm_LHKK)}
    carry_over(engine, source, new=new)
    set_recipe(engine, config.train)
    return engine


@torch.no_grad()
def mean_g(engine: Any, config: ModelConfig, batches: Iterable[Sequence[np.ndarray]]) -> Tensor:
    """Mean G_LM [L,H,K,K] over sequences, summed in fp64; collective. batches: this rank's micro batches [n, S+1] of each
    global batch; every rank has as many."""
    training = engine.training
    engine.eval()
    total = torch.zeros(g_shape(config), dtype=torch.float64, device=device_of_rank())
    count = 0
    for batch in batches:
        for micro in batch:
            ids = torch.from_numpy(micro.astype(np.int64)).to(device_of_rank())
            _, outputs = engine(ids[:, :-1], padded=False, return_outputs=True)
            total += torch.stack([layer.G_LM.double().sum(dim=0) for layer in outputs])
            count += len(micro)
    dist.all_reduce(total)
    engine.train(training)
    return (total / (count * dist.get_world_size())).float().cpu()
