"""The device of a process: CUDA if there is one, unless DS_ACCELERATOR=cpu, as DeepSpeed decides too.

torch takes 1.5 s to import (2026-11-28), and a command that is done sooner, such as `pldr check`, does not need it where there
can be no GPU.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

DRIVERS = ("nvidia*", "nvmap", "nvhost*", "dxg", "kfd")  # of NVIDIA, Jetson, WSL and ROCm, below /dev


def has_gpu() -> bool:
    """Whether this process computes on a CUDA device."""
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda" or not _may_have_gpu():
        return False
    import torch

    return torch.cuda.is_available()


def num_devices() -> int:
    """Ranks that fit on this node: its visible GPUs, or 2 on a CPU."""
    if not has_gpu():
        return 2
    import torch

    return torch.cuda.device_count()


def gpu_bytes() -> int | None:
    """Memory of the first GPU; None without one."""
    if not has_gpu():
        return None
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


def _may_have_gpu() -> bool:
    """Whether torch has to be asked: False where it is the CPU build, or no driver is loaded."""
    if "torch" in sys.modules:
        return True
    if importlib.metadata.version("torch").endswith("+cpu"):
        return False
    return any(next(Path("/dev").glob(pattern), None) is not None for pattern in DRIVERS)
