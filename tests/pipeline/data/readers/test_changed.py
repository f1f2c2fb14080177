"""A local file that changes, before or while it is read, is an error, also with equal size and restored times."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard

from pipeline.data.filters.decontaminate import build_index
from pipeline.data.readers.text import read_unit
from pipeline.data.readers.units import Rejected, unit_as_dict, unit_from_dict
from pipeline.errors import UserError
from tests.pipeline.data.readers.reading import MB, units_of, write_parquet

LINES = 200_000


def lines(word: str, count: int = LINES) -> bytes:
    return b"".join(b'{"text": "%s %06d"}\n' % (word.encode(), number) for number in range(count))


def in_place(path: Path, data: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.write(data)


def with_old_times(path: Path, data: bytes) -> None:
    facts = path.stat()
    in_place(path, data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def renamed_over(path: Path, data: bytes) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(data)
    other.replace(path)


def appended(path: Path, data: bytes) -> None:
    with open(path, "ab") as stream:
        stream.write(data[:100])


CHANGES = [in_place, with_old_times, renamed_over, appended]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress, zstandard.compress])
def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, change: Callable[[Path, bytes], None], compress: Callable[[bytes], bytes]
) -> None:
    suffix = {bytes: "", gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".xz"}.get(compress, ".zst")
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(lines("old", 20_000)))
    time.sleep(0.02)  # the clock of file times is coarse
    items = read_unit(units_of(path)[0], max_document_bytes=MB)
    assert not isinstance(next(items), Rejected)
    change(path, compress(lines("new", 20_000)))
    with pytest.raises(UserError, match=r"a\.jsonl.*; start again"):
        list(items)


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_between_listing_and_reading(tmp_path: Path, change: Callable[[Path, bytes], None]) -> None:
    for path, data in (
        (tmp_path / "a.jsonl", lines("old", 3)),
        (tmp_path / "b.txt", b"old"),
        (tmp_path / "c.md", b"x"),
    ):
        path.write_bytes(data)
        (unit,) = units_of(path)
        unit = unit_from_dict(json.loads(json.dumps(unit_as_dict(unit))))  # as a worker gets it
        time.sleep(0.02)
        change(path, data)
        with pytest.raises(UserError, match=r"since the sources were listed|when the sources were listed"):
            list(read_unit(unit, max_document_bytes=MB))


def test_a_torn_line_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("old"))
    time.sleep(0.02)
    items = read_unit(units_of(path)[0], max_document_bytes=MB)
    next(items)
    in_place(path, b"no json" * (path.stat().st_size // 7))
    with pytest.raises(UserError, match=r"a\.jsonl: changed while it was read; start again"):
        for item in items:
            assert not isinstance(item, Rejected), item


def test_a_parquet_file_behind_a_link_that_changes_is_an_error(tmp_path: Path) -> None:
    write_parquet(tmp_path / "real.parquet", pa.array(["old"] * 5))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.parquet").symlink_to(tmp_path / "real.parquet")
    (unit,) = units_of(tmp_path / "in")
    assert len(list(read_unit(unit, max_document_bytes=MB))) == 5  # unchanged
    time.sleep(0.02)
    items = read_unit(unit, max_document_bytes=MB)
    next(items)
    write_parquet(tmp_path / "real.parquet", pa.array(["new"] * 5))
    with pytest.raises(UserError, match=r"link\.parquet: changed while it was read"):
        list(items)


def test_an_evaluation_file_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("some words that are not enough to be a run of thirteen of them or so", 5))
    time.sleep(0.02)
    from pipeline.data.filters import decontaminate

    strings = decontaminate._strings_in
    monkeypatch.setattr(decontaminate, "_strings_in", lambda value: (in_place(path, b"{"), strings(value))[1])
    with pytest.raises(UserError, match=r"a\.jsonl: changed while it was read"):
        build_index([str(path)], 13, tmp_path / "index.npz", MB)
