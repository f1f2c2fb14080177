"""What torch, cuBLAS and NCCL read from a rank's environment because a key asks for it, and what a rank leaves behind when a
collective fails.

`set_up` runs in every rank, however it was started, before CUDA and the process group begin, which read these variables once.

- `train.deterministic`: torch takes kernels whose result does not depend on the order in which threads end, and raises where it
  has none. On a CPU a run is bit-equal without. What it does not fix is NCCL: the order of its sums depends on algorithm,
  protocol and the number of channels, which it chooses by the machines and the message; the same job on the same machines has
  the same. They are pinned by NCCL_ALGO and NCCL_PROTO, which are left to the user.
- `train.flight_recorder`: torch keeps this many of a rank's last collectives. With NCCL torch's own watchdog writes them, as a
  pickle, when one times out; nothing here reads it (docs/faults.md). With either backend a rank whose collective raises
  writes them as JSON.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from pipeline.config.train import TrainConfig
from pipeline.io.storage import publish_bytes

log = logging.getLogger(__name__)


def variables(train: TrainConfig, recordings: Path) -> dict[str, str]:
    """The environment variables of a rank. recordings: folder of what the flight recorder writes."""
    found = {}
    if train.deterministic:
        found["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # the larger of the two values with which cuBLAS is deterministic
    if train.flight_recorder:
        size, file = str(train.flight_recorder), str(recordings / "nccl-rank-")  # torch appends the rank
        # Each has a name of its own in earlier versions of torch.
        found |= {"TORCH_FR_BUFFER_SIZE": size, "TORCH_NCCL_TRACE_BUFFER_SIZE": size}
        found |= {"TORCH_FR_DUMP_TEMP_FILE": file, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": file}
        found |= {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_NCCL_ENABLE_MONITORING": "1"}
    return found


def set_up(train: TrainConfig, recordings: Path) -> None:
    """Set the variables, and torch's deterministic kernels. Call it before CUDA is used and the process group is made."""
    os.environ.update(variables(train, recordings))
    if train.flight_recorder:
        recordings.mkdir(parents=True, exist_ok=True)
    if train.deterministic:
        import torch

        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def write_recording(recordings: Path, rank: int) -> None:
    """This rank's last collectives, as JSON; nothing without a flight recorder, also where an earlier start had one."""
    if "TORCH_FR_BUFFER_SIZE" not in os.environ or not recordings.is_dir():
        return
    with contextlib.suppress(ImportError, AttributeError, RuntimeError, OSError):  # older torch; a full disk
        from torch._C import _distributed_c10d

        trace = _distributed_c10d._dump_fr_trace_json()  # type: ignore[attr-defined]
        publish_bytes(recordings / f"rank-{rank}.json", trace if isinstance(trace, bytes) else trace.encode())
        log.warning("the last collectives of this rank are in %s", recordings / f"rank-{rank}.json")
