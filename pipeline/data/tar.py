"""Uncompressed tars with known offsets: the container of documents and tokens.

Any tool reads them (`tar`, stock `webdataset`): members are `{key}.{extension}`, those of one sample follow
one another. Every header field but name and size is fixed, so equal content is equal bytes, on any machine,
on every run.

Decision: headers come from the standard library, not from `webdataset.TarWriter`. Importing webdataset
imports torch (2 s in each worker), its archives' bytes would change with its version and our fingerprints
with them, and it does not tell where a member's payload begins, which is what makes random access by memory
map possible.
"""

from __future__ import annotations

import os
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.errors import UserError
from pipeline.storage import explain_os_error, publish, sha256_file

BLOCK = tarfile.BLOCKSIZE  # 512 bytes: headers and payloads begin at multiples of it
MAX_MEMBER = 8 * 2**30 - 1  # a ustar header has eleven octal digits for the size
LEFTOVERS = ".*.tmp"  # what a killed run leaves: spools here, half-published files of storage.publish


class TarWriter:
    """Writes a tar beside its final name; `publish` gives it that name, whole and durable, or not at all."""

    def __init__(self, target: Path) -> None:
        self.target = target
        target.parent.mkdir(parents=True, exist_ok=True)
        self._spool = target.parent / f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.spool.tmp"
        self._stream = self._spool.open("wb", buffering=1 << 20)

    def add(self, name: str, payload: bytes | memoryview) -> int:
        """Append a member. Returns the byte offset of its payload.

        Raises UserError on a full disk or a member of 8 GiB or more.
        """
        size = len(payload)
        if size > MAX_MEMBER:
            raise UserError(f"{self.target}: member {name} has {size} bytes, at most {MAX_MEMBER}; cut it")
        info = tarfile.TarInfo(name)
        info.size = size
        info.mode = 0o444
        try:
            self._stream.write(info.tobuf(tarfile.USTAR_FORMAT))
            offset = self._stream.tell()
            self._stream.write(payload)
            self._stream.write(bytes(-size % BLOCK))
        except OSError as error:
            raise explain_os_error(error, str(self.target)) from error
        return offset

    def publish(self) -> dict[str, Any]:
        """End the archive and give it its name. Returns {"sha256", "size"} of the file."""
        try:
            self._stream.write(bytes(2 * BLOCK))
            self._stream.write(bytes(-self._stream.tell() % tarfile.RECORDSIZE))
            self._stream.close()
            facts = {"sha256": sha256_file(self._spool), "size": self._spool.stat().st_size}
        except OSError as error:
            raise explain_os_error(error, str(self.target)) from error
        publish(self.target, lambda temporary: os.replace(self._spool, temporary))
        return facts

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stream.close()
        except OSError as close_error:  # the buffer of a full disk; it was reported when it happened
            if error is None:
                raise explain_os_error(close_error, str(self.target)) from close_error
        finally:
            self._spool.unlink(missing_ok=True)


def read_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, payload) of each member in order, streamed. Raises UserError naming the archive when it is
    damaged."""
    try:
        with tarfile.open(path, "r|") as archive:
            for info in archive:
                stream = archive.extractfile(info)
                if stream is None:
                    raise UserError(f"{path}: member {info.name} is not a file; this is no archive of ours")
                yield info.name, stream.read()
                archive.members = []  # type: ignore[attr-defined]  # or all headers stay in memory
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; make it again") from None
    except tarfile.TarError as error:
        raise UserError(f"{path}: damaged archive ({error}); make it again") from None


def remove_leftovers(folder: Path) -> None:
    """Delete what killed runs left half-written in a folder."""
    for leftover in folder.glob(LEFTOVERS):
        leftover.unlink(missing_ok=True)
