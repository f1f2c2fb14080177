"""Records of finished stages, and their output files: size, time and sha256 of each, and whether they are unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from pipeline.config.paths import RunPaths
from pipeline.errors import UserError
from pipeline.io import remote, storage
from pipeline.io.sealed import read_sealed
from pipeline.io.urls import is_local, join

if TYPE_CHECKING:
    from pipeline.stages.table import Stage

SCHEMA_VERSION = 2
# What of a result identifies a stage's output to the stages after it.
IDENTITY = ("fingerprint", "sha256", "checkpoint", "run_id", "weights_sha256", "g_lm_sha256", "certificate_sha256")
FREE = ("outputs",)  # of a record: not in its digest, but compared with the files
Facts = tuple[int, int, str]  # size, time of the last change (ns; 0 of remote files), sha256


def facts_of(path: Path) -> Facts:
    """The facts of a local file."""
    return path.stat().st_size, path.stat().st_mtime_ns, storage.sha256_file(path)


def are_outputs(value: Any) -> TypeGuard[dict[str, Facts]]:
    """Whether this is what a record has of its output files: facts by name."""
    return isinstance(value, dict) and all(
        isinstance(facts, list) and [type(fact) for fact in facts] == [int, int, str] for facts in value.values()
    )


def record_file(paths: RunPaths, stage: str) -> Path:
    """Where a stage's record is."""
    return paths.stages / f"{stage}.json"


def record_of(paths: RunPaths, stage: Stage) -> dict[str, Any] | None:
    """What a finished stage left, None when it has not finished."""
    file = record_file(paths, stage.name)
    if not file.exists():
        return None
    try:
        record = read_sealed(file, schema_version=SCHEMA_VERSION, free=FREE)
    except (UserError, OSError):  # damaged, or of another version: the stage is done again
        return None
    complete = isinstance(record.get("inputs"), str) and isinstance(record.get("result"), dict)
    complete = complete and are_outputs(record.get("outputs")) and record.get("stage", stage.name) == stage.name
    return record if complete and all(key in record["result"] for key in stage.needs) else None


def identity(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says its stage's output is."""
    return {key: record["result"][key] for key in IDENTITY if key in record["result"]}


def remote_outputs(folder: str) -> dict[str, Facts]:
    """The files that an index in an object store lists, and the index itself; only the index is read."""
    url = join(folder, "index.json")
    index = storage.read_json(url)
    listed = [*index["shards"], *index.get("removed", []), *([index["tokenizer"]] if "tokenizer" in index else [])]
    files = {join(folder, file["name"]): (file["bytes"], 0, file["sha256"]) for file in listed}
    return {**files, url: (remote.size_of(url), 0, storage.sha256_file(url))}


def require_as_recorded(paths: RunPaths, stage: str) -> None:
    """Raise UserError naming an output of a run's stage that was changed since. Without a record nothing is known."""
    file = record_file(paths, stage)
    outputs = read_sealed(file, free=FREE).get("outputs") if file.exists() else {}
    if not are_outputs(outputs):
        raise UserError(f"{file}: damaged; run `pldr {stage} CONFIG` again")
    if changed := first_changed(outputs, paths.root, thorough=True):
        raise UserError(f"{paths.root / changed}: changed since `pldr {stage}` wrote it; run that again")


def first_changed(outputs: Mapping[str, Facts], root: Path, *, thorough: bool) -> str | None:
    """The first output that was changed since. A file with the same size and time is hashed only when `thorough`; of remote
    files only the index is hashed (`pldr data verify` reads them all). Names are relative to `root`, or URLs."""
    for name, (size, mtime_ns, sha256) in outputs.items():
        if not is_local(name):
            if not _remote_is(name, size, sha256):
                return name
            continue
        path = root / name
        if not path.is_file() or path.stat().st_size != size:
            return name
        if (thorough or path.stat().st_mtime_ns != mtime_ns) and storage.sha256_file(path) != sha256:
            return name
    return None


def _remote_is(url: str, size: int, sha256: str) -> bool:
    """Whether a remote file exists with its size and, for an index, its hash."""
    try:
        return remote.size_of(url) == size and (not url.endswith("/index.json") or storage.sha256_file(url) == sha256)
    except FileNotFoundError:
        return False
