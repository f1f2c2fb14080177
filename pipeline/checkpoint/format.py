"""Committed checkpoints, for those who read them: training on resume, the stages, consolidation.

What has no COMMITTED does not exist. A checkpoint is a folder `checkpoints/step-000500/`:

    step-000500/    DeepSpeed's own files (its "tag"), written by every rank
    state.json      step, sequences and tokens consumed, RNG of each rank, config, data fingerprint, MLflow run
    MANIFEST.json   sha256 and size of every file above
    COMMITTED       the sha256 of MANIFEST.json, written last

DeepSpeed's files are pickles by format. They are unpickled here only inside `safe_unpickling`, so that a checkpoint which
somebody hands us can hold tensors, numbers and DeepSpeed's plain record types, but no code.
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

SCHEMA_VERSION = 1
COMMITTED = "COMMITTED"
STATE = "state.json"
TRAINING_LOCK = "training.lock"  # in logs/; rank 0 of a training job holds it
_NAME = re.compile(r"step-(\d{6,})")
_RENAMED = re.compile(r"\.(step-\d{6,})\.(?:staging|[0-9a-f]{8}\.old)")  # a whole one, before or after it had its name
log = logging.getLogger(__name__)


def checkpoint_name(step: int) -> str:
    """`step-000500`: the folder's name and DeepSpeed's tag."""
    return f"step-{step:06d}"


def committed(folder: Path) -> list[Path]:
    """The committed checkpoints of a folder, oldest first. Anything else in it is ignored."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / COMMITTED).is_file()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match.group(1))


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of this name can be a checkpoint."""
    return _NAME.fullmatch(name) is not None


def clean(folder: Path) -> None:
    """Remove what a killed save, download or removal left behind. What was set aside stays.

    A checkpoint replaced by one of its step is renamed, then the new one (`storage.replace_dir`). A kill between the two
    leaves no committed folder of that name: the new one, or else the old one, gets it back when it is whole.
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
                log.warning("%s: a killed start had finished it; it has its name back", folder / match[1])
                continue
        shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove checkpoints without COMMITTED: halves of a removal. A save that goes on is in a hidden folder and stays."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and _NAME.fullmatch(path.name) and not (path / COMMITTED).is_file():
            shutil.rmtree(path, ignore_errors=True)


def set_aside(checkpoint: Path, why: str = "damaged") -> None:
    """Rename a checkpoint that is not to be used to `.WHY-step-…`: nothing takes it for one, nothing is deleted."""
    target = checkpoint.with_name(f".{why}-{checkpoint.name}")
    shutil.rmtree(target, ignore_errors=True)
    checkpoint.rename(target)


def verify(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint that is whole. Raises UserError naming the first file that is not as it was written."""
    if not (checkpoint / COMMITTED).is_file():
        raise UserError(
            f"{checkpoint}: no COMMITTED file, so this checkpoint was never finished; name an older one or train on"
        )
    sealed = (checkpoint / COMMITTED).read_bytes().decode(errors="replace").strip()
    if not (checkpoint / storage.MANIFEST).is_file() or storage.sha256_file(checkpoint / storage.MANIFEST) != sealed:
        raise UserError(
            f"{checkpoint / storage.MANIFEST}: sha256 differs from COMMITTED: damaged; name another checkpoint"
        )
    manifest = storage.read_json(checkpoint / storage.MANIFEST, schema_version=SCHEMA_VERSION)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {"sha256", "size"} <= entry.keys() for entry in files.values()
    ):
        raise UserError(f"{checkpoint / storage.MANIFEST}: lists no files; it was damaged: name another checkpoint")
    storage.verify_manifest(checkpoint, files)
    for path in sorted(checkpoint.rglob("*.pt")):  # DeepSpeed globs for them: an unlisted one would be merged
        if str(path.relative_to(checkpoint)) not in files:
            raise UserError(f"{path}: not listed in {storage.MANIFEST}; remove it or name another checkpoint")
    state = storage.read_json(checkpoint / STATE, schema_version=SCHEMA_VERSION)
    if not isinstance(state.get("config"), dict) or not isinstance(state.get("step"), int):
        raise UserError(f"{checkpoint / STATE}: holds no run config or no step; name another checkpoint")
    assert isinstance(state, dict)
    return state


def model_of(state: dict[str, Any]) -> Any:
    """The configuration of the model whose weights a checkpoint holds, as plain values: of a run that has frozen its G
    (train/freeze.py) the one with a constant or trained G."""
    model = state["config"].get("model")
    if state.get("frozen") is None or not isinstance(model, dict):
        return model
    trained = state["config"]["train"]["freeze_g"]["become"] == "parameter"
    source = "constant" if trained else "file"
    return {**model, "g_source": source, "g_start": "paper", "g_file": None, "dag_coefficients": [0.0, 0.0, 0.0]}


def adopt(checkpoint: Path, folder: Path, *, mlflow_run_id: str) -> Path:
    """Take a verified checkpoint of another run into `folder` as one of this run, committed. Large files are linked, or
    copied where the disk is another: a checkpoint's files are never written again."""

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
        raise UserError(
            f"{folder}: {checkpoint} could not be copied: {error}; free some space or mend the disk"
        ) from error
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
