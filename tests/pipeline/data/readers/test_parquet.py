"""Parquet files: string columns, bad cells, damaged row groups, and parts that lose and duplicate nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.readers.text import read_unit
from pipeline.data.readers.units import Rejected, Text
from tests.pipeline.data.readers.reading import (
    MB,
    WORDS,
    one_bad,
    read_all,
    small_parts,
    texts,
    units_of,
    write_parquet,
)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", "b", "a"]),
        pa.array(["a", "b", "a"], pa.large_string()),
        pa.array(["a", "b", "a"]).dictionary_encode(),
        pa.array(["a", "b", "a"], pa.string_view()),
    ],
    ids=lambda column: str(column.type),
)
def test_every_kind_of_string_column(tmp_path: Path, column: Any) -> None:
    assert texts(read_all(write_parquet(tmp_path / "a.parquet", column))) == ["a", "b", "a"]


def test_parquet_without_text(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", pa.array(["x"]), key="body")
    assert "a.parquet: no column 'text' (columns: body, id); set text_key" in one_bad(read_all(path)).message
    assert "column 'id' holds int64, not strings" in one_bad(read_all(path, "id")).message
    path = write_parquet(tmp_path / "b.parquet", pa.array(["x", None, "y" * 2000, "z"]))
    first, empty, long, last = read_all(path, limit=1000)
    assert (first, last) == (Text(1, "x"), Text(4, "z"))
    assert isinstance(empty, Rejected) and empty.reason == "no_text" and "row 2: no text" in empty.message
    assert isinstance(long, Rejected) and long.reason == "too_long_cell" and "row 3: longer than" in long.message
    assert one_bad(read_all(write_parquet(tmp_path / "c.parquet", pa.array([], pa.string())))).reason == "empty_file"


def test_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    column = pa.array([b"good", b"caf\xe9", b"good"]).view(pa.string())
    first, bad, last = read_all(write_parquet(tmp_path / "a.parquet", column))
    assert isinstance(bad, Rejected) and bad.reason == "not_utf8" and "row 2: not UTF-8 at byte 3" in bad.message
    assert isinstance(first, Text) and isinstance(last, Text)


def test_truncated_and_damaged_parquet(tmp_path: Path) -> None:
    column = pa.array([f"{n} " + "x" * 100 for n in range(3000)])
    options = {"write_page_checksum": True, "compression": "none"}  # or snappy notices by itself
    path = write_parquet(tmp_path / "a.parquet", column, row_group_size=1000, **options)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert one_bad(read_all(path)).reason == "damaged_file"
    path.write_bytes(whole)
    text = pq.ParquetFile(path).metadata.row_group(1).column(1)
    middle = text.dictionary_page_offset + text.total_compressed_size // 2
    path.write_bytes(whole[:middle] + b"damage" + whole[middle + 6 :])
    items = read_all(path)
    assert "a.parquet, rows 1001 to 2000: truncated or damaged" in one_bad(items).message
    assert sum(isinstance(item, Text) for item in items) >= 2000  # the other row groups


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(WORDS, max_size=40), st.integers(1, 9))
def test_parts_of_parquet_make_the_complete_file(tmp_path: Path, column: list[str], rows: int) -> None:
    path = write_parquet(tmp_path / "a.parquet", pa.array(column or ["x"]), row_group_size=rows)
    for size in (50, 400, 10**6):
        with small_parts(size, 10):
            items = [i for unit in units_of(path) for i in read_unit(unit, max_document_bytes=MB)]
        assert texts(items) == (column or ["x"]) and [i.record for i in items] == [n + 1 for n in range(len(items))]
