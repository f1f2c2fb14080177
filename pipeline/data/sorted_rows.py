"""Sorted tables of numbers on disk, of any length, made and read in bounded memory: what finding duplicates rests on.

A table is an .npy file of uint64 [rows, columns] with its rows in lexicographic order, so equal content is equal bytes
whoever wrote it, in whatever order and with however little memory. It is an external merge sort: rows are sorted in runs
of `memory` bytes, runs are merged window by window. Nothing grows with the number of rows, nor with how often one value
comes: a boilerplate paragraph that a billion documents share is only a long stretch of equal hashes.
"""

from __future__ import annotations

import heapq
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.storage import publish, sha256_file

Rows = npt.NDArray[np.uint64]

NUMBER = np.dtype("<u8")
MEMORY = 64 << 20  # bytes of rows at once; sorting them needs about three times as much


def sort_rows(rows: Rows) -> Rows:
    """Rows [n, columns] in lexicographic order.

    The first column decides nearly always (it is half of a hash, or unique), and sorting by one column is several times
    as fast as by all: only rows which share their first number are compared further.
    """
    ordered: Rows = rows[np.argsort(rows[:, 0], kind="stable")]
    same = ordered[1:, 0] == ordered[:-1, 0]
    if same.any():
        tied = np.append(same, False) | np.append(False, same)
        among: Rows = ordered[tied]
        ordered[tied] = among[np.lexsort(among.T[::-1])]
    return ordered


@dataclass(frozen=True)
class Run:
    """Sorted rows that lie in a row in a file: `source` is a path, or the number of an open file."""

    source: Path | int
    offset: int  # of the first row, in bytes
    rows: int
    columns: int

    def read(self, start: int, count: int) -> Rows:
        """Up to `count` rows from row `start`. A path is opened for this only: thousands of runs are no open files."""
        count = min(count, self.rows - start)
        width = self.columns * NUMBER.itemsize
        handle = self.source if isinstance(self.source, int) else os.open(self.source, os.O_RDONLY)
        try:
            data = os.pread(handle, count * width, self.offset + start * width)
        finally:
            if not isinstance(self.source, int):
                os.close(handle)
        assert len(data) == count * width, f"{self.source}: cut"
        return np.frombuffer(data, NUMBER).reshape(count, self.columns)


def run_of(path: Path, first: int = 0, last: int = 2**64) -> Run:
    """The rows of a table whose first number is in [first, last), found by binary search."""
    table = np.load(path, mmap_mode="r")
    start, stop = (_position(table[:, 0], number) for number in (first, last))
    return Run(path, table.offset + start * table.shape[1] * NUMBER.itemsize, stop - start, table.shape[1])


def merge(runs: Iterable[Run], memory: int = MEMORY) -> Iterator[Rows]:
    """All rows of the runs in order, in pieces of about `memory` bytes together.

    Each run is read through a window in proportion to its length; hashes being evenly spread, the windows end at about the
    same value. What is below the lowest end of an unfinished window can come out.
    """
    runs = [run for run in runs if run.rows]
    total = sum(run.rows for run in runs)
    share = min(1.0, memory / (sum(run.rows * run.columns for run in runs) * NUMBER.itemsize)) if runs else 1.0
    windows = [min(run.rows, int(run.rows * share) + 16) for run in runs]
    held = [run.read(0, window) for run, window in zip(runs, windows, strict=True)]
    read = [len(rows) for rows in held]
    done = 0
    while done < total:
        ends = [tuple(rows[-1]) for run, rows, after in zip(runs, held, read, strict=True) if after < run.rows]
        counts = [count_up_to(rows, min(ends)) if ends else len(rows) for rows in held]
        piece = sort_rows(np.concatenate([rows[:count] for rows, count in zip(held, counts, strict=True)]))
        done += len(piece)
        yield piece
        for number, (run, count) in enumerate(zip(runs, counts, strict=True)):
            more = run.read(read[number], count)
            read[number] += len(more)
            held[number] = np.concatenate([held[number][count:], more])


