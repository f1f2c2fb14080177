"""One answer to "GPU or CPU?", the same that DeepSpeed gives itself: CUDA when there is one, unless DS_ACCELERATOR=cpu."""

from __future__ import annotations

import os

import torch


def has_gpu() -> bool:
    """Whether this process computes on a CUDA device."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def num_devices() -> int:
    """Ranks that fit on this node: its visible GPUs, or 2 on a CPU."""
    return torch.cuda.device_count() if has_gpu() else 2
