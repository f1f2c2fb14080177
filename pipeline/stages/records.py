"""Output files of a stage: size, time and sha256 of each, and whether they are unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.io import remote, storage
from pipeline.io.urls import is_local, join

Facts = tuple[int, int, str]  # size, time of the last change (ns; 0 of remote files), sha256


def facts_of(path: Path) -> Facts:
    """The facts of a local file."""
    return path.stat().st_size, path.stat().st_mtime_ns, storage.sha256_file(path)


def remote_outputs(folder: str) -> dict[str, Facts]:
    """The files that an index in an object store lists, and the index itself; only the index is read."""
    url = join(folder, "index.json")
    index = storage.read_json(url)
    listed = [*index["shards"], *index.get("removed", []), *([index["tokenizer"]] if "tokenizer" in index else [])]
    files = {join(folder, file["name"]): (file["bytes"], 0, file["sha256"]) for file in listed}
    return {**files, url: (remote.size_of(url), 0, storage.sha256_file(url))}


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
