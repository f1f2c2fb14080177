"""Which checkpoints of a run are kept: the last k, every n-th step for good, the best by `val/loss_cached`, and the last
one before G was frozen, the only one with a metric learner.

The loss of a checkpoint counts only when the validation was at its own step (`val_step` in state.json).
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.format import COMMITTED, STATE, committed, remove_unfinished, step_of
from pipeline.config.train import TrainConfig
from pipeline.errors import UserError, first_line
from pipeline.io import storage

log = logging.getLogger(__name__)

PINNED = -math.inf  # in place of a checkpoint's loss: it is kept for good


@dataclass(frozen=True)
class Policy:
    """last: how many of the newest are kept. every: multiples of this step are kept for good. best: so is the best.
    freezes: whether a checkpoint may be pinned later, for the estimate of disk space."""

    last: int
    every: int | None = None
    best: bool = False
    freezes: bool = False

    def keep(self, losses: Mapping[int, float | None], now: int) -> set[int]:
        """The steps to keep. `losses`: step -> val/loss_cached at that step, None where it is unknown, or PINNED.

        Steps after `now`, the step just saved, are always kept: the run was rolled back from there, and will replace them
        when it gets there again. Among equal losses the newest is the best.
        """
        steps = sorted(step for step in losses if step <= now)
        stay = set(steps[-self.last :]) | {step for step in losses if step > now}
        stay |= {step for step in steps if losses[step] == PINNED}
        if self.every is not None:
            stay |= {step for step in steps if step % self.every == 0}
        if self.best:
            known = [(loss, -step) for step in steps if (loss := losses[step]) is not None and math.isfinite(loss)]
            stay |= {-step for _, step in sorted(known)[:1]}
        return stay

    def at_most(self, steps: int, interval: int) -> int:
        """How many checkpoints a run has at its end when it saves every `interval` steps and at the last."""
        permanent = 0 if self.every is None else steps // math.lcm(self.every, interval) + 1
        # Two are saved around a freeze whatever the interval is.
        return min(self.last + self.best + permanent + self.freezes, steps // interval + 1 + 2 * self.freezes)


def policy_of(train: TrainConfig) -> Policy:
    """The policy of a configuration."""
    return Policy(train.keep_checkpoints, train.keep_every, train.keep_best, train.freeze_g is not None)


def loss_in(state: Any) -> float | None:
    """val/loss_cached at the step of a checkpoint, from its state.json; None when it was not measured there; or PINNED."""
    if not isinstance(state, dict):
        return None
    if state.get("freezes") is True:
        return PINNED
    if state.get("val_step") != state.get("step"):
        return None
    loss = state.get("val_loss_cached")
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None


def local_losses(folder: Path) -> dict[int, float | None]:
    """Step -> loss of the committed checkpoints of a folder."""
    losses: dict[int, float | None] = {}
    for checkpoint in committed(folder):
        try:
            losses[step_of(checkpoint)] = loss_in(storage.read_json(checkpoint / STATE))
        except UserError:  # damaged: a resume from it reports that
            losses[step_of(checkpoint)] = None
    return losses


def retain(folder: Path, policy: Policy, *, now: int | None = None, busy: Collection[str] = ()) -> list[Path]:
    """Remove the committed checkpoints that the policy does not keep, and what earlier removals left. Returns the removed.

    now: the step just saved (None: the newest there is). busy: names that are being read; they are removed the next time. May
    run during a save. What cannot be removed is logged and tried again the next time: it must not end a training run.
    """
    removed: list[Path] = []
    try:
        losses = local_losses(folder)
        stay = policy.keep(losses, max(losses, default=0) if now is None else now)
        for checkpoint in committed(folder):
            if step_of(checkpoint) not in losses:  # committed since
                continue
            if step_of(checkpoint) not in stay and checkpoint.name not in busy:
                (checkpoint / COMMITTED).unlink()  # first: a half-removed folder must not look like a checkpoint
                removed.append(checkpoint)
                shutil.rmtree(checkpoint, ignore_errors=True)
        remove_unfinished(folder)
    except OSError as error:
        log.warning("old checkpoints are not all removed: %s", first_line(error))
    return removed
