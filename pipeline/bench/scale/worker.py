"""One rank of a measurement: `python -m pipeline.bench.scale.worker JOB`, RANK and WORLD_SIZE and so on in the environment.

JOB is a JSON file: {"what": "steps" | "link", "config", "overrides", "repeats", "out"}. Rank R writes OUT.R, a JSON object.

`steps` trains on random tokens with the trainer's step. It returns the seconds of each step, what left this host's
interface in each (bytes and packets, the kernel's counters), and the collectives of one more step, as torch saw them.
`link` times all-reduces of several sizes, for the alpha and beta of the link.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.load import load_config
from pipeline.config.run import RunConfig
from pipeline.distributed import end_with_parent
from pipeline.train.deepspeed_config import accumulation_steps
from pipeline.train.engine import build_engine, device_of_rank, init_distributed, set_learning_rate
from pipeline.train.signals import StopRequest
from pipeline.train.step import global_step
from pipeline.train.telemetry import Stopwatch
from pldr_model.model import PLDRModel

WARM_UP = 2  # ZeRO 3 learns in the first two steps in which order weights are needed
LINK_BYTES = (4, 1 << 18, 1 << 20, 1 << 22, 1 << 23)


class Collectives(TorchDispatchMode):
    """Inside, every collective that torch dispatches is written down: [name, bytes of the tensors given]."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.seen.append((func._schema.name.partition("::")[2], _nbytes(args[-_INPUT.get(func.__name__, 0) or 0:])))
        return func(*args, **(kwargs or {}))
