"""Corpora: which files a `data.sources` entry names, and the documents in a file.

A source is a path, a folder, a glob, any fsspec URL, or `package://NAME/GLOB` for files inside an installed
package. Formats go by the ending: .txt and .md are one document a file, .jsonl and .ndjson one document a
line; each plain or .gz, .bz2, .xz, .zst.

Nothing is lost silently: what cannot be read comes out as a `Rejected` with its place and its mend, and the
caller stops or counts. That is why datatrove's JsonlReader is not used: it logs a line that is not JSON, or
a whole file that is not UTF-8, and goes on.
"""

from __future__ import annotations

import importlib.util
import io
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import fsspec
import orjson
import zstandard

from pipeline.errors import UserError
from pipeline.storage import CHUNK, check_url, is_local

FORMATS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl"}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
PACKAGE = "package://"
BOM = b"\xef\xbb\xbf"
SKIP = "or set data.on_bad_input=skip"


class SourceConfig(Protocol):
    """What is read of `pipeline.config.Source` (workers must not import the whole configuration, torch is
    behind it)."""

    @property
    def url(self) -> str: ...
    @property
    def text_key(self) -> str: ...
    @property
    def license(self) -> str | None: ...


@dataclass(frozen=True)
class InputFile:
    """One file to read. `name` is what documents and errors call it: the same on every machine where the
    configuration allows (relative paths and packages). `identity` changes when the file does: size, times,
    or a store's etag."""

    url: str
    name: str
    kind: str
    compression: str | None
    text_key: str
    license: str | None
    size: int
    identity: str


@dataclass(frozen=True)
class Text:
    """A document as read. `name`: the file, with #LINE behind it where a file holds many."""

    name: str
    text: str


@dataclass(frozen=True)
class Rejected:
    """Input that gives no document. `reason` is what it is counted under; `message` is the error, with its
    mend."""

    reason: str
    message: str


def find_files(sources: Iterable[SourceConfig]) -> tuple[list[InputFile], int]:
    """Every file the sources name, in a fixed order, each once; and how many files of unknown ending folders
    held.

    Raises UserError for a source that matches nothing, and for a file named outright or by a glob of unknown
    ending.
    """
    files: dict[str, InputFile] = {}
    ignored = 0
    for source in sources:
        found, whole_folder = _matches(source.url)
        for url, name, info in found:
            kind, compression = _format(name)
            if kind is None:
                if not whole_folder:
                    known = " ".join(FORMATS)
                    raise UserError(f"{name}: unknown ending; data.sources reads {known}, each also .gz .bz2 .xz .zst")
                ignored += 1
                continue
            files.setdefault(
                url,
                InputFile(
                    url=url,
                    name=name,
                    kind=kind,
                    compression=compression,
                    text_key=source.text_key,
                    license=source.license,
                    size=int(info.get("size") or 0),
                    identity=str(sorted((key, str(value)) for key, value in info.items())),
                ),
            )
    if not files:
        raise UserError(f"data.sources: no file of a known ending ({' '.join(FORMATS)}) in the folders named")
    return list(files.values()), ignored


def read_documents(file: InputFile) -> Iterator[Text | Rejected]:
    """The documents of one file, in order, streamed. Damage ends the file with a Rejected; what came before
    it counts."""
    try:
        zstd = file.compression == "zstd"
        with fsspec.open(file.url, "rb", compression=None if zstd else file.compression) as raw:
            stream = io.BufferedReader(_ZstdReader(raw) if zstd else raw, CHUNK)
            yield from _read_text(file, stream) if file.kind == "text" else _read_jsonl(file, stream)
    except FileNotFoundError:
        raise UserError(f"{file.name}: gone since the sources were listed; start again") from None
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        yield _damaged(file, error)
    except OSError as error:
        if error.errno is not None or isinstance(error, io.UnsupportedOperation):
            raise UserError(
                f"{file.name}: cannot be read ({error}); mend the file's permissions or its disk"
            ) from error
        yield _damaged(file, error)  # gzip and bz2 report damage as an OSError without a number


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a .zst file. zstandard's own reader, which fsspec uses, stops without a word where the file is
    cut, and behind the first frame of a file with many."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._in = b""
        self._out = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            self._in = self._in or self._raw.read(CHUNK // 16)
            if not self._in:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._out = memoryview(self._frame.decompress(self._in))
            self._in = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._out))
        buffer[:count] = self._out[:count]
        self._out = self._out[count:]
        return count


