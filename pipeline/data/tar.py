"""Uncompressed tars with known offsets: the container of documents and tokens.

Any tool can read them (`tar`, stock `webdataset`): members are `{key}.{extension}`, and those of one sample are adjacent.
Every header field but name and size is fixed, so equal content gives equal bytes on any machine, on every run.

Decision: headers are written and read here, not by `webdataset.TarWriter` or the standard library. Importing webdataset imports
torch (2 s in each worker), the bytes of its archives, and so our fingerprints, would change with its version, and it does not
report the offset of a member's payload, which random access by memory map needs. The standard library takes 35 microseconds for
a document of two members, as long as SentencePiece takes for a kilobyte of text; a header is one fixed block of 512 bytes with
three fields to fill in, and a header that is not exactly that is damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tarfile
import tempfile
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from pipeline.errors import UserError
from pipeline.io.remote import filesystem_of, open_retrying, retrying, version_of
from pipeline.io.storage import explain_os_error, publish
from pipeline.io.urls import is_local, join, local_path, public_url

BLOCK = tarfile.BLOCKSIZE  # 512 bytes: headers and payloads begin at multiples of it
BUFFER = 1 << 20
MAX_NAME = tarfile.LENGTH_NAME
MAX_MEMBER = 8 * 2**30 - 1  # a ustar header has eleven octal digits for the size
LEFTOVERS = ".*.tmp"  # of a killed run: spools from here, half-published files of storage.publish
SHARDS = re.compile(r"(train|val|test)-\d{6}\.tar")
OTHER_FILES = ("index.json", "tokenizer.model")  # besides the shards
REMOTE_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]+\.tmp")  # of storage.publish


def _fixed_header() -> bytes:
    info = tarfile.TarInfo("")
    info.mode = 0o444
    return info.tobuf(tarfile.USTAR_FORMAT)


_HEADER = _fixed_header()
_MIDDLE, _END = (
    _HEADER[100:124],
    _HEADER[156:],
)  # mode, owner, group; type and everything after it. Between: size, times, sum
_TIME = _HEADER[136:148]
_SUM = (
    sum(_MIDDLE) + sum(_TIME) + sum(_END) + 8 * ord(" ")
)  # of all bytes but name and size, with the checksum field as spaces


class TarWriter:
    """Writes a tar next to its final name; `publish` renames it atomically and durably.

    target: a path or an fsspec URL. The archive of a URL is written to the local folder `spool` (default: the
    folder for temporary files) and uploaded when complete.
    """

    def __init__(self, target: Path | str, *, spool: Path | None = None) -> None:
        self.target = str(target)
        self._remote = not is_local(self.target)
        path = Path(self.target.removeprefix("file://"))
        folder = (spool or Path(tempfile.gettempdir())) if self._remote else path.parent
        folder.mkdir(parents=True, exist_ok=True)
        self._spool = folder / f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.spool.tmp"
        self._stream: BinaryIO = self._spool.open("wb", buffering=BUFFER)
        self._sha256 = hashlib.sha256()
        self._size = 0

    def add(self, name: str, *payload: bytes | memoryview) -> int:
        """Append a member, its bytes in one or more parts. Returns the byte offset of its payload.

        Raises UserError on a full disk or a member of 8 GiB or more.
        """
        size = sum(map(len, payload))
        if size > MAX_MEMBER:
            raise UserError(f"{self._shown}: member {name} has {size} bytes, at most {MAX_MEMBER}; split it")
        self._write(_header(name.encode(), size))
        offset = self._size
        for part in payload:
            self._write(part)
        self._write(bytes(-size % BLOCK))
        return offset

    def publish(self) -> dict[str, Any]:
        """Finish the archive and give it its final name. Returns {"sha256", "size"} of the file; for a URL also the store's
        "version", so that a restart can recognize the file without reading it."""
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self._size % tarfile.RECORDSIZE))
        try:
            self._stream.close()
        except OSError as error:
            raise explain_os_error(error, self._shown) from error
        # A link avoids a copy if spool and temporary files are on different disks; the upload follows it.
        publish(self.target, self._spool_as_link if self._remote else partial(os.replace, self._spool))
        facts = {"sha256": self._sha256.hexdigest(), "size": self._size}
        return {**facts, "version": version_of(self.target)} if self._remote else facts

    def _spool_as_link(self, temporary: Path) -> None:
        temporary.symlink_to(self._spool.absolute())

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self._stream.write(data)
        except OSError as error:
            raise explain_os_error(error, self._shown) from error
        self._sha256.update(data)
        self._size += len(data)

    @property
    def _shown(self) -> str:
        return public_url(self.target)

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stream.close()
        except OSError as close_error:  # from flushing the buffer on a full disk; already reported when it happened
            if error is None:
                raise explain_os_error(close_error, self._shown) from close_error
        finally:
            self._spool.unlink(missing_ok=True)


def read_members(source: Path | str) -> Iterator[tuple[str, bytes]]:
    """(name, payload) of each member of an archive of TarWriter, in order, streamed from a path or URL.

    Raises UserError naming the archive when it is missing, truncated or was not written by TarWriter. Changed bytes in a name
    or a payload do not show in the structure: check the sha256 in the index first.
    """
    shown = public_url(source)
    try:
        with _open(str(source)) as stream:
            read = stream.read
            while (header := read(BLOCK)) and header[0]:
                if (
                    header[156:] != _END
                    or header[100:124] != _MIDDLE
                    or header[136:148] != _TIME
                    or header[124:135].strip(b"01234567")
                ):
                    raise UserError(f"{shown}: damaged archive (a header was not written by pldr); make it again")
                name, size = header[:MAX_NAME].rstrip(b"\0"), int(header[124:135], 8)
                padding = -size % BLOCK
                payload = read(size)
                if len(payload) != size or (padding and len(read(padding)) != padding):
                    raise UserError(f"{shown}: damaged archive (it ends inside {name!r}); make it again")
                yield name.decode(errors="replace"), payload
            if len(header) != BLOCK:
                raise UserError(f"{shown}: damaged archive (it ends too early); make it again")
    except FileNotFoundError:
        raise UserError(f"{shown}: no such file; make it again") from None


def _open(url: str) -> BinaryIO:
    return open(url.removeprefix("file://"), "rb", BUFFER) if is_local(url) else open_retrying(url)


def _header(name: bytes, size: int) -> bytes:
    """The 512 bytes before a member: ustar, read-only, time and owner 0."""
    assert len(name) <= MAX_NAME and size <= MAX_MEMBER
    digits = b"%011o\0" % size
    total = _SUM + sum(name) + sum(digits)
    return b"%b%b%b%b%06o\0 %b" % (name.ljust(MAX_NAME, b"\0"), _MIDDLE, digits, _TIME, total, _END)


def remove_leftovers(folder: Path) -> None:
    """Delete the half-written files of killed runs in a local folder."""
    for leftover in folder.glob(LEFTOVERS):
        leftover.unlink(missing_ok=True)


def strays(folder: Path | str, keep: set[str]) -> list[str]:
    """The names of tars in a folder or below a URL that are not in `keep`, sorted."""
    if is_local(folder):
        found = [path.name for path in local_path(folder).iterdir()]
    else:
        filesystem, root = filesystem_of(str(folder))
        listed = retrying(str(folder), lambda: filesystem.ls(root, detail=False), what="listed")
        found = [path.rstrip("/").rpartition("/")[2] for path in listed]
    return sorted(name for name in found if name.endswith(".tar") and name not in keep)


def remove_strays(folder: Path | str, keep: set[str], names: re.Pattern[str] = SHARDS) -> None:
    """Delete the files in a folder or below a URL whose names match `names` and are not in `keep`: files of an earlier run
    with more shards, which a reader that globs would mix in. Also delete half-published files of killed runs at a URL.
    Nothing else is deleted: the user may keep other files in this folder."""
    if is_local(folder):
        for path in Path(str(folder).removeprefix("file://")).iterdir():
            if names.fullmatch(path.name) and path.name not in keep:
                path.unlink()
        return
    filesystem, root = filesystem_of(str(folder))
    try:
        found = retrying(str(folder), lambda: filesystem.ls(root, detail=False), what="listed")
    except FileNotFoundError:
        return  # an object store has no empty folders
    for path in found:
        name = path.rstrip("/").rpartition("/")[2]
        leftover = REMOTE_LEFTOVER.fullmatch(name)
        final = leftover["name"] if leftover else name
        if name not in keep and (names.fullmatch(final) or (leftover and final in OTHER_FILES)):
            with contextlib.suppress(FileNotFoundError):  # removed, but the response was lost
                retrying(join(folder, name), partial(filesystem.rm_file, path), what="removed")
