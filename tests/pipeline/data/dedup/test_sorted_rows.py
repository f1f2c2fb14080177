"""Tables against plain sorting: any rows, any memory, any division into runs."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.dedup.sorted_rows import Lookup, Rows, Run, TableWriter, merge, run_of, sort_rows
from pipeline.errors import UserError

NUMBERS = st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1), st.sampled_from([2**63, 2**63 - 1, 2**64 - 1]))
TABLES = st.integers(2, 4).flatmap(
    lambda columns: st.lists(st.lists(st.tuples(*[NUMBERS] * columns), max_size=40), min_size=1, max_size=5)
)


def as_rows(tuples: list[tuple[int, ...]], columns: int = 3) -> Rows:
    return np.array(tuples, dtype=np.uint64).reshape(-1, len(tuples[0]) if tuples else columns)


def as_tuples(rows: Rows) -> list[tuple[int, ...]]:
    return [tuple(int(value) for value in row) for row in rows]


def write(path: Path, rows: Rows, memory: int = 1 << 20) -> dict[str, object]:
    with TableWriter(path, rows.shape[1], memory) as table:
        for start in range(0, len(rows), 3):
            table.append(rows[start : start + 3].tobytes())
        return table.publish()


@settings(max_examples=40, deadline=None)
@given(tables=TABLES, memory=st.integers(8, 400), first=NUMBERS, last=NUMBERS)
def test_tables_merges_ranges_and_lookups_agree_with_sorted(
    tables: list[list[tuple[int, ...]]], memory: int, first: int, last: int
) -> None:
    columns = next((len(row) for rows in tables for row in rows), 3)
    everything = sorted(row for rows in tables for row in rows)
    assert as_tuples(sort_rows(as_rows(everything[::-1], columns))) == everything
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.npy" for number in range(len(tables))]
        for path, rows in zip(paths, tables, strict=True):
            spilled = write(path, as_rows(rows, columns), memory)
            before = path.read_bytes()
            assert spilled == write(path, as_rows(rows[::-1], columns))
            assert path.read_bytes() == before, "the bytes hang on memory or on the order of writing"
            assert as_tuples(np.load(path)) == sorted(rows)
        merged = [row for piece in merge([run_of(path) for path in paths], memory) for row in as_tuples(piece)]
        assert merged == everything
        first, last = sorted([first, last])
        ranged = merge([run_of(path, first, last) for path in paths], memory)
        assert [row for piece in ranged for row in as_tuples(piece)] == [r for r in everything if first <= r[0] < last]
        lookup = Lookup(paths)
        for number in sorted({first, last, *(row[0] for row in everything)}):
            assert sorted(lookup.rows(number)) == [row[1:] for row in everything if row[0] == number]
        assert {path.name for path in Path(folder).iterdir()} == {path.name for path in paths}, "something is left"


@pytest.mark.parametrize("big", [2**60, 2**63])
def test_neighbors_above_two_to_the_53_are_distinguished(tmp_path: Path, big: int) -> None:
    """A comparison as floats would consider them equal."""
    write(tmp_path / "t.npy", as_rows([(big + n, n) for n in range(5)]))
    assert run_of(tmp_path / "t.npy", big + 2, big + 4).rows == 2
    lookup = Lookup([tmp_path / "t.npy"])
    assert lookup.rows(big + 3) == [(3,)]
    assert lookup.rows(big + 4) == [(4,)]


def test_a_full_disk_is_reported_in_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"t\.npy: the disk is full"),
        open("/dev/full", "wb") as full,
        TableWriter(tmp_path / "t.npy", 3, 24) as table,
    ):
        table._spill = full
        table.append(as_rows([(1, 2, 3)]))
    assert list(tmp_path.iterdir()) == []


def test_a_lookup_refuses_to_go_back(tmp_path: Path) -> None:
    write(tmp_path / "t.npy", as_rows([(5, 0, 0)]))
    lookup = Lookup([tmp_path / "t.npy"])
    lookup.rows(6)
    with pytest.raises(AssertionError, match="5 requested after 6"):
        lookup.rows(5)


def test_a_truncated_table_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    write(path, as_rows([(number, 0, 0) for number in range(100)]))
    run = run_of(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(AssertionError, match=r"t\.npy: truncated"):
        list(merge([run]))


@pytest.mark.parametrize("spread", [2**64, 1], ids=["even", "one value"])
def test_memory_depends_neither_on_rows_nor_on_repeats(tmp_path: Path, spread: int) -> None:
    """10 MB of rows through 256 kB; of evenly distributed rows, and of rows that share their first number."""
    paths = [tmp_path / f"{number}.npy" for number in range(4)]
    rng = np.random.default_rng(0)
    tracemalloc.start()
    try:
        for path in paths:
            with TableWriter(path, 3, 1 << 18) as table:
                for _ in range(100):
                    rows = rng.integers(0, 2**64, (1000, 3), dtype=np.uint64)
                    rows[:, 0] %= np.uint64(spread % 2**64 or 2**64 - 1)
                    table.append(rows)
                table.publish()
        assert sum(len(piece) for piece in merge([run_of(path) for path in paths], 1 << 18)) == 400_000
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()


def test_runs_that_follow_one_another_are_not_all_searched_for_every_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One hash in all tasks: the tables are disjoint stretches of ordinals. Time must not grow with their number squared."""
    paths = [tmp_path / f"{number}.npy" for number in range(50)]
    for number, path in enumerate(paths):
        write(path, as_rows([(7, 7, number << 32 | record) for record in range(200)]))
    reads = 0
    read = Run.read

    def counted(run: Run, start: int, count: int) -> Rows:
        nonlocal reads
        reads += 1
        return read(run, start, count)

    monkeypatch.setattr(Run, "read", counted)
    pieces = list(merge([run_of(path) for path in paths], 24 * 50 * 4))
    assert len(np.concatenate(pieces)) == 50 * 200
    windows = 50 * 200 // (4 + 16)
    assert len(pieces) <= windows + 50
    assert reads <= 2 * windows + 100
