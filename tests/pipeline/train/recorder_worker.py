"""One rank of tests/pipeline/train/test_backend.py: rank 1 leaves out the last all-reduce, for which rank 0 waits 2 seconds.

Usage: recorder_worker.py FOLDER
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.config.train import TrainConfig
from pipeline.train.backend import set_up, write_recording


def main() -> None:
    recordings = Path(sys.argv[1]) / "flight-recorder"
    set_up(TrainConfig(steps=10, warmup_steps=1, flight_recorder=4), recordings)
    dist.init_process_group("gloo")
    store = dist.distributed_c10d._get_default_store()
    group = dist.new_group(timeout=timedelta(seconds=2))
    for _ in range(6):
        dist.all_reduce(torch.ones(3))
    if dist.get_rank() == 0:
        try:
            dist.all_reduce(torch.ones(5), group=group)
        except RuntimeError:
            write_recording(recordings, 0)
        store.set("over", "1")
        store.wait(
            ["seen"], timedelta(seconds=200)
        )  # the store is this process's: it must not end before the other has read it
    else:
        store.wait(["over"], timedelta(seconds=200))
        store.set("seen", "1")


if __name__ == "__main__":
    main()
    os._exit(0)  # a group whose collective has failed is not left in order
