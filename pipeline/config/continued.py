"""The learning rate and the invariance budget of a run that goes on from a checkpoint: what is decided, in words."""

from __future__ import annotations

import math
from typing import Any

from pipeline.config.contraction import expected, verdict
from pipeline.config.schedule import invariance_budget, learning_rate, planned_budget
from pipeline.config.train import TrainConfig

OF_SCHEDULE = ("steps", "max_lr", "warmup_steps", "schedule", "decay_share", "decay_shape", "min_lr_ratio")


def schedule_before(saved: dict[str, Any], now: TrainConfig) -> TrainConfig:
    """The schedule that a checkpoint was trained with. saved: `train` of the configuration in its state.json."""
    defaults = {key: TrainConfig.model_fields[key].default for key in OF_SCHEDULE}  # of a key that did not exist then
    return now.model_copy(update={key: saved.get(key, default) for key, default in defaults.items()})


def stable_until(train: TrainConfig, step: int) -> int | None:
    """The step at which the stable part ends that the rate is in at `step`; None where it is in none."""
    if train.schedule == "cosine" or step < train.warmup_steps:
        return None
    end = train.steps if train.schedule == "constant" else train.decay_begins
    return end if step <= end else None


def same_schedule(before: TrainConfig, now: TrainConfig) -> bool:
    """Whether a run goes on as it was planned."""
    return all(getattr(before, key) == getattr(now, key) for key in OF_SCHEDULE)


def schedule_line(before: TrainConfig, now: TrainConfig, step: int) -> str:
    """How the learning rate goes on at a checkpoint's step, one line."""
    return f"{_name(before, now)}: {_here(before, now, step)}{_to_come(now, step)}"


def budget_line(train: TrainConfig, units: int, state: dict[str, Any]) -> str:
    """The invariance budget at a checkpoint and at the end. state: the checkpoint's state.json; units: residual ones."""
    total, step = budget_after(train, state), state["step"]
    said = verdict(expected(train, units, total))
    return f"invariance budget {budget_of(state, train):.2f} at step {step:,}, {total:.2f} at the end: {said}"


def budget_of(state: dict[str, Any], now: TrainConfig) -> float:
    """The invariance budget that was spent up to a checkpoint. Older ones do not say: that of their schedule."""
    if "budget" in state:
        return float(state["budget"])
    planned = invariance_budget(schedule_before(state["config"]["train"], now), state["step"])
    return planned - float(state.get("budget_skipped", 0.0))


def budget_after(train: TrainConfig, state: dict[str, Any]) -> float:
    """The invariance budget of a run that goes on from a checkpoint with this recipe, at its end."""
    more = 0.0 if state.get("frozen") is not None else budget_to_come(train, state["step"])
    return budget_of(state, train) + more


def budget_to_come(train: TrainConfig, step: int) -> float:
    """What the schedule adds to the invariance budget from a step on, until the end or until G is frozen."""
    return max(0.0, planned_budget(train) - invariance_budget(train, step))


def _name(before: TrainConfig, now: TrainConfig) -> str:
    if now.schedule == before.schedule == "cosine" and now.steps != before.steps:
        return f"cosine {'stretched' if now.steps > before.steps else 'shortened'} over {now.steps:,} steps"
    return now.schedule


def _here(before: TrainConfig, now: TrainConfig, step: int) -> str:
    """The rate of the last step before the checkpoint, and that of the next one."""
    was, rate = learning_rate(before, step - 1), learning_rate(now, step)
    if step >= now.steps:
        return f"nothing is left after step {step:,}"
    stable = stable_until(now, step)
    if not math.isclose(was, rate, rel_tol=0.01):
        return f"at step {step:,} the rate goes from {_rate(was)} to {_rate(rate)}{', stable' if stable else ''}"
    if stable is None:
        return f"goes on at step {step:,} with rate {_rate(rate)}"
    return f"decays from step {step:,} on" if stable == step else f"goes on in the stable part (rate {_rate(rate)})"


def _to_come(now: TrainConfig, step: int) -> str:
    """What follows."""
    if step >= now.steps:
        return ""
    if now.schedule == "constant":
        return f" until step {now.steps:,}"
    end = f"to {_rate(learning_rate(now, now.steps))} at step {now.steps:,}"
    if now.schedule == "cosine":
        return f", then down {end}"
    if step >= now.decay_begins:
        return f", {now.decay_shape}, {end}"
    return f" until step {now.decay_begins:,}, then down ({now.decay_shape}) {end}"


def _rate(value: float) -> str:
    """`5.5e-4`."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}" if value else "0"
