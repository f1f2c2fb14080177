"""One rank of a measurement: `python -m pipeline.bench.scale.worker JOB`, with RANK, WORLD_SIZE and so on in the environment.

JOB is a JSON file: {"config", "overrides", "mbit": [rates; null: as fast as it goes], "steps": of each rate, "out"}. Rank R
writes OUT.R, a JSON object. Ranks shape their own end of the cable, so that one process sees all rates in turn.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.bench.scale.hosts import INTERFACE
from pipeline.config.load import load_config
from pipeline.config.run import RunConfig
from pipeline.distributed import end_with_parent
from pipeline.train.deepspeed_config import accumulation_steps
from pipeline.train.engine import build_engine, device_of_rank, init_distributed, set_learning_rate
from pipeline.train.signals import StopRequest
from pipeline.train.step import global_step
from pipeline.train.telemetry import Stopwatch
from pldr_model.model import PLDRModel

WARM_UP = 2  # steps: in the first ones ZeRO 3 learns in which order weights are needed
LINK_BYTES = (4, 1 << 20, 1 << 23)
LINK_REPEATS = 3
OPERATIONS = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}
HEADERS = 66  # bytes of Ethernet, IPv4, and TCP with its timestamps, of a packet


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, every collective that torch dispatches is written down: (operation, bytes of its whole tensor)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2]
            self.seen.append((OPERATIONS.get(name, name), max((t.nbytes for t in _tensors(args)), default=0)))
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, list | tuple) else []


def main(job_file: str) -> None:
    """Measure, and write what was found."""
    end_with_parent()
    job = json.loads(Path(job_file).read_text())
    config = load_config(job["config"], job["overrides"])
    init_distributed(600.0)
    step = _step(config)
    for _ in range(WARM_UP):
        step()
    found: dict[str, Any] = {"rates": {}}
    for mbit in job["mbit"]:
        _shape(mbit)
        link = _link_seconds() if dist.get_world_size() > 1 else {}
        step()  # fills the bucket of the shaper as the timed ones find it
        found["rates"][str(mbit)] = {"link": link, "steps": [_timed(step) for _ in range(job["steps"])]}
    _shape(None)
    with Collectives() as collectives:
        step()
    found["collectives"] = collectives.seen
    Path(f"{job['out']}.{dist.get_rank()}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _step(config: RunConfig) -> Callable[[], None]:
    """The trainer's step on random tokens."""
    train, device = config.train, device_of_rank()
    torch.manual_seed(config.seed)
    world = dist.get_world_size()
    engine = build_engine(PLDRModel(config.model), train, world)
    shape = (accumulation_steps(train, world), train.micro_batch, config.model.context_length + 1)
    micro_batches = list(np.random.default_rng(dist.get_rank()).integers(4, config.model.vocab_size, shape))
    stop, forward = StopRequest(), Stopwatch(device)

    def step() -> None:
        set_learning_rate(engine, 1e-4)
        global_step(engine, micro_batches, config.model, stop=stop, device=device, forward=forward)

    return step


def _timed(step: Callable[[], None]) -> dict[str, float]:
    """Seconds of a step, and what left this host's interface in it: bytes within packets, as the kernel counts."""
    dist.barrier()
    before, started = _sent(), time.perf_counter()
    step()
    dist.barrier()
    seconds, after = time.perf_counter() - started, _sent()
    return {"seconds": seconds, "payload": after[0] - before[0] - HEADERS * (after[1] - before[1])}


def _sent() -> tuple[int, int]:
    counters = Path("/sys/class/net") / INTERFACE / "statistics"
    if not counters.is_dir():
        return 0, 0
    return int((counters / "tx_bytes").read_text()), int((counters / "tx_packets").read_text())


def _link_seconds() -> dict[str, list[float]]:
    """Bytes of an all-reduce -> its seconds, several times."""
    found: dict[str, list[float]] = {}
    for nbytes in LINK_BYTES:
        numbers = torch.zeros(nbytes // 4)
        times = []
        for _ in range(LINK_REPEATS + 1):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(numbers)
            times.append(time.perf_counter() - started)
        found[str(nbytes)] = times[1:]
    return found


def _shape(mbit: float | None) -> None:
    """Limit what leaves this host. The queue is long enough that no packet is dropped: TCP waits for its window first."""
    if dist.get_world_size() == 1:
        return
    device = ["dev", INTERFACE, "root"]
    subprocess.run(["tc", "qdisc", "del", *device], stderr=subprocess.DEVNULL)
    if mbit is not None:
        limit = ["rate", f"{mbit}mbit", "burst", "64kb", "limit", "16mb"]
        subprocess.run(["tc", "qdisc", "add", *device, "tbf", *limit], check=True)
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
