"""What every rank and node measures, as metrics of the one run: which rank is slow, and how full and busy each machine is.

All ranks end a step together, so a step's length does not show which rank was waited for. What differs is the time before ranks
wait for one another: fetching the batch, and the forward pass, which communicates nothing at ZeRO stages 0 to 2. At stage 3 it
gathers parameters, so a slow rank slows the others' forward passes too and the spread is damped.

Decision: rank 0 logs for all. One all-gather of a few numbers at each logging interval instead of an MLflow client on every
node: the spool that survives an outage stays the only connection to MLflow (pipeline/tracking/metrics.py).
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist

from pipeline.devices import has_gpu

PEAK_FLOPS = {  # dense bf16, vendors' data sheets
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
    "B200": 2250e12,
}
NODES_TAG = "pldr.nodes"
MAX_NODES = 64  # whose metrics are logged; the others count only in what is taken over all ranks


class Stopwatch:
    """Seconds inside `running` since the last `read`; on a GPU those of its stream, without waiting for it before `read`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time what happens inside."""
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def read(self) -> float:
        """Seconds since the last reading."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3
        seconds, self._seconds = self._seconds, 0.0
        self._events.clear()
        return seconds


@dataclass(frozen=True)
class Reading:
    """One rank's numbers since the last reading. NaN: unknown here. A node's numbers are taken from its first rank."""

    first_on_node: float  # 1 or 0
    data_s: float  # for a step
    forward_s: float  # for a step
    rss_gb: float
    gpu_peak_gb: float
    gpu_percent: float
    cpu_percent: float
    memory_gb: float  # in use on the node
    disk_free_gb: float  # where the run is
    received_mb_s: float
    sent_mb_s: float


NODE_FIELDS = ("cpu_percent", "memory_gb", "disk_free_gb", "received_mb_s", "sent_mb_s")


class Measures:
    """This rank's stopwatches, and the readings of all ranks."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.data = Stopwatch(torch.device("cpu"))
        self.forward = Stopwatch(device)
        self._folder, self._steps = folder, 0
        self._network, self._since = psutil.net_io_counters(), time.perf_counter()
        psutil.cpu_percent()  # the first reading counts from here

    def step(self) -> None:
        """Count a step."""
        self._steps += 1

    def gather(self) -> dict[str, float]:
        """The metrics of all ranks since the last reading, on every rank; collective."""
        mine = torch.tensor(astuple(self._read()), dtype=torch.float64, device="cuda" if has_gpu() else "cpu")
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        return summary(torch.stack(everyone).cpu().numpy())

    def _read(self) -> Reading:
        steps, self._steps = max(1, self._steps), 0
        before, since = self._network, self._since
        self._network, self._since = psutil.net_io_counters(), time.perf_counter()
        seconds = max(self._since - since, 1e-9)
        received = sent = math.nan
        if before is not None and self._network is not None:  # a container without network devices
            received = (self._network.bytes_recv - before.bytes_recv) / seconds / 1e6
            sent = (self._network.bytes_sent - before.bytes_sent) / seconds / 1e6
        try:
            disk_free_gb = psutil.disk_usage(str(self._folder)).free / 1e9
        except OSError:
            disk_free_gb = math.nan
        return Reading(
            first_on_node=float(first_on_node()),
            data_s=self.data.read() / steps,
            forward_s=self.forward.read() / steps,
            rss_gb=psutil.Process().memory_info().rss / 1e9,
            gpu_peak_gb=torch.cuda.max_memory_allocated() / 1e9 if has_gpu() else math.nan,
            gpu_percent=_gpu_percent(),
            cpu_percent=psutil.cpu_percent(),
            memory_gb=psutil.virtual_memory().used / 1e9,
            disk_free_gb=disk_free_gb,
            received_mb_s=received,
            sent_mb_s=sent,
        )


def summary(rows: np.ndarray) -> dict[str, float]:
    """Metrics from the readings of all ranks, [ranks, fields of Reading]; what no rank knows is omitted.

    `system/rank_seconds_*`: a step's seconds before ranks wait for one another, over ranks; `system/slowest_rank` had the most.
    `system/node-K/*`: K counts the nodes in the order of their ranks (their names: the run's tag `pldr.nodes`).
    """
    column = dict(zip((field.name for field in fields(Reading)), rows.T, strict=True))
    own = column["data_s"] + column["forward_s"]
    values = {
        "system/rank_seconds_min": own.min(),
        "system/rank_seconds_median": np.median(own),
        "system/rank_seconds_max": own.max(),
        "system/slowest_rank": own.argmax(),
        "system/data_wait_seconds": column["data_s"].max(),
        "system/rss_gb": column["rss_gb"].max(),
        "system/gpu_peak_gb": column["gpu_peak_gb"].max(),
    }
    starts = np.flatnonzero(column["first_on_node"])
    for node, (start, end) in enumerate(zip(starts, [*starts[1:], len(rows)], strict=True)):
        if node == MAX_NODES:
            break
        values |= {f"system/node-{node}/{name}": column[name][start] for name in NODE_FIELDS}
        values[f"system/node-{node}/gpu_percent"] = column["gpu_percent"][start:end].mean()
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def first_on_node() -> bool:
    """Whether this rank is its node's first, from the launcher's LOCAL_RANK."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def node_names(hosts: list[tuple[str, bool]]) -> str:
    """`node-0 HOST, node-1 HOST` from each rank's host and whether it is its node's first rank."""
    names = [host for host, first in hosts if first]
    return ", ".join(f"node-{number} {host}" for number, host in enumerate(names[:MAX_NODES]))


def _gpu_percent() -> float:
    """How busy the GPU is; NaN without one, or without the package nvidia-ml-py."""
    if not has_gpu():
        return math.nan
    try:
        return float(torch.cuda.utilization())
    except Exception:  # a driver or library that is missing must not end a run
        return math.nan


def peak_flops() -> float | None:
    """Peak dense bf16 FLOP/s of one device, None where it is unknown (a CPU)."""
    if not has_gpu():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


class Throughput:
    """Tokens per second between two readings, without the time spent on validation and checkpoints."""

    def __init__(self) -> None:
        self._start, self._paused, self._tokens = time.perf_counter(), 0.0, 0

    def add(self, tokens: int) -> None:
        """Count trained tokens: targets without padding."""
        self._tokens += tokens

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time that is not training."""
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started

    def read(self) -> float:
        """Tokens per second since the last reading."""
        now = time.perf_counter()
        rate = self._tokens / max(now - self._start - self._paused, 1e-9)
        self._start, self._paused, self._tokens = now, 0.0, 0
        return rate
