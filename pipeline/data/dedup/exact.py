"""Finding duplicates in corpora larger than memory: keys are sorted on disk and compared one range of hashes at a time.

    keys/{rank:05d}.npy             a task's keys, sorted: hash (two numbers), ordinal[, number of the paragraph]
    found/{b:05d}-of-{B:05d}.npy    what range b of the hashes removes, sorted: ordinal[, paragraph], ordinal of the kept one

The same steps find exact duplicates (a key is the hash of the normalized text), near-duplicates (near.py: hashes of bands) and
repeated paragraphs (paragraphs.py). Of equal keys the one with the smallest ordinal is kept. Ordinals follow the sources, so
the result does not depend on the number or order of tasks and workers, or on restarts. Tables are sorted externally
(sorted_rows.py) and searched by binary search; no step holds all keys or all removals in memory.

Hashes have 128 bits: among 10**10 texts, two that differ share one with a chance of 10**20 / 2**129, about 1 in 10**19.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.typeshelper import StatHints

from pipeline.data.dedup.sorted_rows import MEMORY, Lookup, Rows, TableWriter, merge, run_of
from pipeline.data.executor.markers import write_record
from pipeline.data.normal_form import normalize

HASHES = 2**64  # number of values of the first half of a hash
HASH_COLUMNS = 2
KEYS_A_PARTITION = 8_000_000  # about 200 MB read by one FindDuplicates task
MAX_PARTITIONS = 256  # tables that DropDuplicates opens


def normalized(text: str) -> str:
    """The form in which texts are compared: NFKC, case folded, runs of white space as one space, none at the ends."""
    if text.isascii():
        return " ".join(text.lower().split())
    folded = normalize("NFKC", text).casefold()
    return " ".join(normalize("NFKC", folded).split())  # folding can undo the normal form


def text_hash(text: str) -> bytes:
    """128 bits of BLAKE2b over the UTF-8 of a normalized text."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def key_row(hash128: bytes, *numbers: int) -> bytes:
    """One row of a keys table."""
    return hash128 + b"".join(number.to_bytes(8, "little") for number in numbers)


def keys_file(folder: Path, rank: int) -> Path:
    """The table of a task's keys."""
    return folder / f"{rank:05d}.npy"


def count_keys(folder: Path) -> int:
    """Number of keys of all tasks, from the headers of their tables."""
    return sum(run_of(path).rows for path in _keys_files(folder))


