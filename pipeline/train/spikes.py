"""Skipped steps and loss spikes: how they are detected, and what is done, the same on every rank.

Policy `train.on_spike`: `warn` reports the spike and continues; `stop` ends the run; `rollback` loads the newest intact
checkpoint into the running job and continues *after* the offending batch: the position in the data order stays where it is, so
the batches seen since that checkpoint are skipped (as in the PaLM runs, arXiv 2204.02311, section 5.1). Steps count again from
the checkpoint's; MLflow keeps the first value of a step that is trained twice.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from pipeline.checkpoint.format import committed, step_of, verify
from pipeline.config.train import TrainConfig
from pipeline.errors import ConfigError, UserError
from pipeline.train.step import Outcome

MIN_LOSSES = 20  # before that there is no bound
ORDER_WINDOW = 9  # validations
MIN_ORDERS = 3
ORDER_FACTOR = 10.0
LEAST_SIGMA = 0.01  # of the median: MAD is 0 when half of the window is equal, and a few percent are not a spike
MAX_ROLLBACKS = 3  # to one checkpoint: what spikes again on other data does not spike because of its data
KEPT_EVENTS = 100
EMPTY = "skipped, nothing but padding"
SHOWN_IDS = 64
log = logging.getLogger(__name__)
Event = dict[str, Any]
Sequences = Callable[[], npt.NDArray[np.int64]]  # gives the sequence numbers of a batch; computing them takes time


def judge(
    guard: Guard,
    train: TrainConfig,
    step: int,
    outcome: Outcome,
    validated: dict[str, float],
    ids: Sequences,
) -> Event | None:
    """The event of this step, if any: a skipped step or a spike. `ids`: gives the batch's sequence numbers.

    Raises ConfigError when too many steps in a row were skipped, or when a spike is to stop the run: a restart would end
    the same way.
    """
    event: Event | None = None
    guard.skipped_in_a_row = guard.skipped_in_a_row + 1 if outcome.skipped else 0
    if outcome.skipped:
        event = {
            "step": step,
            "what": "skipped",
            "value": _plain(outcome.loss),
            "bound": None,
            "sequences": ids().tolist(),
        }
        text = f"step {step}: loss {outcome.loss:g} or a gradient is not finite"
        fix = "Lower train.max_lr or lengthen train.warmup_steps, in a new run_dir, or look"
        if not outcome.targets:
            event["what"], text, fix = EMPTY, f"step {step}: the batch is nothing but padding", "Look"
        if guard.skipped_in_a_row >= train.max_skipped_steps:
            raise ConfigError(
                f"{text}, and so were the {guard.skipped_in_a_row} steps up to it; the last batch is sequences "
                f"{_shown(event['sequences'])}. {fix} at these sequences with `pldr data show`"
            )
    bound = guard.loss(outcome.loss, window=train.spike_window, threshold=train.spike_threshold)
    if bound is not None:
        event = {"step": step, "what": "loss spike", "value": outcome.loss, "bound": bound, "sequences": ids().tolist()}
    order = validated.get("invariance/order_parameter_G", math.nan)
    bound = guard.order(order)
    if bound is not None:
        event = {"step": step, "what": "spike of G's order parameter", "value": order, "bound": bound, "sequences": []}
    if event is None:
        return None
    event["action"] = "skipped" if event["what"] in ("skipped", EMPTY) else train.on_spike
    guard.record(event)
    if event["action"] == "stop":
        raise ConfigError(
            f"{describe(event)}. train.on_spike=stop ended the run; resume from its last checkpoint with train.on_spike=warn "
            "or rollback"
        )
    return event


def describe(event: Event) -> str:
    """An event in one line."""
    value = ", not finite" if event["value"] is None else f", {event['value']:.4g}"
    if event["what"] == EMPTY:
        value = ""
    above = "" if event["bound"] is None else f" above {event['bound']:.4g}"
    batch = f"; the batch is sequences {_shown(event['sequences'])}" if event["sequences"] else ""
    return f"step {event['step']}: {event['what']}{value}{above}{batch}"


def rollback_target(folder: Path, guard: Guard, step: int) -> Path | None:
    """The newest intact checkpoint from before `step`, the same on all ranks; None when there is none. Collective.

    Raises ConfigError when the run was already rolled back to it MAX_ROLLBACKS times.
    """
    chosen: list[Path | None] = [None]
    if dist.get_rank() == 0:
        for candidate in reversed([c for c in committed(folder) if step_of(c) < step]):
            try:
                verify(candidate)
                chosen[0] = candidate
                break
            except UserError as error:
                log.warning("not rolled back to %s: %s", candidate.name, error)
    dist.broadcast_object_list(chosen, src=0)
    if chosen[0] is not None and guard.rollbacks.get(chosen[0].name, 0) >= MAX_ROLLBACKS:
        raise ConfigError(
            f"{chosen[0].name}: rolled back to it {MAX_ROLLBACKS} times, and the loss spikes again on other data; lower "
            "train.max_lr in a new run_dir, or set train.on_spike=warn"
        )
    return chosen[0]


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _shown(ids: Sequence[int]) -> str:
    more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
    return ", ".join(str(i) for i in ids[:SHOWN_IDS]) + more


def robust_bound(values: Sequence[float], threshold: float) -> float:
    """`median + threshold * max(1.4826 * MAD, 0.01 * |median|)` of at least one finite value."""
    median = statistics.median(values)
    mad = statistics.median(abs(value - median) for value in values)
    return median + threshold * max(1.4826 * mad, LEAST_SIGMA * abs(median))


@dataclass
class Guard:
    """What has been seen and done so far; kept in state.json.

    skipped_in_a_row: the skipped steps since the last one that was not. spikes: how many began. events: the newest, each
    with its step, what, value, bound and action. rollbacks: how many, by the checkpoint's name.
    """

    losses: list[float] = field(default_factory=list)
    orders: list[float] = field(default_factory=list)
    spiking: bool = False
    spikes: int = 0
    skipped_in_a_row: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    rollbacks: dict[str, int] = field(default_factory=dict)

    def loss(self, value: float, *, window: int, threshold: float) -> float | None:
        """Record a step's loss. Returns the bound that it exceeds when a spike begins with it, else None.

        A spike that lasts counts once: it ends with the first loss under the bound. Losses that are not finite do not count.
        """
        if not math.isfinite(value):
            return None
        bound = robust_bound(self.losses, threshold) if len(self.losses) >= min(MIN_LOSSES, window) else math.inf
        begins = value > bound and not self.spiking
        self.spiking = value > bound
        self.losses = [*self.losses, value][-window:]
        self.spikes += begins
        return bound if begins else None

    def order(self, value: float) -> float | None:
        """Record a validation's order parameter of G. Returns the bound that it exceeds, else None."""
        if not math.isfinite(value):
            return None
        bound = ORDER_FACTOR * statistics.median(self.orders) if len(self.orders) >= MIN_ORDERS else math.inf
        self.orders = [*self.orders, value][-ORDER_WINDOW:]
        self.spikes += value > bound
        return bound if value > bound else None

    def record(self, event: dict[str, Any]) -> None:
        """Keep an event, for readers of state.json."""
        self.events = [*self.events, event][-KEPT_EVENTS:]

    def roll_back(self, later: Guard, checkpoint: str) -> None:
        """After a rollback to this guard's checkpoint: keep the counts and events of `later`, the guard before the rollback."""
        self.spikes, self.events = later.spikes, later.events
        self.rollbacks = {**later.rollbacks, checkpoint: later.rollbacks.get(checkpoint, 0) + 1}
