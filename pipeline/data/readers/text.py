"""Reading a unit: its documents, streamed in bounded memory, and every record that is not a document, with the reason.

Nothing is lost silently: input that cannot be read comes out as a `Rejected` with its location and fix, and the caller stops or
counts it. That is why datatrove's JsonlReader is not used: it logs a line that is not JSON, or an entire file that is not
UTF-8, and continues.

Texts (.txt, .md) of at most `max_document_bytes` are one document. A larger one is many: there is a grid point every TEXT_PIECE
bytes (half of `max_document_bytes` if that is less), and a document ends at the first paragraph end after each grid point; if
there is no blank line before the next one, at the first line end; otherwise between two characters. Only the file and the two
sizes decide this, not how the file is cut into units. With `split_at` a text is cut before each match instead, and a larger one
is rejected.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise

import orjson

from pipeline.data.readers.decompress import DAMAGE, OverLimit, decompressed
from pipeline.data.readers.sources import NOT_A_FILE, InputFile, check_unchanged
from pipeline.data.readers.units import BLOCK, RANGE, SKIP, STREAM_CHUNK, Rejected, Text, Unit, some_names, too_long
from pipeline.errors import UserError, first_line
from pipeline.io.remote import open_retrying
from pipeline.io.storage import explain_os_error

TEXT_PIECE = 1 << 20
JSON_DEPTH = 1024  # of orjson
BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
PARAGRAPH_END = re.compile(rb"\n[ \t\r]*\n")


def read_unit(unit: Unit, *, max_document_bytes: int) -> Iterator[Text | Rejected]:
    """The documents of a unit, in order. A line, cell or page longer than `max_document_bytes` as stored is rejected without
    being held in memory (for a parquet cell see parquet.py); reading continues after it. Damage ends the unit.

    Raises UserError for problems of the machine rather than the input: files that are gone, changed or not readable.
    """
    file = unit.file
    if file.kind == NOT_A_FILE:
        what = "a folder (or a link to one)" if os.path.isdir(file.shown) else "not a regular file"
        yield Rejected(None, NOT_A_FILE, file.shown, f"{what}, a file is expected; list the files in it {SKIP}")
        return
    try:
        check_unchanged(file, "since the sources were listed")
        for item in _read(unit, max_document_bytes):
            if isinstance(item, Rejected):
                check_unchanged(file)  # a line of two states of the file is not the file's fault
            yield item
        check_unchanged(file)
    except FileNotFoundError:
        raise UserError(f"{file.shown}: gone since the sources were listed; start again") from None
    except OverLimit as error:
        if unit.part == 0:  # as with damage
            yield Rejected(None, "over_limit", file.shown, f"{error} {SKIP}")
    except MemoryError as error:
        raise no_memory(file, error) from None
    except DAMAGE as error:
        check_unchanged(file)
        yield from _damaged(unit, error)
    except OSError as error:
        if error.errno is not None or isinstance(error, io.UnsupportedOperation):
            raise explain_os_error(error, file.shown, reading=True) from error
        check_unchanged(file)
        yield from _damaged(unit, error)  # bz2 and parquet report damage as an OSError without an errno


def no_memory(file: InputFile, error: MemoryError) -> UserError:
    """The error for a file that needs more memory than there is."""
    needed = first_line(error) if str(error) else "a large record"
    return UserError(
        f"{file.shown}: not enough memory to read it ({needed}); free memory, give each worker more, or lower data.workers"
    )


def bad_input_error(unit: Unit, rejected: Rejected) -> UserError:
    """The error for policy `error`. In a file that is cut into parts, the line number in the file is found by reading and
    counting the lines before it."""
    file, start = unit.file, _start(unit)
    if rejected.record is None or start == 0 or file.kind != "jsonl":
        return UserError(rejected.message)
    lines, last, left = 0, b"", start
    with open_retrying(file.url) as stream:
        while left and (block := stream.read(min(left, BLOCK))):
            lines, last, left = lines + block.count(b"\n"), block[-1:], left - len(block)
    number = lines + rejected.record + (last != b"\n")  # the line in which the part begins belongs to the part before
    return UserError(f"{file.shown}, line {number}: {rejected.problem}")


def _damaged(unit: Unit, error: Exception) -> Iterator[Rejected]:
    if unit.part == 0:  # every part of a compressed file sees it; the first reports it
        problem = f"truncated or damaged ({first_line(error)}); download it again {SKIP}"
        yield Rejected(None, "damaged_file", unit.file.shown, problem)


def _read(unit: Unit, limit: int) -> Iterator[Text | Rejected]:
    if unit.file.kind == "parquet":
        from pipeline.data.readers.parquet import read_parquet  # takes a while to import

        yield from read_parquet(unit, limit)
        return
    start = _start(unit)
    if unit.file.kind == "text" and start:
        start = _up(start, _grid(limit))
        if start >= unit.file.size:
            return
    before = 1 if unit.file.kind == "jsonl" and start else 0  # shows whether a line begins at `start`
    with closing(open_input(unit.file, start - before)) as stream:
        if start == 0 and not (begin := stream.peek(4)[:4]):
            if unit.part == 0:
                yield Rejected(
                    None, "empty_file", unit.file.shown, f"empty file; download it again or remove it {SKIP}"
                )
        elif start == 0 and begin.startswith(UTF16) and unit.file.kind != "html":
            if unit.part == 0:
                fix = f"convert it (iconv -f UTF-16 -t UTF-8) {SKIP}"
                yield Rejected(None, "not_utf8", unit.file.shown, f"UTF-16, not UTF-8, by its first bytes; {fix}")
        elif unit.file.kind == "html":
            yield _read_html(unit, stream, limit)
        elif unit.file.split_at is not None:
            yield from _read_split(unit, stream, unit.file.split_at, limit)
        elif unit.file.kind == "text":
            yield from _read_text(unit, stream, start, limit)
        else:
            yield from _read_jsonl(unit, stream, start, limit)


def open_input(file: InputFile, start: int) -> io.BufferedReader:
    """The file's bytes from `start` on, decompressed."""
    raw = open_retrying(file.url, size=file.size or None, start=start)
    if file.compression is not None:
        return decompressed(raw, file.compression)
    assert isinstance(raw, io.BufferedReader)
    return raw