def _damaged(file: InputFile, error: Exception) -> Rejected:
    return Rejected("damaged_file", f"{file.name}: cut or damaged ({error}); fetch it again {SKIP}")


def _read_text(file: InputFile, stream: io.BufferedReader) -> Iterator[Text | Rejected]:
    data: bytes = stream.read().removeprefix(BOM)
    try:
        yield Text(file.name, data.decode("utf-8"))
    except UnicodeDecodeError as error:
        yield _not_utf8(file.name, error)


def _read_jsonl(file: InputFile, stream: io.BufferedReader) -> Iterator[Text | Rejected]:
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(BOM)
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        try:
            line.decode("utf-8")
            record = orjson.loads(line)
        except UnicodeDecodeError as error:
            yield _not_utf8(where, error)
            continue
        except orjson.JSONDecodeError as error:
            yield Rejected("not_json", f"{where}: not JSON ({error}); mend the line {SKIP}")
            continue
        text = record.get(file.text_key) if isinstance(record, dict) else None
        if isinstance(text, str):
            yield Text(f"{file.name}#{number}", text)
        else:
            keys = ", ".join(sorted(record)) if isinstance(record, dict) else "none, it is no object"
            message = f"{where}: no text under {file.text_key!r} (keys: {keys}); set text_key of this source {SKIP}"
            yield Rejected("no_text", message)


def _not_utf8(where: str, error: UnicodeDecodeError) -> Rejected:
    message = f"{where}: not UTF-8 at byte {error.start}; convert it (iconv -f LATIN1 -t UTF-8) {SKIP}"
    return Rejected("not_utf8", message)


def _format(name: str) -> tuple[str | None, str | None]:
    """(kind, compression) by the ending; kind None when unknown."""
    base, ending = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(ending)
    if compression is not None:
        ending = os.path.splitext(base)[1]
    return FORMATS.get(ending), compression


def _matches(url: str) -> tuple[list[tuple[str, str, dict[str, Any]]], bool]:
    """(url, name, info) of each file a source names, sorted by name; and whether it names a whole folder."""
    check_url(url)
    located, shown = _locate_package(url) if url.startswith(PACKAGE) else (url, None)
    try:
        filesystem, path = fsspec.core.url_to_fs(located)
    except (ValueError, ImportError) as error:
        raise UserError(f"data.sources: {url}: {error}") from None
    if filesystem.isdir(path):
        infos = filesystem.find(path, detail=True)
    elif filesystem.exists(path):  # before globbing: a file may have [ in its name
        infos = {path: filesystem.info(path)}
    else:
        infos = filesystem.glob(path, detail=True)
    files = {found: info for found, info in infos.items() if info.get("type") != "directory"}
    if not files:
        raise UserError(f"data.sources: {url} matches no file; mend the path or glob (** goes into folders)")
    out = []
    for found, info in sorted(files.items()):
        full = found if is_local(located) else filesystem.unstrip_protocol(found)
        if shown is not None:
            name = PACKAGE + os.path.relpath(found, shown)
        elif is_local(located) and not os.path.isabs(located.removeprefix("file://")):
            name = os.path.relpath(found)
        else:
            name = full
        out.append((full, name, info))
    return out, filesystem.isdir(path)


def _locate_package(url: str) -> tuple[str, str]:
    """Path or glob on disk for `package://NAME/GLOB`, and the folder that holds the package. Nothing is
    imported."""
    name, _, glob = url.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier() or not glob:  # a dotted name would import its parents
        raise UserError(f"data.sources: {url}: write package://NAME/GLOB with the name of a top-level package")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"data.sources: {url}: package {name} is not installed; pip install {name}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return str(folder / glob), str(folder.parent)
