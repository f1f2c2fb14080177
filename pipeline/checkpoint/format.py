"""The format of a checkpoint, for everything that reads one: training on resume, the stages, consolidation.

A checkpoint without COMMITTED is ignored. A checkpoint is a folder `checkpoints/step-000500/`:

    step-000500/    DeepSpeed's own files (its "tag"), written by every rank
    state.json      step, sequences and tokens consumed, RNG of each rank, config, data fingerprint, MLflow run
    MANIFEST.json   sha256 and size of every file above
    COMMITTED       the sha256 of MANIFEST.json, written last

DeepSpeed's files are pickles. They are read only by `safe_load` (deepspeed_files.py), so that a checkpoint from somebody else
can hold tensors, numbers and DeepSpeed's plain record types, but cannot execute code.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.io import storage
from pldr_model.config import ModelConfig, frozen_g_changes

MANIFEST_SCHEMA_VERSION = 1
STATE_SCHEMA_VERSION = 2
COMMITTED = "COMMITTED"
STATE = "state.json"
# What a checkpoint has on disk: fp32 weights (masters) and two Adam moments are 12 bytes, the model's own weights up to 4;
# 1 is for DeepSpeed's records and the padding of partitions.
BYTES_PER_PARAMETER = 17
TRAINING_LOCK = "training.lock"  # in logs/; rank 0 of a training job holds it
_NAME = re.compile(r"step-(\d{6,})")
_RENAMED = re.compile(
    r"\.(step-\d{6,})\.(?:staging|[0-9a-f]{8}\.old)"
)  # a committed one, before or after it had its name
log = logging.getLogger(__name__)


def checkpoint_name(step: int) -> str:
    """`step-000500`: the folder's name and DeepSpeed's tag."""
    return f"step-{step:06d}"


def checkpoint_bytes(model: ModelConfig) -> int:
    """How large a checkpoint of this model is, an upper estimate for checks of free space."""
    return BYTES_PER_PARAMETER * model.num_parameters()["total"]


def committed(folder: Path) -> list[Path]:
    """The committed checkpoints of a folder, oldest first. Anything else in it is ignored."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / COMMITTED).is_file()]
    return sorted(found, key=step_of)


def newest_in(path: Path) -> Path | None:
    """The newest committed checkpoint that a path leads to: itself, or in a folder of them, or in a run directory."""
    if _NAME.fullmatch(path.name):
        return path if (path / COMMITTED).is_file() else None
    found = sorted([*committed(path), *committed(path / "checkpoints")], key=step_of)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match.group(1))


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of this name can be a checkpoint."""
    return _NAME.fullmatch(name) is not None


def clean(folder: Path) -> None:
    """Remove what a killed save, download or removal left behind. Checkpoints that were set aside stay.

    To replace a checkpoint by a new one of the same step, the old one is renamed, then the new one (`storage.replace_dir`).
    A kill between the two leaves no committed folder of that name: it is given to the new one, or else to the old one, if
    that is intact.
    """
    if not folder.is_dir():
        return
    remove_unfinished(folder)
    hidden = [path for path in folder.iterdir() if path.name.startswith(".step-") and path.is_dir()]
    for path in sorted(hidden, key=lambda path: (not path.name.endswith(".staging"), path.name)):
        match = _RENAMED.fullmatch(path.name)
        if match is not None and (path / COMMITTED).is_file() and not (folder / match[1]).exists():
            with contextlib.suppress(UserError):
                verify(path)
                path.rename(folder / match[1])
                storage.fsync_dir(folder)
                log.warning(
                    "%s: recovered; the process that saved it was killed before its last rename", folder / match[1]
                )
                continue
        shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove checkpoints without COMMITTED, which a killed removal left. A save in progress is in a hidden folder and stays."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and _NAME.fullmatch(path.name) and not (path / COMMITTED).is_file():
            shutil.rmtree(path, ignore_errors=True)


def set_aside(checkpoint: Path, why: str = "damaged") -> None:
    """Rename a checkpoint that must not be used to `.WHY-step-…`: it is ignored from then on, and not deleted."""
    target = checkpoint.with_name(f".{why}-{checkpoint.name}")
    shutil.rmtree(target, ignore_errors=True)
    checkpoint.rename(target)


def verify(checkpoint: Path) -> dict[str, Any]:
    """Check a checkpoint; returns its `state.json`. Raises UserError naming the first file that is damaged or missing."""
    there = (checkpoint / COMMITTED).is_file()
    try:
        return _verify(checkpoint)
    except (UserError, FileNotFoundError) as error:
        if there and not (checkpoint / COMMITTED).is_file():
            raise removed(checkpoint) from error
        if isinstance(error, UserError):
            raise
        raise UserError(f"{error.filename or checkpoint}: is gone; name another checkpoint") from error


def removed(checkpoint: Path) -> UserError:
    """The error of whoever reads a checkpoint that its own run removes meanwhile, as its retention says."""
    return UserError(
        f"{checkpoint}: was removed while it was read, because its run is still training; name a newer one, or one that is "
        "kept (train.keep_checkpoints, train.keep_every)"
    )


def _verify(checkpoint: Path) -> dict[str, Any]:
    if not (checkpoint / COMMITTED).is_file():
        raise UserError(
            f"{checkpoint}: no COMMITTED file, so this checkpoint was never finished; name an older one or resume without it"
        )
    sealed = (checkpoint / COMMITTED).read_bytes().decode(errors="replace").strip()
    if not (checkpoint / storage.MANIFEST).is_file() or storage.sha256_file(checkpoint / storage.MANIFEST) != sealed:
        raise UserError(
            f"{checkpoint / storage.MANIFEST}: sha256 differs from COMMITTED: damaged; name another checkpoint"
        )
    manifest = storage.read_json(checkpoint / storage.MANIFEST, schema_version=MANIFEST_SCHEMA_VERSION)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {"sha256", "size"} <= entry.keys() for entry in files.values()
    ):
        raise UserError(f"{checkpoint / storage.MANIFEST}: lists no files; it was damaged: name another checkpoint")
    storage.verify_manifest(checkpoint, files)
    for path in sorted(checkpoint.rglob("*.pt")):  # DeepSpeed globs for them and would merge an unlisted one
        if str(path.relative_to(checkpoint)) not in files:
            raise UserError(f"{path}: not listed in {storage.MANIFEST}; remove it or name another checkpoint")
    state = read_state(checkpoint)
    if not isinstance(state.get("config"), dict) or not isinstance(state.get("step"), int):
        raise UserError(f"{checkpoint / STATE}: holds no run config or no step; name another checkpoint")
    return state


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` with today's keys, unchecked otherwise. Raises UserError when its schema is unknown."""
    state = storage.read_json(checkpoint / STATE)
    version = state.get("schema_version") if isinstance(state, dict) else None
    if version not in (1, STATE_SCHEMA_VERSION):
        raise UserError(
            f"{checkpoint / STATE}: schema_version {version!r}, this program reads 1 and {STATE_SCHEMA_VERSION}; "
            "name another checkpoint"
        )
    if "calm_evaluations" in state:  # its name in schema 1; the first checkpoints do not have it
        state["evaluations_below"] = state.pop("calm_evaluations")
    return {**state, "schema_version": STATE_SCHEMA_VERSION}


