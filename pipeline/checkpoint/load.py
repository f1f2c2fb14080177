"""Restore a checkpoint; and how an engine writes and reads DeepSpeed's files: hashed and fsynced, with `weights_only=True`.

Saving a checkpoint is in save.py.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist

from pipeline.checkpoint.deepspeed_files import ZeroState, safe_load
from pipeline.checkpoint.format import checkpoint_name
from pipeline.checkpoint.reshard import carry_over, check_shapes, fits
from pipeline.devices import has_gpu
from pipeline.errors import UserError

log = logging.getLogger(__name__)


class _HashingFile:
    """A binary file that hashes what is written."""

    def __init__(self, path: Path) -> None:
        self._stream = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> dict[str, Any]:
        """Fsync and close; returns the {sha256, size} of all that was written."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        size = self._stream.tell()
        self._stream.close()
        return {"sha256": self._digest.hexdigest(), "size": size}


def make_safe(engine: Any) -> None:
    """Make a DeepSpeed engine write its checkpoints hashed and fsynced, and read them without executing anything.

    It no longer copies its conversion script beside them: on a full disk that would raise on rank 0 alone.
    """
    engine.checkpoint_engine = _make_checkpoint_engine()
    engine._copy_recovery_script = lambda path: None


def _make_checkpoint_engine() -> Any:
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class SafeCheckpointEngine(TorchCheckpointEngine):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(None)
            self.written: dict[str, dict[str, Any]] = {}  # path -> {sha256, size}
            self.failure: str | None = None

        def save(self, state_dict: Any, path: str) -> None:
            # save.py reports a failure: a rank that raised here would leave the others in DeepSpeed's barrier.
            try:
                stream = _HashingFile(Path(path))
                torch.save(state_dict, cast(IO[bytes], stream))
                self.written[os.path.abspath(path)] = stream.close()
            except (OSError, RuntimeError) as error:
                self.failure = self.failure or str(error)

        def load(self, path: str, map_location: Any = None) -> Any:
            return safe_load(path, map_location)

        def create(self, info: Any) -> None:
            self.written.clear()
            self.failure = None

    return SafeCheckpointEngine()


def load(engine: Any, checkpoint: Path, state: dict[str, Any], *, precision: str, decay_on: str = "units") -> None:
    """Restore weights, optimizer and this rank's RNG from a verified checkpoint; collective.

    DeepSpeed loads it, bit for bit, when the checkpoint has the same world size, ZeRO settings, `precision` and groups of
    parameters (`decay_on`: train.metric_decay_on); otherwise it is converted (reshard.py). Raises UserError when it is of
    another model.
    """
    old = ZeroState(checkpoint / checkpoint_name(state["step"]))
    check_shapes(engine, old)
    train = state["config"]["train"]
    before = {"world_size": state["world_size"], "precision": train["precision"]}
    same_groups = train.get("metric_decay_on", "units") == decay_on
    if same_groups and fits(engine, old, **before, current=precision):
        path, _ = engine.load_checkpoint(str(checkpoint), tag=checkpoint_name(state["step"]))
        if path is None:
            raise UserError(f"{checkpoint}: DeepSpeed found no checkpoint in it")
    else:
        carry_over(engine, old)
        if dist.get_rank() == 0:
            log.warning(
                "%s converted: %s, ZeRO %s -> %s, ZeRO %s",
                *(checkpoint.name, f"{before['world_size']} ranks, {before['precision']}", old.zero.get("stage")),
                *(f"{dist.get_world_size()} ranks, {precision}", engine.zero_optimization_stage()),
            )
    # Training draws no random numbers (no dropout; the data order has its own seed), so at a larger world size an added rank
    # keeps the generator that the run's seed gave it.
    if dist.get_rank() < len(state["rng"]):
        _restore_rng(state["rng"][dist.get_rank()])


def rng_state() -> dict[str, str]:
    """This rank's random number generators, as they are stored in state.json."""
    state = {"cpu": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()}
    if has_gpu():
        state["cuda"] = base64.b64encode(torch.cuda.get_rng_state().numpy().tobytes()).decode()
    return state


def _restore_rng(state: dict[str, str]) -> None:
    def tensor(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    torch.set_rng_state(tensor(state["cpu"]))
    if "cuda" in state and has_gpu():
        torch.cuda.set_rng_state(tensor(state["cuda"]))