def _is_ranges(unit: Unit) -> bool:
    return unit.file.compression is None and unit.parts > 1


def _start(unit: Unit) -> int:
    """First byte of a unit that is a range of its file."""
    return unit.part * RANGE if _is_ranges(unit) else 0


def _end(unit: Unit) -> int | None:
    """First byte after such a unit; None for the last one in the file."""
    return (unit.part + 1) * RANGE if _is_ranges(unit) and unit.part + 1 < unit.parts else None


def _is_mine(unit: Unit, position: int) -> bool:
    """Whether a record at `position` of the (decompressed) file belongs to this unit, which does not end before it."""
    return unit.parts == 1 or _is_ranges(unit) or position // STREAM_CHUNK % unit.parts == unit.part


# Lines


def _read_jsonl(unit: Unit, stream: io.BufferedReader, start: int, limit: int) -> Iterator[Text | Rejected]:
    end = _end(unit)
    position, number = start, 0
    if start:
        position += next_line(stream, limit)[1] - 1
    while end is None or position < end:
        line, length = next_line(stream, limit)
        if not length:
            return
        number += 1
        if number == 1 and position == 0 and line is not None:
            line = line.removeprefix(BOM)
        mine = _is_mine(unit, position)
        position += length
        if mine and (line is None or line.strip()):
            yield _parse(unit, number, line) if line is not None else _too_long(unit, number, limit)


def next_line(stream: io.BufferedReader, limit: int) -> tuple[bytes | None, int]:
    """(line, its length); the line is None if longer than `limit`: it is read but not kept. Length 0: end of file."""
    line = stream.readline(BLOCK)
    length = len(line)
    if length == BLOCK and line[-1:] != b"\n":
        parts = [line]
        while True:
            part = stream.readline(BLOCK)
            length += len(part)
            if length <= limit + 1:
                parts.append(part)
            else:
                parts.clear()
            if len(part) < BLOCK or part[-1:] == b"\n":
                break
        line = b"".join(parts)
    return (line if length - (line[-1:] == b"\n") <= limit else None), length


def _parse(unit: Unit, number: int, line: bytes) -> Text | Rejected:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as bad:
            return _not_utf8(number, _where(unit, number), bad.start)
        if is_too_deep(error):
            problem = f"nested more than {JSON_DEPTH} deep, which is not read; keep the text nearer to the top {SKIP}"
            return Rejected(number, "too_deep", _where(unit, number), problem)
        problem = f"not JSON ({first_line(error)}); fix the line {SKIP}"
        return Rejected(number, "not_json", _where(unit, number), problem)
    key = unit.file.text_key
    text = record.get(key) if isinstance(record, dict) else None
    if isinstance(text, str):
        return Text(number, text)
    keys = some_names(record) if isinstance(record, dict) else "none, it is not an object"
    problem = f"no text under {key!r} (keys: {keys}); set text_key of this source {SKIP}"
    return Rejected(number, "no_text", _where(unit, number), problem)


