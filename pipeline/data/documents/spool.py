"""The spool of documents between the jobs of stage `shard`, and the records of what was left out.

    spool/{rank:05d}.jsonl.zst    a task's documents in order, one JSON per line
    removed/{rank:05d}.jsonl.zst  what was removed or cut, with step and reason, one JSON per line

Duplicates are known only after the entire corpus has been read, so cleaned documents are written once, duplicates are lists of
ordinals, and the last job reads the spool without them. Files are zstd (level 1: about as fast as the disk) and are deleted
when the stage is done.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson
import zstandard
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from pipeline.data.dedup.exact import keys_file, normalized
from pipeline.data.executor.markers import write_record
from pipeline.data.executor.progress import advance
from pipeline.data.readers.units import split_ordinal, unit_from_dict
from pipeline.io.storage import publish, read_json, sha256_file

EXCERPTS = 10  # per reason and task
EXCERPT_CHARACTERS = 300
LEVEL = 1


class WriteSpool(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """The last step of the cleaning job: writes the task's record, and its documents to `job/spool`, each with `key`, the hash
    that decides its split.

    The key is computed before duplicates are cut, so equal texts stay in one split whatever is cut later.
    keys: folder of the exact keys that an earlier step published, if any. removed: names of the steps that record removals.
    """

    type = "WRITER"
    name = "spool"

    def __init__(self, job: Path, *, keys: Path | None, removed: list[str]) -> None:
        super().__init__()
        self.job = job
        self.keys = keys
        self.removed = removed

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        def write(temporary: Path) -> None:
            with open(temporary, "wb") as raw, zstandard.ZstdCompressor(LEVEL).stream_writer(raw) as stream:
                for document in data:
                    document.metadata["key"] = split_key(document.text)
                    line = {"text": document.text, "id": document.id, "metadata": document.metadata}
                    stream.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

        publish(spool_file(self.job / "spool", rank), write)
        files = [spool_file(self.job / "spool", rank)]
        files += [keys_file(self.keys, rank)] if self.keys else []
        files += [part for step in self.removed if (part := _part(self.job / "removed", rank, step)).is_file()]
        write_record(self.job, rank, {}, {str(path.relative_to(self.job)): facts_of(path) for path in files})
        yield from ()


class ReadSpool(PipelineStep):  # type: ignore[misc]
    """The documents of a task's spool, in order."""

    type = "READER"
    name = "spool"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for line in read_lines(spool_file(self.folder, rank)):
            yield Document(**orjson.loads(line))
            advance(1, len(line))


def spool_file(folder: Path, rank: int) -> Path:
    """The path of a task's spool (or list of removed documents)."""
    return folder / f"{rank:05d}.jsonl.zst"


def split_key(text: str) -> str:
    """Hex sha256 of the normalized text, which decides the split. It is the same for texts that differ only in case, width or
    white space."""
    return hashlib.sha256(normalized(text).encode("utf-8")).hexdigest()


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a zstd file, streamed."""
    with open(path, "rb") as raw:
        yield from io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), 1 << 20)


class RemovedWriter:
    """An `exclusion_writer` for datatrove's filters: writes the removals of one step and task to one file.

    units: JSON list of all units, from which the kept document of a duplicate is named.
    """

    def __init__(self, folder: Path, step: str, *, units: Path | None = None) -> None:
        self.folder = folder
        self.step = step
        self.units = units
        self._names: list[Any] | None = None
        self._stream: io.BufferedWriter | None = None
        self._seen: Counter[str] = Counter()

    def __enter__(self) -> RemovedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream, self._seen = None, Counter()

    def write(self, document: Document, rank: int = 0) -> None:
        """Record a document that is left out (or a passage that is cut); its metadata has the reason."""
        reason = document.metadata.get("filter_reason", self.step)
        record: dict[str, Any] = {"id": document.id, "step": self.step, "reason": reason}
        record["source"] = document.metadata.get("source")
        for known in ("detail", "message", "part"):
            if known in document.metadata:
                record[known] = document.metadata[known]
        if "keeper" in document.metadata:
            record["keeper"] = self._name_of(document.metadata["keeper"])
        if self._seen[reason] < EXCERPTS:
            self._seen[reason] += 1
            record["excerpt"] = document.text[:EXCERPT_CHARACTERS]
        if self._stream is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stream = open(_part(self.folder, rank, self.step), "wb")  # noqa: SIM115 - closed in __exit__
        self._stream.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

    def _name_of(self, ordinal: int) -> str:
        if self._names is None:
            assert self.units is not None
            self._names = [unit_from_dict(tree) for tree in read_json(self.units)]
        number, record = split_ordinal(ordinal)
        name: str = self._names[number].document_id(record)
        return name


def merge_removed(target: Path, parts: Iterable[tuple[Path, int, str]]) -> int:
    """Write the removals in `parts` (folder, rank, step), in that order, to one zstd file; returns the number of records."""
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        with open(temporary, "wb") as raw, zstandard.ZstdCompressor(3).stream_writer(raw) as stream:
            for folder, rank, step in parts:
                path = _part(folder, rank, step)
                if path.is_file():
                    with open(path, "rb") as lines:
                        for line in lines:
                            stream.write(line)
                            count += 1

    publish(target, write)
    return count


def facts_of(path: Path) -> dict[str, Any]:
    """{"sha256", "size"} of a file, for a task's record."""
    return {"sha256": sha256_file(path), "size": path.stat().st_size}


def _part(folder: Path, rank: int, step: str) -> Path:
    return folder / f"{rank:05d}.{step}.jsonl"
