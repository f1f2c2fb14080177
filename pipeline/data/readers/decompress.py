"""Decompressed streams that detect truncation and damage, in bounded memory.

The usual readers lose text silently: zstandard's stops where the file is truncated and after the first of several frames, bz2's
and lzma's take a damaged second stream for padding. Parallel compressors write many streams to a file, so here a file is read
to its last byte, and anything that is not another stream is an error. The usual readers may also return hundreds of megabytes
for a few bytes read (one long line of the same letter); here at most a few megabytes are returned at once.

Windows of any size that the formats' tools make are read: up to 2 GiB for zstd (`--long=31`), 4 GiB for xz. A window is memory
only as far as it is used. What is intact but cannot be read is an `OverLimit`, or a MemoryError, and never called damage.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import zstandard

IN = 1 << 16  # bytes of the file at once
OUT = 1 << 20  # decompressed bytes at once, at most
XZ_MEMORY = (4 << 30) + (64 << 20)  # the largest dictionary of the format; `xz -9` needs 65 MB
ZSTD_WINDOW = 1 << 31  # the largest that the library decompresses
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPED = range(0x184D2A50, 0x184D2A60)
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)  # and for bz2 an OSError without an errno


class OverLimit(Exception):
    """A file that is intact, but that cannot be read here. The message says why, and the fix."""


def decompressed(raw: BinaryIO, compression: str) -> io.BufferedReader:
    """The content of a stream with `compression` (gzip, bz2, xz, zstd). Reading raises one of DAMAGE, or OSError without
    an errno, where it is truncated or damaged; OverLimit; or MemoryError saying how much is needed."""
    return io.BufferedReader(_Blocks(READERS[compression](raw), raw), OUT)


class _Blocks(io.RawIOBase):
    """An iterator of bytes, made from `raw`, as a stream."""

    def __init__(self, blocks: Iterator[bytes], raw: BinaryIO) -> None:
        self._blocks = blocks
        self._raw = raw
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def _gzip(raw: BinaryIO) -> Iterator[bytes]:
    data = raw.read(IN)
    while data:
        stream = zlib.decompressobj(31)
        while not stream.eof:
            data = data or _more(raw)
            yield stream.decompress(data, OUT)
            data = stream.unconsumed_tail
        data = _after_zeros(raw, stream.unused_data)


def _bz2(raw: BinaryIO) -> Iterator[bytes]:
    return _streams(raw, bz2.BZ2Decompressor, zeros=False)


def _xz(raw: BinaryIO) -> Iterator[bytes]:
    return _streams(raw, lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY), zeros=True)


def _streams(raw: BinaryIO, start: Callable[[], Any], *, zeros: bool) -> Iterator[bytes]:
    data = raw.read(IN)
    while data:
        stream = start()
        while not stream.eof:
            if stream.needs_input:
                data = data or _more(raw)
            try:
                yield stream.decompress(data, OUT)
            except MemoryError:
                raise MemoryError("its xz dictionary, up to 4.3 GB") from None
            data = b""
        data = _after_zeros(raw, stream.unused_data) if zeros else stream.unused_data or raw.read(IN)


def _more(raw: BinaryIO) -> bytes:
    data = raw.read(IN)
    if not data:
        raise EOFError("the file ends inside a compressed stream")
    return data


def _after_zeros(raw: BinaryIO, data: bytes) -> bytes:
    """The next bytes that are not padding; none at the end of the file."""
    while not (data := data.lstrip(b"\0")):
        data = raw.read(IN)
        if not data:
            break
    return data


def _zstd(raw: BinaryIO) -> Iterator[bytes]:
    """zstandard does not limit its output, but a block of the format holds at most 128 KiB, so it is fed block by block."""
    while magic := raw.read(4):
        if len(magic) == 4 and int.from_bytes(magic, "little") in ZSTD_SKIPPED:
            left = int.from_bytes(_exactly(raw, 4), "little")
            while left:
                left -= len(_exactly(raw, min(left, OUT)))
            continue
        if magic != ZSTD_MAGIC:
            raise zstandard.ZstdError("no zstd frame where one should begin")
        yield from _zstd_frame(raw)


def _zstd_frame(source: BinaryIO) -> Iterator[bytes]:
    """RFC 8878, 3.1.1: header, blocks with a header of three bytes each, checksum."""
    flags = _exactly(source, 1)
    single, checksum, dictionary = flags[0] >> 5 & 1, flags[0] >> 2 & 1, flags[0] & 3
    size = (0 if single else 1) + (0, 1, 2, 4)[dictionary] + (single, 2, 4, 8)[flags[0] >> 6]
    header = _exactly(source, size)
    start = ZSTD_MAGIC + flags + header
    window = (
        0 if single else (1 << 10 + (header[0] >> 3)) // 8 * (8 + (header[0] & 7))
    )  # single: as large as the content
    place = 0 if single else 1
    if number := int.from_bytes(header[place : place + (0, 1, 2, 4)[dictionary]], "little"):
        fix = "decompress it with `zstd -d -D DICTIONARY`"
        raise OverLimit(f"it was compressed with a zstd dictionary (number {number}), which is not in it; {fix}")
    if window > ZSTD_WINDOW:
        need = f"a zstd window of {window / 1e9:,.1f} GB, at most {ZSTD_WINDOW / 1e9:.1f} GB can be read"
        raise OverLimit(f"it needs {need}; compress it again with --long=31 or less")
    frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
    try:
        yield frame.decompress(start)
        yield from _zstd_blocks(source, frame, bool(checksum))
    except zstandard.ZstdError as error:
        if "memory" not in str(error).lower():
            raise
        raise MemoryError(f"its zstd window, {window / 1e6:,.0f} MB") from None
    except MemoryError:
        raise MemoryError(f"its zstd window, {window / 1e6:,.0f} MB") from None


def _zstd_blocks(source: BinaryIO, frame: Any, checksum: bool) -> Iterator[bytes]:
    last = False
    while not last:
        header = _exactly(source, 3)
        number = int.from_bytes(header, "little")
        last, kind, size = bool(number & 1), number >> 1 & 3, number >> 3
        yield frame.decompress(header + _exactly(source, 1 if kind == 1 else size))  # 1: one byte, repeated
    if checksum:
        yield frame.decompress(_exactly(source, 4))
    if not frame.eof:
        raise zstandard.ZstdError("a zstd frame without an end")


def _exactly(source: BinaryIO, count: int) -> bytes:
    parts = []
    while count and (data := source.read(count)):
        parts.append(data)
        count -= len(data)
    if count:
        raise EOFError("the file ends inside a zstd frame")
    return b"".join(parts)


READERS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {"gzip": _gzip, "bz2": _bz2, "xz": _xz, "zstd": _zstd}
