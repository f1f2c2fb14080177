"""Write and restore committed checkpoints (the format: pipeline/checkpoints.py; which stay: pipeline/retention.py).

All ranks write into a hidden staging folder; rank 0 checks that every rank's files arrived with the bytes that were
meant, commits, and renames the folder. DeepSpeed's `latest` is not written and never read: it precedes the other ranks'
data. Its files go through `SafeCheckpointEngine`: hashed and fsynced when written, read with `weights_only=True`.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist

from pipeline import storage
from pipeline.checkpoints import COMMITTED, SCHEMA_VERSION, STATE, checkpoint_name, safe_load
from pipeline.device import has_gpu
from pipeline.errors import UserError
from pipeline.train.reshard import carry_over, check_shapes, fits
from pipeline.zero_state import ZeroState

log = logging.getLogger(__name__)


class _HashingFile:
    """A binary file that hashes what passes through."""

    def __init__(self, path: Path) -> None:
        self._stream = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> str:
        """Make it durable; returns the hex sha256 of all that was written."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return self._digest.hexdigest()


def make_safe(engine: Any) -> None:
    """Let a DeepSpeed engine write its checkpoints hashed and fsynced, and read them without executing anything.

    Nor does it put its conversion script beside them: a copy that a full disk ends in an exception on rank 0 alone.
    """
    engine.checkpoint_engine = _make_checkpoint_engine()
    engine._copy_recovery_script = lambda path: None


def _make_checkpoint_engine() -> Any:
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class SafeCheckpointEngine(TorchCheckpointEngine):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(None)
            self.written: dict[str, str] = {}
            self.failure: str | None = None

        def save(self, state_dict: Any, path: str) -> None:
            # A failure is told in `save` below: a rank that raised here would leave the others in DeepSpeed's barrier.
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


def save(engine: Any, folder: Path, state: dict[str, Any]) -> Path:
    """Write and commit a checkpoint of this step; collective. Returns its folder.

    `state`: what state.json holds besides the RNGs; needs `step`. Raises UserError on every rank when one rank failed
    (a full disk, say); the staging folder is then gone and earlier checkpoints are untouched.
    """
    name = checkpoint_name(state["step"])
    staging, final = folder / f".{name}.staging", folder / name
    rank = dist.get_rank()
    outcome = [""]
    if rank == 0:
        try:
            shutil.rmtree(staging, ignore_errors=True)
            (staging / name).mkdir(parents=True)
        except OSError as error:
            outcome[0] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0]:
        raise UserError(f"{final}: the checkpoint was not saved: {outcome[0]}")
    engine.save_checkpoint(str(staging), tag=name, save_latest=False)
    written = engine.checkpoint_engine
    report = {"hashes": dict(written.written), "rng": _rng_state(), "failure": written.failure}
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    if rank == 0:
        try:
            outcome[0] = next((r["failure"] for r in reports if r["failure"]), "")
            if not outcome[0]:
                _commit(
                    staging,
                    final,
                    {**state, "rng": [r["rng"] for r in reports]},
                    [r["hashes"] for r in reports],
                )
        except (OSError, UserError) as error:
            outcome[0] = str(error)
        if outcome[0]:
            shutil.rmtree(staging, ignore_errors=True)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0]:
        raise UserError(f"{final}: the checkpoint was not saved: {outcome[0]}")
    return final


def _commit(staging: Path, final: Path, state: dict[str, Any], hashes: list[dict[str, str]]) -> None:
    storage.publish_json(staging / STATE, {"schema_version": SCHEMA_VERSION, **state})
    files = storage.manifest_of(staging)
    meant = {os.path.relpath(path, staging): digest for part in hashes for path, digest in part.items()}
    for name, digest in meant.items():
        if files.get(name, {}).get("sha256") != digest:
            raise UserError(f"{staging / name}: what a rank wrote did not arrive whole")
    storage.publish_json(staging / storage.MANIFEST, {"schema_version": SCHEMA_VERSION, "files": files})
    storage.publish_bytes(staging / COMMITTED, storage.sha256_file(staging / storage.MANIFEST).encode())
    storage.replace_dir(staging, final)


def load(engine: Any, checkpoint: Path, state: dict[str, Any], *, precision: str) -> None:
    """Restore weights, optimizer and this rank's RNG from a verified checkpoint; collective.

    By DeepSpeed itself, bit for bit, when the checkpoint is of the same world size, ZeRO settings and `precision`; else
    carried over by us (reshard.py). Raises UserError when it is of another model.
    """
    old = ZeroState(checkpoint / checkpoint_name(state["step"]))
    check_shapes(engine, old)
    before = {"world_size": state["world_size"], "precision": state["config"]["train"]["precision"]}
    if fits(engine, old, **before, today=precision):
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
    # Training draws no random numbers (no dropout; the data order has a seed of its own), so at another world size a rank
    # without a predecessor keeps the generator that the run's seed gave it.
    if dist.get_rank() < len(state["rng"]):
        _restore_rng(state["rng"][dist.get_rank()])


def _rng_state() -> dict[str, str]:
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
