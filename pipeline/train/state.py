"""What a training run is at: its state, how it begins, goes on from a checkpoint, and goes back to one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist

from pipeline.checkpoint import load
from pipeline.checkpoint.deepspeed_files import ZeroState
from pipeline.checkpoint.format import COMMITTED, checkpoint_name, verify
from pipeline.config.run import RunConfig
from pipeline.config.schedule import invariance_budget
from pipeline.config.train import TrainConfig
from pipeline.train.engine import release, set_recipe
from pipeline.train.freeze import engine_of, frozen_g
from pipeline.train.spikes import Guard


class TrainData(Protocol):
    """What the loop needs of a loader: `limit` global batches from a position of the data order on, each as this rank's
    micro batches [n, S+1], with the position behind it."""

    @property
    def num_sequences(self) -> int:
        """Sequences in an epoch."""
        ...

    def indices(self, position: int) -> np.ndarray:
        """The sequence numbers of the batch that begins at a position."""
        ...

    def micro_batches(self, position: int, *, limit: int) -> Iterator[tuple[Sequence[np.ndarray], int]]: ...


@dataclass
class TrainState:
    """How far the run is; what a checkpoint's state.json says about it.

    sequences_consumed: the position in the data order, sequences that were left out (sequences_left_out) included: as bad,
    or by a rollback.
    val_loss_cached: the newest validation's, at val_step; None before the first one and when it is not finite.
    """

    step: int = 0
    sequences_consumed: int = 0
    tokens_consumed: int = 0
    skipped_steps: int = 0
    sequences_left_out: int = 0
    val_loss_cached: float | None = None
    val_step: int | None = None
    calm_evaluations: int = 0  # in a row, as train.freeze_g counts them
    frozen: int | None = None  # the step after which G was frozen
    budget: float = 0.0  # the invariance budget up to here, without skipped steps
    guard: Guard = field(default_factory=Guard)


@dataclass(frozen=True)
class Lineage:
    """Where the run's inputs come from; kept in every checkpoint and checked before a resume (pretrain.py)."""

    data_fingerprint: str
    tokenizer_sha256: str
    mlflow_run_id: str


def begin(config: RunConfig, start: Path | None) -> tuple[Any, TrainState]:
    """An engine and how far it is: new weights, or those of a checkpoint."""
    if start is None:
        return engine_of(config, None), TrainState()
    saved = verify(start)
    frozen = saved.get("frozen") is not None
    g_lm = frozen_g(ZeroState(start / checkpoint_name(saved["step"]))) if frozen else None
    engine = engine_of(config, g_lm)
    return engine, _load(engine, start, saved, config.train)


def _load(engine: Any, folder: Path, saved: dict[str, Any], settings: TrainConfig) -> TrainState:
    load.load(engine, folder, saved, precision=settings.precision)
    set_recipe(engine, settings)
    # Older checkpoints lack fields that were added since; their defaults are what was true then.
    if _threshold(saved["config"]["train"]) != _threshold(settings.model_dump()):
        saved["calm_evaluations"] = 0  # counted under another one
    saved.setdefault("budget", invariance_budget(settings, saved["step"]) - saved.get("budget_skipped", 0.0))
    known = {key: saved[key] for key in TrainState.__dataclass_fields__ if key in saved}
    return TrainState(**{**known, "guard": Guard(**saved.get("guard", {}))})


def _threshold(train: dict[str, Any]) -> float | None:
    return (train.get("freeze_g") or {}).get("below")


def roll_back(engine: Any, config: RunConfig, target: Path, state: TrainState) -> tuple[Any, TrainState]:
    """A checkpoint of this run, loaded: its engine (another one when G was frozen since) and its state, but behind the batches
    seen until now."""
    saved = verify(target)
    if (saved.get("frozen") is None) == (state.frozen is None):
        earlier = _load(engine, target, saved, config.train)
    else:
        release(engine)
        del engine
        engine, earlier = begin(config, target)
    earlier.guard.roll_back(state.guard, target.name)
    earlier.sequences_left_out += state.sequences_consumed - earlier.sequences_consumed
    earlier.sequences_consumed = state.sequences_consumed
    return engine, earlier


def whole(folder: Path) -> ZeroState | None:
    """The checkpoint in this folder; None when rank 0 sees that it was not saved. Collective."""
    there = [(folder / COMMITTED).is_file()]
    dist.broadcast_object_list(there)
    return ZeroState(folder / folder.name) if there[0] else None


def record(config: RunConfig, state: TrainState, lineage: Lineage, *, freezes: bool) -> dict[str, Any]:
    """What state.json says. freezes: whether G is frozen after this checkpoint, which then stays (retention.py)."""
    world_size = dist.get_world_size()
    return {
        **asdict(state),
        **asdict(lineage),
        "freezes": freezes,
        "config": config.as_dict(),
        "world_size": world_size,
    }