def count_up_to(rows: Rows, bound: tuple[np.uint64, ...]) -> int:
    """How many of the sorted rows are not above `bound`, column after column."""
    start, stop = 0, len(rows)
    for column, number in enumerate(bound):
        among = rows[start:stop, column]  # sorted: the columns before are equal in all of them
        left, right = np.searchsorted(among, number, "left"), np.searchsorted(among, number, "right")
        start, stop = start + int(left), start + int(right)
    return stop


class TableWriter:
    """Writes a table from rows in any order; `publish` gives it its name, whole or not at all.

    What does not fit into `memory` waits in a file without a name beside the target: it is gone with the process, also on
    kill -9.
    """

    def __init__(self, target: Path, columns: int, memory: int = MEMORY) -> None:
        self.target = target
        self.columns = columns
        self.memory = memory
        self.rows = 0
        target.parent.mkdir(parents=True, exist_ok=True)
        self._spill = tempfile.TemporaryFile(dir=target.parent)  # noqa: SIM115 - closed in __exit__
        self._runs: list[Run] = []
        self._buffer = bytearray()

    def append(self, rows: bytes | Rows) -> None:
        """Add rows: an array [n, columns], or its bytes."""
        self._buffer += rows if isinstance(rows, bytes) else rows.tobytes()
        if len(self._buffer) >= self.memory:
            self._runs.append(self._write_run())

    def publish(self) -> dict[str, Any]:
        """Give the table its name. Returns {"sha256", "size"} of the file."""
        if self._runs and self._buffer:
            self._runs.append(self._write_run())
        self._spill.flush()
        pieces = merge(self._runs, self.memory) if self._runs else iter([self._sorted()])
        self.rows = sum(run.rows for run in self._runs) or len(self._buffer) // (self.columns * NUMBER.itemsize)
        header = {"descr": NUMBER.str, "fortran_order": False, "shape": (self.rows, self.columns)}

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as stream:
                np.lib.format.write_array_header_1_0(stream, header)
                for piece in pieces:
                    stream.write(piece.data)

        publish(self.target, write)
        return {"sha256": sha256_file(self.target), "size": self.target.stat().st_size}

    def _sorted(self) -> Rows:
        return sort_rows(np.frombuffer(self._buffer, NUMBER).reshape(-1, self.columns))

    def _write_run(self) -> Run:
        rows = self._sorted()
        run = Run(self._spill.fileno(), self._spill.tell(), len(rows), self.columns)
        self._spill.write(rows.data)
        self._buffer = bytearray()
        return run

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spill.close()


class Lookup:
    """The rows of several tables by their first number, asked for in ascending order.

    Tables are mapped, not read: each is followed from the row it is at, and long stretches nobody asks for (other tasks'
    documents) are skipped by binary search.
    """

    def __init__(self, tables: Iterable[Path]) -> None:
        self._tables: list[Rows] = [np.load(path, mmap_mode="r") for path in tables]
        self._heads = [(int(table[0, 0]), number, 0) for number, table in enumerate(self._tables) if len(table)]
        heapq.heapify(self._heads)  # (the next row's first number, table, row)
        self._last = 0

    def rows(self, wanted: int) -> list[tuple[int, ...]]:
        """The rows that begin with `wanted`, without it; in the order of the tables."""
        assert wanted >= self._last, f"{wanted} is asked for after {self._last}"
        self._last = wanted
        found: list[tuple[int, ...]] = []
        while self._heads and self._heads[0][0] <= wanted:
            first, number, row = self._heads[0]
            table = self._tables[number]
            if first == wanted:
                found.append(tuple(int(value) for value in table[row, 1:]))
                row += 1
            else:
                row += _position(table[row:, 0], wanted)
            if row < len(table):
                heapq.heapreplace(self._heads, (int(table[row, 0]), number, row))
            else:
                heapq.heappop(self._heads)
        return found


def _position(column: Rows, number: int) -> int:
    """Where `number` (at most 2**64) would stand in a sorted column. As uint64: numpy would compare an int as a float."""
    return len(column) if number >= 2**64 else int(np.searchsorted(column, np.uint64(number)))
