"""Documents of a parquet file: only the text column, row group by row group, a few megabytes at a time.

A row group belongs to the unit in whose byte range it begins. Local files and object stores are read in place; files without
random access (a compressed .parquet, a web server) are copied to a temporary file first.

Arrow decodes a page at once, so a cell that is too long is in Arrow's memory once before it is rejected; no Python string is
made of it. Pages are checked against their checksums if the file has them.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from pipeline.data.readers.decompress import decompressed
from pipeline.data.readers.units import BLOCK, RANGE, SKIP, Rejected, Text, Unit, some_names, too_long
from pipeline.errors import UserError, first_line
from pipeline.io.remote import open_retrying, read_range, size_of
from pipeline.io.storage import path_of
from pipeline.io.urls import is_http, is_local

BATCH_BYTES = 4 << 20  # of text at once, by the average length in the row group
BATCH_ROWS = 4096
REMOTE_BLOCK = 4 << 20


def read_parquet(unit: Unit, limit: int) -> Iterator[Text | Rejected]:
    """The documents of a unit's row groups. `record` is the row number in the file, from 1."""
    shown = unit.file.shown
    with contextlib.ExitStack() as stack:
        source, size = open_parquet(unit, stack)
        if not size:
            if unit.part == 0:
                yield Rejected(None, "empty_file", shown, f"empty file; download it again or remove it {SKIP}")
            return
        try:
            file = _open(source, size)
        except pa.ArrowException as error:
            yield from _damaged(unit, "", error)
            return
        stack.callback(file.close)
        problem = _column_problem(file, unit.file.text_key)
        if problem:
            if unit.part == 0:
                yield Rejected(None, "no_text", shown, problem)
            return
        if not file.metadata.num_rows and unit.part == 0:
            yield Rejected(None, "empty_file", shown, f"no rows; download it again or remove it {SKIP}")
        row = 1
        for group in range(file.num_row_groups):
            facts = file.metadata.row_group(group)
            if unit.parts == 1 or min(_begin(facts) // RANGE, unit.parts - 1) == unit.part:
                try:
                    yield from _read_group(unit, file, group, row, limit)
                except (pa.ArrowException, OSError) as error:
                    if isinstance(error, OSError) and error.errno is not None:
                        raise
                    rows = f", rows {row} to {row + facts.num_rows - 1}"
                    yield from _damaged(unit, rows, error)
            row += facts.num_rows


def _read_group(unit: Unit, file: pq.ParquetFile, group: int, row: int, limit: int) -> Iterator[Text | Rejected]:
    key = unit.file.text_key
    facts = file.metadata.row_group(group)
    size = next(
        column.total_uncompressed_size
        for column in map(facts.column, range(facts.num_columns))
        if column.path_in_schema == key
    )
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES * facts.num_rows // max(1, size)))
    for batch in file.iter_batches(rows, row_groups=[group], columns=[key], use_threads=False):
        yield from _read_cells(unit, batch.column(0), row, limit)
        row += batch.num_rows


def _read_cells(unit: Unit, column: Any, row: int, limit: int) -> Iterator[Text | Rejected]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())  # binary_length does not support views
    lengths = pc.binary_length(column).to_pylist()
    for i, length in enumerate(lengths):
        number = row + i
        where = f"{unit.file.shown}, row {number}"
        if length is None:
            yield Rejected(number, "no_text", where, f"no text in {unit.file.text_key!r}; fill the cell {SKIP}")
        elif length > limit:
            yield Rejected(number, "too_long_cell", where, too_long(limit))
        else:
            try:
                yield Text(number, column[i].as_py())
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 at byte {error.start}; write the file again as UTF-8 {SKIP}"
                yield Rejected(number, "not_utf8", where, problem)


def _column_problem(file: pq.ParquetFile, key: str) -> str | None:
    """Why the text cannot be read from this file; None when it can."""
    schema = file.schema_arrow
    if schema.names.count(key) != 1:
        return f"no column {key!r} (columns: {some_names(schema.names)}); set text_key of this source {SKIP}"
    kind = schema.field(key).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_string_view(values)):
        return f"column {key!r} holds {kind}, not strings; set text_key of this source {SKIP}"
    return None


def _begin(facts: Any) -> int:
    """First byte of a row group."""
    columns = map(facts.column, range(facts.num_columns))
    return int(min(min(c.data_page_offset, c.dictionary_page_offset or c.data_page_offset) for c in columns))


def read_rows(unit: Unit) -> Iterator[Any]:
    """Every row of a file as a plain value, whatever its columns. Raises UserError when the file is damaged."""
    with contextlib.ExitStack() as stack:
        source, size = open_parquet(unit, stack)
        try:
            file = _open(source, size)
            stack.callback(file.close)
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, MemoryError):
                raise
            raise UserError(
                f"{unit.file.shown}: {_not_here(error)}"
                if _not_here(error)
                else f"{unit.file.shown}: not an intact parquet file ({first_line(error)}); download it again"
            ) from None


def _damaged(unit: Unit, rows: str, error: Exception) -> Iterator[Rejected]:
    """A damaged row group is seen only by its unit; a damaged file by all of its units, and the first one reports it.
    What Arrow cannot read is not damaged, nor is a file for which memory is missing (raises MemoryError)."""
    if isinstance(error, MemoryError):
        raise MemoryError(f"a page of it: {first_line(error)}")
    if not rows and unit.part:
        return
    if problem := _not_here(error):
        yield Rejected(None, "over_limit", unit.file.shown + rows, f"{problem} {SKIP}")
    else:
        problem = f"truncated or damaged ({first_line(error)}); download it again {SKIP}"
        yield Rejected(None, "damaged_file", unit.file.shown + rows, problem)


def _not_here(error: Exception) -> str | None:
    """Why an intact file cannot be read by this build of Arrow, and the fix; None if it is not intact."""
    text = first_line(error)
    if not isinstance(error, pa.ArrowNotImplementedError) and not re.search("not built|ncrypt|no decryption", text):
        return None
    return f"Arrow cannot read it here ({text}); write it again with zstd or snappy, and not encrypted"


def _open(source: Any, size: int) -> pq.ParquetFile:
    """Arrow's own limits on metadata are lower than what wide or long files have; metadata are never larger than the file."""
    most = min(size, 2**31 - 1)
    return pq.ParquetFile(
        source, page_checksum_verification=True, thrift_string_size_limit=most, thrift_container_size_limit=most
    )


def open_parquet(unit: Unit, stack: contextlib.ExitStack) -> tuple[Any, int]:
    """What Arrow reads (a path or a seekable file), and its size."""
    url, compression = unit.file.url, unit.file.compression
    if compression is None and is_local(url):
        return unit.file.shown, os.stat(unit.file.shown).st_size
    if compression is None and not is_http(url):
        size = size_of(url)
        return io.BufferedReader(_RemoteFile(url, size), REMOTE_BLOCK), size
    raw = stack.enter_context(open_retrying(url, size=unit.file.size or None))
    source = cast(BinaryIO, decompressed(raw, compression)) if compression is not None else raw
    copy = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
    shutil.copyfileobj(source, copy, BLOCK)
    copy.flush()
    return str(path_of(copy)), os.stat(copy.fileno()).st_size


class _RemoteFile(io.RawIOBase):
    """A remote file with random access."""

    def __init__(self, url: str, size: int) -> None:
        self._url = url
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        buffer[:count] = read_range(self._url, self._position, self._position + count)
        self._position += count
        return count
