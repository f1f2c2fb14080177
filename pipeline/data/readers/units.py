"""Units, the pieces of source files that workers read, and what reading one yields: `Text` or `Rejected`.

A small file is one unit, a huge one many:

    plain .jsonl .txt .md    byte ranges of RANGE; a record belongs to the range that holds its first byte
    compressed ones          at most MAX_PARTS parts; each decompresses the entire file (there is no random access) and keeps
                             the records that begin in its chunks: chunk i of STREAM_CHUNK decompressed bytes belongs to part
                             i % parts, so the parsing is shared, if not the decompression
    .parquet                 byte ranges of RANGE; a row group belongs to the range in which it begins
    .html, text that is split (split_at), .parquet that has to be copied first, files of unknown size    one unit

Units are numbered through the corpus and depend only on the files, never on tasks or workers: a document's ordinal (unit,
record) is its position in the corpus, the same on every run. text.py and parquet.py read them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.data.readers.sources import InputFile
from pipeline.io.urls import is_http

BLOCK = 1 << 20  # bytes read at once
SKIP = "or set data.on_bad_input=skip"
RANGE = 64 << 20
STREAM_CHUNK = 8 << 20
MAX_PARTS = 8
GROWTH = {None: 1.0, "gzip": 4.0, "bz2": 5.0, "xz": 5.5, "zstd": 5.0}  # estimated bytes of text per byte read
KIND_GROWTH = {"parquet": 2.5, "html": 0.2}
RECORD_BITS = 32


@dataclass(frozen=True)
class Unit:
    """Part `part` of `parts` of a file. `size`: estimated bytes of text, for even tasks and for progress."""

    number: int
    file: InputFile
    part: int
    parts: int
    size: int

    def document_id(self, record: int) -> str:
        """A document's id: its source, file and record, independent of where the corpus is stored. Record 0 is a file that
        is one document."""
        if record == 0:
            return self.file.name
        part = f"[{self.part}]" if self.parts > 1 else ""
        return f"{self.file.name}{part}#{record}"


def plan_units(files: Iterable[InputFile]) -> list[Unit]:
    """The units of these files: files in order, each cut into its parts."""
    units: list[Unit] = []
    for file in files:
        parts, size = _parts(file), _text_size(file)
        units += [Unit(len(units) + part, file, part, parts, size // parts) for part in range(parts)]
    return units


def deal(units: Iterable[Unit], tasks: int) -> list[list[Unit]]:
    """Assign units to tasks, the largest first to the least loaded: even tasks, the same on every machine. A task's units
    are in order."""
    plan: list[list[Unit]] = [[] for _ in range(tasks)]
    load = [(0, rank) for rank in range(tasks)]
    for unit in sorted(units, key=lambda unit: (-unit.size, unit.number)):
        size, rank = heapq.heappop(load)
        plan[rank].append(unit)
        heapq.heappush(load, (size + unit.size + 1, rank))
    return [sorted(share, key=lambda unit: unit.number) for share in plan]


def deal_by_source(units: Iterable[Unit], tasks: int) -> list[list[Unit]]:
    """As `deal`, but every task has units of one source (`data.separate_sources`): each source gets tasks by its size, at least
    one, so there can be more than `tasks`."""
    by_source: dict[int, list[Unit]] = {}
    for unit in units:
        by_source.setdefault(unit.file.source, []).append(unit)
    sizes = {source: sum(unit.size for unit in own) for source, own in by_source.items()}
    per_task = max(1, sum(sizes.values())) / tasks
    return [
        share
        for source, own in sorted(by_source.items())
        for share in deal(own, max(1, min(round(sizes[source] / per_task), len(own))))
    ]


def ordinal(unit_number: int, record: int) -> int:
    """A document's position in the corpus: larger is later. Fits in 64 bits."""
    assert 0 <= record < 1 << RECORD_BITS, record
    return unit_number << RECORD_BITS | record


def split_ordinal(ordinal: int) -> tuple[int, int]:
    """(unit number, record)."""
    return ordinal >> RECORD_BITS, ordinal & ((1 << RECORD_BITS) - 1)


def unit_as_dict(unit: Unit) -> dict[str, Any]:
    """For JSON."""
    return asdict(unit)


def unit_from_dict(tree: dict[str, Any]) -> Unit:
    """The inverse of `unit_as_dict`."""
    file = tree["file"]
    return Unit(**{**tree, "file": InputFile(**{**file, "state": tuple(file["state"])})})


def _text_size(file: InputFile) -> int:
    return int(file.size * GROWTH[file.compression] * KIND_GROWTH.get(file.kind, 1.0))


def is_copied(file: InputFile) -> bool:
    """Whether a file is copied to a temporary file before it is read: parquet without random access."""
    return file.kind == "parquet" and (file.compression is not None or is_http(file.url))


def _parts(file: InputFile) -> int:
    if file.kind not in ("jsonl", "text", "parquet") or file.split_at is not None:
        return 1
    if file.compression is None:
        return 1 if is_copied(file) else max(1, -(-file.size // RANGE))
    return 1 if file.kind == "parquet" else min(MAX_PARTS, max(1, -(-_text_size(file) // RANGE)))


@dataclass(frozen=True)
class Text:
    """A document as read. `record`: its number in the unit, increasing; 0 for a file that is one document."""

    record: int
    text: str


@dataclass(frozen=True)
class Rejected:
    """Input that yields no document. `reason`: what it is counted under. `message`: the error with where, what, and the fix.
    `record`: as in Text; None if it concerns the entire file."""

    record: int | None
    reason: str
    where: str
    problem: str

    @property
    def message(self) -> str:
        return f"{self.where}: {self.problem}"


def too_long(limit: int) -> str:
    """The problem and fix for input longer than `limit` bytes."""
    return f"longer than {limit / 1e6:g} MB; raise data.max_document_megabytes, split it {SKIP}"


def some_names(names: object) -> str:
    """Names for an error message, sorted, on one line: the first twelve, each at most 40 characters."""
    assert isinstance(names, (dict, list))
    shown = [repr(name[:40])[1:-1] for name in sorted(names)[:12]]
    return ", ".join(shown) + (", ..." if len(names) > 12 else "")