def model_of(state: dict[str, Any]) -> Any:
    """The configuration of the model whose weights a checkpoint holds, as plain values: the frozen one after a freeze of G
    (pipeline/train/freeze.py)."""
    model = state["config"].get("model")
    if state.get("frozen") is None or not isinstance(model, dict):
        return model
    changes = frozen_g_changes(state["config"]["train"]["freeze_g"]["become"])
    return {**model, **changes, "dag_coefficients": list(changes["dag_coefficients"])}


def adopt(checkpoint: Path, folder: Path, *, mlflow_run_id: str) -> Path:
    """Make a verified checkpoint of another run a committed one of this run, in `folder`. Files are linked, or copied to
    another disk: a checkpoint's files are never written again."""

    def link_or_copy(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

    staging = folder / f".{checkpoint.name}.adopted"  # removed by `clean` when this is killed
    shutil.rmtree(staging, ignore_errors=True)
    try:
        shutil.copytree(checkpoint, staging, copy_function=link_or_copy)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(staging, ignore_errors=True)
        if not (checkpoint / COMMITTED).is_file():
            raise removed(checkpoint) from error
        raise UserError(
            f"{folder}: {checkpoint} could not be copied: {error}; free some space or fix the disk"
        ) from error
    if not _is_complete(staging):
        shutil.rmtree(staging, ignore_errors=True)
        raise removed(checkpoint)
    (staging / COMMITTED).unlink()
    state, manifest = storage.read_json(staging / STATE), storage.read_json(staging / storage.MANIFEST)
    storage.publish_json(staging / STATE, {**state, "mlflow_run_id": mlflow_run_id})
    manifest["files"][STATE] = {
        "sha256": storage.sha256_file(staging / STATE),
        "size": (staging / STATE).stat().st_size,
    }
    storage.publish_json(staging / storage.MANIFEST, manifest)
    storage.publish_bytes(staging / COMMITTED, storage.sha256_file(staging / storage.MANIFEST).encode())
    storage.replace_dir(staging, folder / checkpoint.name)
    return folder / checkpoint.name


def _is_complete(copy: Path) -> bool:
    """Whether every file of a checkpoint was still there when it was copied."""
    if not (copy / COMMITTED).is_file() or not (copy / storage.MANIFEST).is_file():
        return False
    return all((copy / name).is_file() for name in storage.read_json(copy / storage.MANIFEST)["files"])
