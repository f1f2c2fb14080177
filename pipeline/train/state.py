"""The state of a training run: how it begins, resumes from a checkpoint, and rolls back to one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.checkpoint import load
from pipeline.checkpoint.deepspeed_files import ZeroState
from pipeline.checkpoint.format import checkpoint_name, verify
from pipeline.config.continued import budget_of
from pipeline.config.run import RunConfig
from pipeline.config.train import TrainConfig
from pipeline.train.engine import build_engine, release, set_recipe
from pipeline.train.initial import initial_weights
from pipeline.train.spikes import Guard
from pldr_model.model import PLDRModel

G_PARAMETER = ".attention.plga.G_LM"  # the end of its name, where G is a parameter of each layer


# A rank's micro batches [n, S+1] of a global batch (with document masks [2, n, S+1]), and the position after it.
Batch = tuple[Sequence[np.ndarray], int]


class TrainData(Protocol):
    """What the trainer needs of a loader."""

    @property
    def num_sequences(self) -> int:
        """Sequences in an epoch."""
        ...

    def indices(self, position: int) -> np.ndarray:
        """The sequence numbers of the batch that begins at a position."""
        ...

    def of_batch(self, global_batch: int) -> TrainData:
        """The same data in global batches of another size."""
        ...

    def micro_batches(self, position: int, *, limit: int) -> Iterator[Batch]:
        """`limit` global batches, from a position of the data order."""
        ...


@dataclass
class TrainState:
    """How far the run is; stored in a checkpoint's state.json under these names.

    sequences_consumed: the position in the data order. It includes sequences_left_out: those that could not be read, and
    those that a rollback skipped.
    tokens_consumed: targets trained on, without padding. Older checkpoints counted padding too; the count continues from there.
    val_loss_cached: of the newest validation, at val_step; None before the first one and when it is not finite.
    """

    step: int = 0
    sequences_consumed: int = 0
    tokens_consumed: int = 0
    skipped_steps: int = 0
    sequences_left_out: int = 0
    val_loss_cached: float | None = None
    val_step: int | None = None
    evaluations_below: int = 0  # validations in a row with the order parameter of G under train.freeze_g.below
    frozen: int | None = None  # the step after which G was frozen
    shared: int | None = None  # the step after which train.share_g_below let micro batches share a G
    budget: float = 0.0  # the invariance budget spent so far, without skipped steps
    guard: Guard = field(default_factory=Guard)

    def padding_share(self, context_length: int) -> float:
        """The share of padding in the targets of all sequences trained on so far."""
        positions = (self.sequences_consumed - self.sequences_left_out) * context_length
        return max(0.0, 1.0 - self.tokens_consumed / positions)


@dataclass(frozen=True)
class Lineage:
    """Where the run's inputs come from; kept in every checkpoint and checked before a resume (pipeline/stages/resume.py)."""

    data_fingerprint: str
    tokenizer_sha256: str
    mlflow_run_id: str


def begin(config: RunConfig, start: Path | None) -> tuple[Any, TrainState]:
    """A new engine and its state: of new weights, or of a checkpoint's."""
    if start is None:
        init_from = config.train.init_from
        return engine_of(config, None, None if init_from is None else initial_weights(init_from)), TrainState()
    saved = verify(start)
    frozen = saved.get("frozen") is not None
    g_lm = frozen_g(ZeroState(start / checkpoint_name(saved["step"]))) if frozen else None
    engine = engine_of(config, g_lm)
    return engine, _load(engine, start, saved, config.train)


def engine_of(config: RunConfig, g_lm_LHKK: Tensor | None, initial: dict[str, Tensor] | None = None) -> Any:
    """A DeepSpeed engine with safe checkpoints: of the model with a learned G, or of the frozen one with this G. initial: its
    weights, where they are not drawn."""
    torch.manual_seed(config.seed)  # the same weights on every rank and at every world size
    chosen = config.trained_model(frozen=g_lm_LHKK is not None)
    model = PLDRModel(chosen, g_lm_LHKK=g_lm_LHKK if chosen.g_source == "file" else None)
    if initial is not None:
        rest = model.load_state_dict(initial, strict=False)
        assert not rest.unexpected_keys and rest.missing_keys in ([], ["g_lm"]), "compared before ranks start"
    engine = build_engine(model, config.train, dist.get_world_size())
    load.make_safe(engine)
    return engine


def frozen_g(source: ZeroState) -> Tensor:
    """The G [L,H,K,K] of a frozen run's checkpoint."""
    if "g_lm" in source.buffers:
        return source.buffers["g_lm"].detach().float()
    return torch.stack([source.tensor(name) for name in source.shapes if name.endswith(G_PARAMETER)])


def _load(engine: Any, folder: Path, saved: dict[str, Any], settings: TrainConfig) -> TrainState:
    load.load(engine, folder, saved, precision=settings.precision, decay_on=settings.metric_decay_on)
    set_recipe(engine, settings)
    # Older checkpoints lack fields that were added since; the defaults are what was true then.
    if _threshold(saved["config"]["train"]) != _threshold(settings.model_dump()):
        saved["evaluations_below"] = 0  # they were below another threshold
    if saved["config"]["train"].get("share_g_below") != settings.share_g_below:
        saved["shared"] = None  # likewise
    saved.setdefault("val_step", saved["step"])  # no validation was left then
    saved["budget"] = budget_of(saved, settings)
    known = {key: saved[key] for key in TrainState.__dataclass_fields__ if key in saved}
    return TrainState(**{**known, "guard": Guard(**saved.get("guard", {}))})


def _threshold(train: dict[str, Any]) -> float | None:
    return (train.get("freeze_g") or {}).get("below")


def roll_back(engine: Any, config: RunConfig, target: Path, state: TrainState) -> tuple[Any, TrainState]:
    """Load a checkpoint of this run. Returns its engine (a new one when G was frozen since) and its state, but with the
    position after the batches seen so far."""
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


def record(config: RunConfig, state: TrainState, lineage: Lineage, *, freezes: bool) -> dict[str, Any]:
    """The content of state.json. freezes: whether G is frozen after this checkpoint, which is then kept
    (pipeline/checkpoint/retention.py)."""
    return {
        **asdict(state),
        **asdict(lineage),
        "freezes": freezes,
        "config": config.as_dict(),
        "world_size": dist.get_world_size(),
    }
