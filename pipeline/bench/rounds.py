"""Several pieces of work timed in turn, and what the memory of this machine moves: for `pldr bench decode`.

Rounds: each runs every piece once, in an order that changes from round to round, so that a busy machine slows all alike. A
ratio is the median of each round's, which is not affected by what slows a whole round.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pldr_model.decode import huge_pages

Work = Callable[[], object]  # a float that it returns are the seconds that count; else all that it took do
PASSES = 5  # over a buffer, for a bandwidth: the fastest counts


class Timed(NamedTuple):
    """Of one piece of work, by round: seconds, and CPU seconds of this process."""

    seconds: list[float]
    cpu: list[float]


def in_rounds(works: Mapping[str, Work], rounds: int, device: torch.device) -> dict[str, Timed]:
    """Run all works `rounds` times. Whoever calls has warmed them up."""
    times = {name: Timed([], []) for name in works}
    for index in range(rounds):
        names = list(works)
        start = index // 2 % len(names)
        order = names[start:] + names[:start]
        for name in order if index % 2 == 0 else reversed(order):
            wait(device)
            started, cpu_started = time.perf_counter(), time.process_time()
            own = works[name]()
            wait(device)
            times[name].seconds.append(own if isinstance(own, float) else time.perf_counter() - started)
            times[name].cpu.append(time.process_time() - cpu_started)
    return times


def speed_ratio(one: list[float], other: list[float]) -> float:
    """How many times as fast `one` is as `other`: the median of the rounds' ratios."""
    return statistics.median(theirs / ours for ours, theirs in zip(one, other, strict=True))


def wait(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Memory:
    """A buffer of `nbytes`, to find how fast the threads in force move memory. Calling it reads the buffer once, by the faster
    of a sum and a product of a matrix and a vector, which is what decoding does."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.device = device
        self._source = torch.randn(max(1, nbytes // 4 // 1024), 1024, device=device)
        huge_pages.collapse([self._source])  # as weights are
        self._target = torch.empty_like(self._source)
        self._vector = torch.randn(1024, device=device)
        self.nbytes = self._source.nbytes
        self._read = min((self._sum, self._product), key=self._fastest)

    def __call__(self) -> None:
        self._read()

    def copy(self) -> None:
        """Copy the buffer once."""
        self._target.copy_(self._source)

    def copy_bandwidth(self) -> float:
        """Bytes a second of a copy: those read and those written."""
        return 2 * self.nbytes / self._fastest(self.copy)

    def read_bandwidth(self) -> float:
        """Bytes a second of reading."""
        return self.nbytes / self._fastest(self)

    def _sum(self) -> None:
        self._source.sum()

    def _product(self) -> None:
        torch.mv(self._source, self._vector)

    def _fastest(self, work: Work) -> float:
        work()
        return min(in_rounds({"work": work}, PASSES, self.device)["work"].seconds)


def machine(device: torch.device) -> dict[str, Any]:
    """Where and when: what a number means little without. The load average is of the minute before."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
