"""A wish to stop, by signal: SIGTERM (schedulers, `kill`) and SIGUSR1 (schedulers' warning before the time is up).

A rank that gets one only notes it. The loop tells all ranks with the loss of the next step (step.py), so that they leave the
loop together, save, and end with exit code 0.
"""

from __future__ import annotations

import signal
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Which signals this process has been sent; none before `listen`."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def listen(self) -> None:
        """Note SIGTERM and SIGUSR1 from now on instead of dying of them. In the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def flags(self) -> list[float]:
        """1 for each of SIGNALS that came, else 0: what the ranks add up."""
        return [float(number in self._seen) for number in SIGNALS]

    def note(self, number: int) -> None:
        """Take a signal for seen that reached this process in another way (pipeline.train.signals)."""
        self._seen.add(number)

    def _note(self, number: int, frame: Any) -> None:
        self.note(number)


def named(flags: list[float]) -> str | None:
    """The name of the first signal that any rank got, from the ranks' added flags; None when there was none."""
    return next((number.name for number, flag in zip(SIGNALS, flags, strict=True) if flag), None)
