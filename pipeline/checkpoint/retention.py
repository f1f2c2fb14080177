"""Which checkpoints of a run stay: the last k, every n-th step for ever, the best by `val/loss_cached`, and the last
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

PINNED = -math.inf  # stands where a checkpoint's loss does: it stays for ever


@dataclass(frozen=True)
class Policy:
    """last: how many of the newest stay. every: steps that are multiples of it stay for ever. best: so does the best.
    freezes: whether a checkpoint may come to be pinned, for the disk."""

    last: int
    every: int | None = None
    best: bool = False
    freezes: bool = False

    def keep(self, losses: Mapping[int, float | None], now: int) -> set[int]:
        """The steps that stay. `losses`: step -> val/loss_cached at that step, None where it is not known, or PINNED.

        Steps after `now`, the step just saved, are not judged: they belong to a future that the run went back from, and
        will be replaced when it gets there again. Of equally good ones the newest is the best.
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
        """How many checkpoints a run holds at its end that saves every `interval` steps and at the last, for the disk."""
        for_ever = 0 if self.every is None else steps // math.lcm(self.every, interval) + 1
        # Around a freeze two are saved whatever the interval is.
        return min(self.last + self.best + for_ever + self.freezes, steps // interval + 1 + 2 * self.freezes)


def policy_of(train: TrainConfig) -> Policy:
    """The policy that a configuration asks for."""
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
        except UserError:  # damaged: whoever wants to resume from it will say so
            losses[step_of(checkpoint)] = None
    return losses


def retain(folder: Path, policy: Policy, *, now: int | None = None, busy: Collection[str] = ()) -> list[Path]:
    """Remove the committed checkpoints that the policy does not keep, and halves of earlier removals. Returns the removed.

    now: the step just saved (the newest there is). busy: names that somebody is reading; they go the next time. May run beside
    a save. What cannot be removed is told in the log and tried again the next time: that must not end a training.
    """
    removed: list[Path] = []
    try:
        losses = local_losses(folder)
        stay = policy.keep(losses, max(losses, default=0) if now is None else now)
        for checkpoint in committed(folder):
            if step_of(checkpoint) not in losses:  # committed since: not judged, so not removed
                continue
            if step_of(checkpoint) not in stay and checkpoint.name not in busy:
                (checkpoint / COMMITTED).unlink()  # first: a half-removed folder must not look like a checkpoint
                removed.append(checkpoint)
                shutil.rmtree(checkpoint, ignore_errors=True)
        remove_unfinished(folder)
    except OSError as error:
        log.warning("old checkpoints are not all removed: %s", first_line(error))
    return removed
