"""Sorted tables of numbers on disk, of any length, written and read in bounded memory: the basis of finding duplicates.

A table is an .npy file of uint64 [rows, columns] with its rows in lexicographic order, so equal content gives equal bytes,
independent of the order of writing and of the memory. It is written by an external merge sort: rows are sorted in runs of
`memory` bytes, and runs are merged window by window. Memory does not grow with the number of rows, nor with how often a value
occurs: a boilerplate paragraph in a billion documents is only a long stretch of equal hashes.
"""

from __future__ import annotations

import contextlib
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

from pipeline.io.storage import explain_os_error, publish, sha256_file

Rows = npt.NDArray[np.uint64]

NUMBER = np.dtype("<u8")
MEMORY = 32 << 20  # bytes of rows at once; a step that merges, compares and sorts them needs about 250 MB in all


def sort_rows(rows: Rows) -> Rows:
    """Rows [n, columns] in lexicographic order.

    The first column nearly always decides (it is half of a hash, or unique), and sorting by one column is several times as fast
    as by all of them: only rows with the same first number are compared further.
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
    """Consecutive sorted rows in a file. `source`: a path, or the descriptor of an open file."""

    source: Path | int
    offset: int  # of the first row, in bytes
    rows: int
    columns: int

    def read(self, start: int, count: int) -> Rows:
        """Up to `count` rows from row `start`. A path is opened only for this, because there may be thousands of runs."""
        count = min(count, self.rows - start)
        width = self.columns * NUMBER.itemsize
        handle = self.source if isinstance(self.source, int) else os.open(self.source, os.O_RDONLY)
        try:
            data = os.pread(handle, count * width, self.offset + start * width)
        finally:
            if not isinstance(self.source, int):
                os.close(handle)
        assert len(data) == count * width, f"{self.source}: truncated"
        return np.frombuffer(data, NUMBER).reshape(count, self.columns)


def run_of(path: Path, first: int = 0, last: int = 2**64) -> Run:
    """The rows of a table whose first number is in [first, last), found by binary search."""
    table = np.load(path, mmap_mode="r")
    start, stop = (_position(table[:, 0], number) for number in (first, last))
    return Run(path, table.offset + start * table.shape[1] * NUMBER.itemsize, stop - start, table.shape[1])


def merge(runs: Iterable[Run], memory: int = MEMORY) -> Iterator[Rows]:
    """All rows of the runs in order, in pieces of at most about `memory` bytes.

    Each run is read through a window proportional to its length; since hashes are evenly distributed, the windows end at about
    the same value. Rows up to the lowest end of an unfinished window can be emitted. If runs follow one another instead (one
    hash everywhere, so ordinals decide), only the windows that begin below that end are touched; otherwise thousands of runs
    would be searched for every few rows.
    """
    runs = [run for run in runs if run.rows]
    share = memory / max(memory, sum(run.rows * run.columns for run in runs) * NUMBER.itemsize)
    windows = [_Window(run, int(run.rows * share) + 16) for run in runs]
    heads = [(window.head, number) for number, window in enumerate(windows)]
    ends = [(window.end, number) for number, window in enumerate(windows) if window.end is not None]
    heapq.heapify(heads)
    heapq.heapify(ends)
    while heads:
        while ends and windows[ends[0][1]].end != ends[0][0]:
            heapq.heappop(ends)  # this window has advanced since
        bound = ends[0][0] if ends else None
        touched = []
        while heads and (bound is None or heads[0][0] <= bound):
            touched.append(heapq.heappop(heads)[1])
        yield sort_rows(np.concatenate([windows[number].take(bound) for number in touched]))
        for number in touched:
            window = windows[number]
            window.fill()
            if len(window.rows):
                heapq.heappush(heads, (window.head, number))
            if window.end is not None:
                heapq.heappush(ends, (window.end, number))


class _Window:
    """The part of a run that is in memory: up to `size` rows."""

    def __init__(self, run: Run, size: int) -> None:
        self.run = run
        self.size = size
        self.rows: Rows = np.empty((0, run.columns), NUMBER)
        self._read = 0
        self.fill()

    def fill(self) -> None:
        """Read more rows from the run until the window is full."""
        more = self.run.read(self._read, self.size - len(self.rows))
        self._read += len(more)
        self.rows = np.concatenate([self.rows, more])

    def take(self, bound: tuple[int, ...] | None) -> Rows:
        """Remove and return the rows up to `bound`, or all rows without one."""
        count = len(self.rows) if bound is None else count_up_to(self.rows, bound)
        taken, self.rows = self.rows[:count], self.rows[count:]
        return taken

    @property
    def head(self) -> tuple[int, ...]:
        """The first row."""
        return tuple(self.rows[0].tolist())

    @property
    def end(self) -> tuple[int, ...] | None:
        """The last row; None if the run has no rows after it."""
        return tuple(self.rows[-1].tolist()) if self._read < self.run.rows else None


def count_up_to(rows: Rows, bound: tuple[int, ...]) -> int:
    """Number of the sorted rows that are <= `bound`, column by column."""
    start, stop = 0, len(rows)
    for column, value in enumerate(bound):
        among, number = (
            rows[start:stop, column],
            np.uint64(value),
        )  # sorted, as the columns before are equal in all of them
        left, right = np.searchsorted(among, number, "left"), np.searchsorted(among, number, "right")
        start, stop = start + int(left), start + int(right)
    return stop


class TableWriter:
    """Writes a table from rows in any order; `publish` gives it its name atomically.

    Rows that do not fit into `memory` are spilled to an unnamed temporary file next to the target, which disappears with the
    process, also on kill -9.
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
        """Add rows: an array [n, columns], or its bytes. Raises UserError on a full disk."""
        self._buffer += rows if isinstance(rows, bytes) else rows.tobytes()
        if len(self._buffer) >= self.memory:
            self._runs.append(self._write_run())

    def publish(self) -> dict[str, Any]:
        """Write the table under its final name. Returns {"sha256", "size"} of the file."""
        if self._runs and self._buffer:
            self._runs.append(self._write_run())
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
        try:
            self._spill.write(rows.data)
            self._spill.flush()
        except OSError as error:
            raise explain_os_error(error, str(self.target)) from error
        self._buffer = bytearray()
        return run

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # from flushing the buffer on a full disk; already reported when it happened
            self._spill.close()


class Lookup:
    """The rows of several tables by their first number, requested in ascending order.

    Tables are memory-mapped. Each is followed from its current row, and long stretches that are not requested (other tasks'
    documents) are skipped by binary search.
    """

    def __init__(self, tables: Iterable[Path]) -> None:
        self._tables: list[Rows] = [np.load(path, mmap_mode="r") for path in tables]
        self._heads = [(int(table[0, 0]), number, 0) for number, table in enumerate(self._tables) if len(table)]
        heapq.heapify(self._heads)  # (the next row's first number, table, row)
        self._last = 0

    def rows(self, wanted: int) -> list[tuple[int, ...]]:
        """The rows that begin with `wanted`, without that number, in the order of the tables."""
        assert wanted >= self._last, f"{wanted} requested after {self._last}"
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
    """Where `number` (at most 2**64) belongs in a sorted column. As uint64: numpy would compare small ints as floats."""
    return len(column) if number >= 2**64 else int(np.searchsorted(column, np.uint64(number)))
