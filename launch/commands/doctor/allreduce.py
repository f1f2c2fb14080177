"""One rank of a bandwidth measurement: all-reduces of a large tensor over all ranks, as gradients are. Started by torchrun.

Rank 0 ends with one line of JSON: {"backend", "ranks", "bytes", "seconds" (median), "bus_gb_per_s"}. Bus bandwidth is
2 (n - 1) / n * bytes / seconds, NCCL's measure: what the slowest link carries, whatever the number of ranks n.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.devices import has_gpu
from pipeline.network import choose_interface

TIMEOUT_S = 60.0
WARM_UP, TIMED = 2, 5


def main() -> None:
    """Measure; rank 0 prints."""
    choose_interface()
    gpu = has_gpu()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if gpu else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S))
    numbers = torch.ones((256 if gpu else 16) << 18, device="cuda" if gpu else "cpu")  # 256 or 16 MiB of fp32
    times = []
    for _ in range(WARM_UP + TIMED):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(numbers)
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        numbers.fill_(1.0)
    ranks, seconds, size = dist.get_world_size(), statistics.median(times[WARM_UP:]), numbers.numel() * 4
    if dist.get_rank() == 0:
        rate = 2 * (ranks - 1) / ranks * size / seconds / 1e9
        print(json.dumps({"backend": backend, "ranks": ranks, "bytes": size, "seconds": seconds, "bus_gb_per_s": rate}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
