"""Helpers for the tests of readers: files in every format and compression, and reading all units of a source."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import strategies as st

from pipeline.config.data import Source
from pipeline.data.readers import parquet, units
from pipeline.data.readers import text as read
from pipeline.data.readers.sources import find_files
from pipeline.data.readers.text import bad_input_error, read_unit
from pipeline.data.readers.units import Rejected, Text, Unit, plan_units
from pipeline.errors import UserError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
MB = 1_000_000
PAGE = """<html><head><meta charset='iso-8859-1'><title>Kaffee</title></head><body><nav><a href='x'>home</a></nav><article>
<h1>Kaffee</h1><p>{}</p><p>Zweiter Absatz, der auch lang genug ist, um zu zählen, und gut.</p></article>
<footer>copyright</footer></body></html>""".format(
    "Ein Café ist ein Ort, an dem man Kaffee trinkt und lange redet. " * 4
)
BLANKS = st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n", "\r\n\r\n", "\n\n\n"])
WORDS = st.text(st.sampled_from('abc "\\öß漢😀\u2028'), max_size=40)
LINES = st.lists(st.tuples(WORDS, BLANKS), max_size=30)


def units_of(url: Path | str, text_key: str = "text") -> list[Unit]:
    return plan_units(find_files([Source(url=str(url), text_key=text_key)])[0])


def read_all(url: Path | str, text_key: str = "text", limit: int = MB) -> list[Text | Rejected]:
    return [item for unit in units_of(url, text_key) for item in read_unit(unit, max_document_bytes=limit)]


def texts(items: list[Text | Rejected]) -> list[str]:
    assert not [item for item in items if isinstance(item, Rejected)], items
    return [item.text for item in items if isinstance(item, Text)]


def write_parquet(path: Path, column: Any, *, key: str = "text", **options: Any) -> Path:
    pq.write_table(pa.table({"id": pa.array(range(len(column))), key: column}), path, **options)
    return path


def one_bad(items: list[Text | Rejected]) -> Rejected:
    (bad,) = [item for item in items if isinstance(item, Rejected)]
    assert "\n" not in bad.message and "data.on_bad_input=skip" in bad.message
    return bad


def assert_stops(path: Path, bad: Rejected) -> None:
    """Policy `error`: the same location and reason."""
    unit = units_of(path)[0]
    assert str(bad_input_error(unit, bad)) == bad.message and isinstance(bad_input_error(unit, bad), UserError)


def sorted_texts(items: list[Text | Rejected]) -> list[str]:
    assert len({item.record for item in items}) == len(items)
    return texts(sorted(items, key=lambda item: item.record or 0))


@contextmanager
def small_parts(size: int, chunk: int) -> Iterator[None]:
    """Units of a few bytes; the same constants are imported by several modules."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (units, "RANGE", size),
            (read, "RANGE", size),
            (parquet, "RANGE", size),
            (read, "STREAM_CHUNK", chunk),
            (read, "BLOCK", 16),
        ):
            patch.setattr(module, name, value)
        yield
