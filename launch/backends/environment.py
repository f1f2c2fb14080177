"""The environment of ranks that are started on this node."""

from __future__ import annotations

import os

from pipeline.devices import has_gpu
from pipeline.environment import ENVIRONMENT_FILE, VISIBLE_DEVICES, omp_threads, without_other_jobs
from pipeline.train.signals import HEAD_FILE, PARENT_PIPE

SET_AT_A_START = (HEAD_FILE, ENVIRONMENT_FILE, VISIBLE_DEVICES)  # by an outer pldr, for its own ranks


def rank_environment(ranks: int) -> dict[str, str]:
    """The environment of ranks on this node: this process's without those of other jobs, and what makes a CPU node work."""
    environment = {k: v for k, v in without_other_jobs(os.environ).items() if k not in SET_AT_A_START}
    environment |= {
        PARENT_PIPE: "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if "CUDA_VISIBLE_DEVICES" in environment:
        environment[VISIBLE_DEVICES] = environment["CUDA_VISIBLE_DEVICES"]
    if not has_gpu():
        environment["DS_ACCELERATOR"] = "cpu"
        if omp_threads(environment) is None:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))
    return environment
