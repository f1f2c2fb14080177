"""Units: a function of the files only, evenly distributed, with ordinals that sort like the corpus."""

from __future__ import annotations

import json
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.readers import units
from pipeline.data.readers.sources import InputFile
from pipeline.data.readers.units import (
    MAX_PARTS,
    RANGE,
    Unit,
    deal,
    ordinal,
    plan_units,
    split_ordinal,
    unit_as_dict,
    unit_from_dict,
)

FILE = InputFile("/x/a.jsonl", "x/a.jsonl", "jsonl", None, "text", None, 10, "id", 0, "x")


def parts(**facts: object) -> int:
    return len(plan_units([replace(FILE, **facts)]))  # type: ignore[arg-type]


def test_huge_files_are_cut_and_small_ones_are_not() -> None:
    assert [parts(size=size) for size in (0, 1, RANGE, RANGE + 1, 10 * RANGE)] == [1, 1, 1, 2, 10]
    assert parts(size=3 * RANGE, kind="text") == 3 and parts(size=3 * RANGE, kind="parquet") == 3
    assert parts(size=3 * RANGE, kind="html") == 1 and parts(size=0, kind="not_a_file") == 1
    assert parts(size=RANGE // 2, compression="gzip") == 2 and parts(size=100 * RANGE, compression="zstd") == MAX_PARTS
    assert parts(size=3 * RANGE, compression="gzip", kind="parquet") == 1
    assert parts(size=3 * RANGE, kind="parquet", url="https://host/a.parquet") == 1
    assert parts(size=3 * RANGE, kind="parquet", url="s3://bucket/a.parquet") == 3


def test_units_are_numbered_through_and_survive_json() -> None:
    files = [replace(FILE, size=3 * RANGE), FILE, replace(FILE, name="y")]
    planned = plan_units(files)
    assert [(u.number, u.part, u.parts) for u in planned] == [(0, 0, 3), (1, 1, 3), (2, 2, 3), (3, 0, 1), (4, 0, 1)]
    assert [unit_from_dict(json.loads(json.dumps(unit_as_dict(unit)))) for unit in planned] == planned
    assert planned[1].document_id(7) == "x/a.jsonl[1]#7" and planned[3].document_id(7) == "x/a.jsonl#7"
    assert planned[1].document_id(0) == planned[3].document_id(0) == "x/a.jsonl"


@given(st.lists(st.integers(0, 10**9), max_size=60), st.integers(1, 9))
def test_dealing_loses_nothing_and_is_even(sizes: list[int], tasks: int) -> None:
    planned = [Unit(number, FILE, 0, 1, size) for number, size in enumerate(sizes)]
    plan = deal(planned, tasks)
    assert len(plan) == tasks and sorted((u for share in plan for u in share), key=lambda u: u.number) == planned
    assert all(share == sorted(share, key=lambda u: u.number) for share in plan)
    load = [sum(u.size + 1 for u in share) for share in plan]
    assert max(load) - min(load) <= max(sizes, default=0) + 1


@given(st.integers(0, 2**31 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1), st.integers(0, 2**32 - 1))
def test_ordinals_sort_as_units_and_records_do(a: int, b: int, c: int, d: int) -> None:
    assert split_ordinal(ordinal(a, b)) == (a, b) and 0 <= ordinal(a, b) < 2**63
    assert (ordinal(a, b) < ordinal(c, d)) == ((a, b) < (c, d))


def test_the_plan_does_not_depend_on_settings() -> None:
    """Ordinals, and so which duplicate is kept, depend on these: changing one gives another corpus from the same files."""
    assert (units.RANGE, units.STREAM_CHUNK, units.MAX_PARTS) == (64 << 20, 8 << 20, 8)
