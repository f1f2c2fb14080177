"""What is a loss spike ("dragon king"), and what is done about it: pure functions of the numbers that all ranks share.

A loss is a spike when it lies above a running robust bound, `median + threshold * sigma` over the last `window` losses, where
sigma is 1.4826 * MAD (the standard deviation of a normal distribution): a few spikes in the window move neither. The order
parameter of G spikes when it is ten times the median of the last validations: it falls over decades, so its measure is a ratio.

Every rank sees the same losses and so decides the same. The windows are part of a checkpoint, so that a resumed run decides
what an uninterrupted one would have: after a rollback there need be no record on disk before the next save, a run killed
meanwhile comes to the same spike and the same rollback.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MIN_LOSSES = 20  # before that there is no bound
ORDER_WINDOW = 9  # validations
MIN_ORDERS = 3
ORDER_FACTOR = 10.0
LEAST_SIGMA = 0.01  # of the median: MAD is 0 when half of the window is equal, and a few percent are no king
MAX_ROLLBACKS = 3  # to one checkpoint: what spikes again on other data does not spike because of its data
KEPT_EVENTS = 100


def robust_bound(values: Sequence[float], threshold: float) -> float:
    """`median + threshold * max(1.4826 * MAD, 0.01 * |median|)` of at least one finite value."""
    median = statistics.median(values)
    mad = statistics.median(abs(value - median) for value in values)
    return median + threshold * max(1.4826 * mad, LEAST_SIGMA * abs(median))


@dataclass
class Guard:
    """What has been seen and done so far; kept in state.json.

    skipped_in_a_row: steps that were skipped, up to now without one that was not. spikes: how many began. events: the
    newest, each with step, what, value, bound and what was done. rollbacks: how often, by the checkpoint's name.
    """

    losses: list[float] = field(default_factory=list)
    orders: list[float] = field(default_factory=list)
    spiking: bool = False
    spikes: int = 0
    skipped_in_a_row: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    rollbacks: dict[str, int] = field(default_factory=dict)

    def loss(self, value: float, *, window: int, threshold: float) -> float | None:
        """Take note of a step's loss; the bound it is above, when a spike begins with it, else None.

        A spike that lasts is one: it ends with the first loss under the bound. Losses that are not finite do not count.
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
        """Take note of a validation's order parameter of G; the bound it is above, else None."""
        if not math.isfinite(value):
            return None
        bound = ORDER_FACTOR * statistics.median(self.orders) if len(self.orders) >= MIN_ORDERS else math.inf
        self.orders = [*self.orders, value][-ORDER_WINDOW:]
        self.spikes += value > bound
        return bound if value > bound else None

    def record(self, event: dict[str, Any]) -> None:
        """Keep an event for those who read state.json."""
        self.events = [*self.events, event][-KEPT_EVENTS:]

    def roll_back(self, later: Guard, checkpoint: str) -> None:
        """Take over, as the guard of a checkpoint that `later`'s run has gone back to, what must not be forgotten."""
        self.spikes, self.events = later.spikes, later.events
        self.rollbacks = {**later.rollbacks, checkpoint: later.rollbacks.get(checkpoint, 0) + 1}