def partitions(keys_total: int) -> int:
    """Number of tasks that share the search. Neither the result nor the memory depends on it."""
    return min(MAX_PARTITIONS, max(1, -(-keys_total // KEYS_A_PARTITION)))


def found_file(folder: Path, rank: int, world_size: int) -> Path:
    """The table of removals for one range of hashes."""
    return folder / f"{rank:05d}-of-{world_size:05d}.npy"


def found_files(folder: Path) -> list[Path]:
    """The tables of all ranges, which must be complete."""
    present = set(folder.glob("*-of-*.npy"))
    expected = [found_file(folder, rank, len(present)) for rank in range(len(present))]
    assert present and present == set(expected), (
        f"{folder}: incomplete set of tables: {sorted(path.name for path in present)}"
    )
    return expected


class ExactKeys(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """Passes documents through and records the hash of each; publishes `keys_file(folder, rank)` after the last one."""

    type = "DEDUP"
    name = "exact_keys"

    def __init__(self, folder: Path, memory: int = MEMORY) -> None:
        super().__init__()
        self.folder = folder
        self.memory = memory

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with TableWriter(keys_file(self.folder, rank), HASH_COLUMNS + 1, self.memory) as table:
            for document in data:
                self.stat_update(StatHints.total)
                table.append(key_row(text_hash(normalized(document.text)), document.metadata["ordinal"]))
                yield document
            table.publish()


class KeysStep(PipelineStep):  # type: ignore[misc]
    """The last step of a job: consumes the documents and publishes their keys and the task's record.

    Subclasses define the keys of a document.
    """

    type = "DEDUP"
    columns = HASH_COLUMNS + 1

    def __init__(self, folder: Path, work: Path, memory: int = MEMORY) -> None:
        super().__init__()
        self.folder = folder
        self.work = work
        self.memory = memory

    def keys(self, document: Document) -> bytes:
        """A document's rows in the table of keys, as bytes."""
        raise NotImplementedError

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        path = keys_file(self.folder, rank)
        with TableWriter(path, self.columns, self.memory) as table:
            for document in data:
                self.stat_update(StatHints.total)
                table.append(self.keys(document))
            facts = table.publish()
            write_record(self.work, rank, {"keys": table.rows}, {path.name: facts})
        yield from ()


class FindDuplicates(PipelineStep):  # type: ignore[misc]
    """Task b of B searches the b-th range of hashes: of rows with equal hashes it keeps the first and lists the others.

    keys: folder of the tables of keys. found: folder for the lists.
    """

    type = "DEDUP"
    name = "find_duplicates"

    def __init__(self, keys: Path, found: Path, work: Path, memory: int = MEMORY) -> None:
        super().__init__()
        self.keys = keys
        self.found = found
        self.work = work
        self.memory = memory

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        first, last = (HASHES * part // world_size for part in (rank, rank + 1))
        runs = [run_of(path, first, last) for path in _keys_files(self.keys)]
        path = found_file(self.found, rank, world_size)
        with TableWriter(path, runs[0].columns - HASH_COLUMNS + 1, self.memory) as table:
            for rows in _repeats(merge(runs, self.memory)):
                self.stat_update("duplicates", value=len(rows))
                table.append(rows)
            facts = table.publish()
            write_record(self.work, rank, {"duplicates": table.rows}, {path.name: facts})
        yield from ()


class DropDuplicates(BaseFilter):  # type: ignore[misc]
    """Drops the documents listed in `found` and sets `metadata["keeper"]` to the ordinal of the kept one.

    reason: "exact_duplicate" or "near_duplicate". Documents must come in the order of their ordinals, as tasks read them.
    """

    type = "DEDUP"

    def __init__(self, found: Path, reason: str, exclusion_writer: Any = None) -> None:
        self.name = f"{reason}s"
        super().__init__(exclusion_writer)
        self.found = found
        self.reason = reason
        self._lookup: Lookup | None = None

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self._lookup = Lookup(found_files(self.found))
        yield from super().run(data, rank, world_size)
        self._lookup = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        assert self._lookup is not None
        for (keeper,) in self._lookup.rows(doc.metadata["ordinal"]):
            doc.metadata["keeper"] = keeper
            return False, self.reason
        return True


def _repeats(pieces: Iterable[Rows]) -> Iterator[Rows]:
    """From rows sorted by (hash, ordinal, ...): those whose hash occurred before, as (ordinal, ..., first ordinal)."""
    kept: Rows | None = None  # the first row of the hash the last piece ended with
    for piece in pieces:
        rows = piece if kept is None else np.concatenate([kept, piece])
        changes = (rows[1:, :HASH_COLUMNS] != rows[:-1, :HASH_COLUMNS]).any(axis=1)
        is_first = np.append(True, changes)
        firsts = np.maximum.accumulate(np.where(is_first, np.arange(len(rows)), 0))
        kept = rows[firsts[-1] : firsts[-1] + 1]
        repeats = ~is_first
        keepers = rows[firsts[repeats], HASH_COLUMNS]
        yield np.column_stack([rows[repeats, HASH_COLUMNS:], keepers])


def _keys_files(folder: Path) -> list[Path]:
    present = set(folder.glob("[0-9]*.npy"))
    expected = [keys_file(folder, rank) for rank in range(len(present))]
    assert present and present == set(expected), f"{folder}: tables of some tasks are missing"
    return expected
