"""Where a validation's time goes: `with part("leak"): …` around what is measured, counted only inside `costs()`.

A part inside another counts for itself and not for the outer one, unless the outer one is taken as a whole: what fp64 repeats
is fp64's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Costs:
    """Seconds by part, of the clock and of the process's CPUs."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._parts: list[tuple[str, bool]] = []
        self._since = (0.0, 0.0)

    def enter(self, name: str, *, whole: bool) -> None:
        """A part begins, inside the one that runs if there is one."""
        self._count()
        outer, takes_all = self._parts[-1] if self._parts else (name, False)
        self._parts.append((outer, True) if takes_all else (name, whole))

    def leave(self) -> None:
        """The innermost part ends."""
        self._count()
        self._parts.pop()

    def _count(self) -> None:
        now = (time.perf_counter(), time.process_time())
        if self._parts:
            name = self._parts[-1][0]
            self.wall[name] = self.wall.get(name, 0.0) + now[0] - self._since[0]
            self.cpu[name] = self.cpu.get(name, 0.0) + now[1] - self._since[1]
        self._since = now


_counting: ContextVar[Costs | None] = ContextVar("costs", default=None)


@contextmanager
def costs() -> Iterator[Costs]:
    """Count what the parts inside cost."""
    counted = Costs()
    token = _counting.set(counted)
    try:
        yield counted
    finally:
        _counting.reset(token)


@contextmanager
def part(name: str, *, whole: bool = False) -> Iterator[None]:
    """This is the part of that name; `whole`: with all parts inside."""
    counted = _counting.get()
    if counted is None:
        yield
        return
    counted.enter(name, whole=whole)
    try:
        yield
    finally:
        counted.leave()