def is_too_deep(error: orjson.JSONDecodeError) -> bool:
    """Whether it is a limit of orjson, and no fault of the JSON."""
    return "depth limit" in str(error)


def _where(unit: Unit, number: int) -> str:
    start = _start(unit)
    return f"{unit.file.shown}, line {number}" + (f" after byte {start}" if start else "")


def _not_utf8(record: int, where: str, byte: int) -> Rejected:
    problem = f"not UTF-8 at byte {byte}; convert it (iconv -f LATIN1 -t UTF-8) {SKIP}"
    return Rejected(record, "not_utf8", where, problem)


def _too_long(unit: Unit, number: int, limit: int) -> Rejected:
    return Rejected(number, "too_long_line", _where(unit, number), too_long(limit))


# Entire files


def _read_html(unit: Unit, stream: io.BufferedReader, limit: int) -> Text | Rejected:
    from pipeline.data.readers.html import PageProblem, main_text

    data = stream.read(limit + 1)
    if len(data) > limit:
        return Rejected(0, "too_long_file", unit.file.shown, too_long(limit))
    try:
        text = main_text(data)
    except PageProblem as error:
        return Rejected(0, error.reason, unit.file.shown, f"{error} {SKIP}")
    if text:
        return Text(0, text)
    problem = f"no main text found in this page; remove the file, provide its text as .txt {SKIP}"
    return Rejected(0, "no_main_text", unit.file.shown, problem)


def _read_split(unit: Unit, stream: io.BufferedReader, split_at: str, limit: int) -> Iterator[Text | Rejected]:
    """The parts of a text, each from one match of `split_at` to the next; also what is before the first. White space alone is
    no document."""
    data = stream.read(limit + 1)
    if len(data) > limit:
        yield Rejected(0, "too_long_file", unit.file.shown, too_long(limit))
        return
    whole = _decode(unit, data, record=0, position=0)
    if isinstance(whole, Rejected):
        yield whole
        return
    begins = [match.start() for match in re.finditer(split_at, whole.text, re.MULTILINE)]
    bounds = sorted({0, *begins, len(whole.text)})
    parts = (whole.text[begin:end] for begin, end in pairwise(bounds))
    yield from (Text(number, part) for number, part in enumerate(parts, 1) if part.strip())


def _read_text(unit: Unit, stream: io.BufferedReader, start: int, limit: int) -> Iterator[Text | Rejected]:
    if _is_ranges(unit):
        if unit.file.size > limit:
            yield from _pieces(unit, stream, b"", start, limit)
            return
        if unit.part > 0:
            return
    head = stream.read(limit + 1)
    if len(head) > limit:
        yield from _pieces(unit, stream, head, start, limit)
    elif unit.part == 0:
        yield _decode(unit, head, record=0, position=0)


def _pieces(unit: Unit, stream: io.BufferedReader, head: bytes, start: int, limit: int) -> Iterator[Text | Rejected]:
    """The documents of a text that is split into several; `head` was already read from the stream."""
    grid, end = _grid(limit), _end(unit)
    source = _Joined(head, stream)
    number = start // grid
    window = source.read(grid)
    begin = 0 if number == 0 else _paragraph(window)
    while window and (end is None or number * grid < end):
        following = source.read(grid)
        following_begin = _paragraph(following)
        if _is_mine(unit, number * grid):
            data = window[begin:] + following[:following_begin]
            if data:
                yield _decode(unit, data, record=number + 1, position=number * grid + begin)
        window, begin, number = following, following_begin, number + 1


class _Joined:
    """Bytes in memory, followed by a stream."""

    def __init__(self, head: bytes, stream: io.BufferedReader) -> None:
        self._head = io.BytesIO(head)
        self._stream = stream

    def read(self, count: int) -> bytes:
        data = self._head.read(count)
        return data + self._stream.read(count - len(data))


def _paragraph(window: bytes) -> int:
    """Where the next document begins in the bytes after a grid point."""
    found = PARAGRAPH_END.search(window)
    if found:
        return found.end()
    line = window.find(b"\n") + 1
    if line:
        return line
    return next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)  # not inside a character


def _decode(unit: Unit, data: bytes, *, record: int, position: int) -> Text | Rejected:
    begin = len(BOM) if position == 0 and data.startswith(BOM) else 0
    try:
        return Text(record, data[begin:].decode("utf-8"))
    except UnicodeDecodeError as error:
        return _not_utf8(record, unit.file.shown, position + begin + error.start)


def _grid(limit: int) -> int:
    return max(4, min(TEXT_PIECE, limit // 2))


def _up(position: int, grid: int) -> int:
    """The first grid point at or after a position."""
    return -(-position // grid) * grid
