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
from torch import Tensor

Work = Callable[[], float | None]  # returns the seconds that count, or None: all that it took
PASSES = 7  # over a buffer, for a bandwidth: the fastest counts


class Timed(NamedTuple):
    """Of one piece of work, by round: seconds, and CPU seconds of this process."""

    seconds: list[float]
    cpu: list[float]


def in_rounds(works: Mapping[str, Work], rounds: int, device: torch.device) -> dict[str, Timed]:
    """Run all works `rounds` times. Whoever calls has warmed them up."""
    times = {name: Timed([], []) for name in works}
    for index in range(rounds):
        names = list(works)
        start = index % len(names)
        order = names[start:] + names[:start]
        for name in order if index % 2 == 0 else reversed(order):
            wait(device)
            started, cpu_started = time.perf_counter(), time.process_time()
            own = works[name]()
            wait(device)
            times[name].seconds.append(time.perf_counter() - started if own is None else own)
            times[name].cpu.append(time.process_time() - cpu_started)
    return times


def speed_ratio(one: list[float], other: list[float]) -> float:
    """How many times as fast `one` is as `other`: the median of the rounds' ratios."""
    return statistics.median(theirs / ours for ours, theirs in zip(one, other, strict=True))


def wait(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(nbytes: int, device: torch.device) -> dict[str, float]:
    """Bytes a second, with the threads in force, over buffers of `nbytes`: `copy` (read and written bytes count both) and
    `read` (the faster of a sum and a product of a matrix and a vector, which is what decoding does)."""
    side = max(1, nbytes // 4 // 1024)
    source, target, vector = (torch.randn(size, device=device) for size in ((side, 1024), (side, 1024), (1024,)))
    matrix_bytes = source.nbytes
    copy = matrix_bytes * 2 / _fastest(lambda: target.copy_(source), device)
    read = matrix_bytes / min(_fastest(source.sum, device), _fastest(lambda: torch.mv(source, vector), device))
    return {"copy": copy, "read": read}


def _fastest(work: Callable[[], Tensor], device: torch.device) -> float:
    def run() -> None:
        work()

    run()
    return min(in_rounds({"run": run}, PASSES, device)["run"].seconds)


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
