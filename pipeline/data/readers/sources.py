"""Corpora: which files the `data.sources` entries name.

A source is a path, a folder, a glob, any fsspec URL, or `package://NAME/GLOB` for files inside an installed package. The
extension decides how a file is read (FORMATS, COMPRESSIONS). A folder contributes the files in it with a known extension and
counts the others; a file that is named or matched by a glob must have one. Hidden entries and our own outputs are left out of
folders and globs (left_out.py). text.py and parquet.py read the files.

A file's `name` is used for its documents in indexes and fingerprints: the source's name and the path below the fixed part of
the source's URL, so that it does not depend on where the corpus is stored. Errors show the real path or URL.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fsspec.implementations.local import LocalFileSystem

from pipeline.config.source_names import MAGIC, NOTHING, as_name, parts_of
from pipeline.data.readers.left_out import LeftOut, LocalFolders, below
from pipeline.errors import UserError, first_line
from pipeline.io.remote import filesystem_of, retrying
from pipeline.io.storage import explain_os_error, sha256_file
from pipeline.io.urls import check_url, is_http, is_local, local_path, public_url

FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".html": "html",
    ".htm": "html",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
KNOWN = f"{' '.join(FORMATS)}, each also .gz .bz2 .xz .zst"
NOT_A_FILE = "not_a_file"  # kind of an entry that is not a regular file: bad input when it is read
PACKAGE = "package://"


class SourceConfig(Protocol):
    """The fields used of `pipeline.config.data.Source` (workers must not import the whole configuration)."""

    @property
    def url(self) -> str: ...
    @property
    def name(self) -> str | None: ...
    @property
    def text_key(self) -> str: ...
    @property
    def license(self) -> str | None: ...
    @property
    def split_at(self) -> str | None: ...


@dataclass(frozen=True)
class InputFile:
    """One file to read. `source`: index in data.sources. `size`: bytes as stored, 0 if a server does not report it.
    `identity` changes when the file does: a hash of its size, times, or a store's etag; of its content in a package, which has
    other paths and times wherever it is installed. `state`: `state_of` a local one. `split_at`: what begins a document in a
    file of several (text only)."""

    url: str
    name: str
    kind: str
    compression: str | None
    text_key: str
    license: str | None
    size: int
    identity: str
    source: int
    source_name: str
    state: tuple[int, ...] = ()
    split_at: str | None = None
    packaged: bool = False

    @property
    def shown(self) -> str:
        """The real path, or URL without its secrets, for errors."""
        return public_url(self.url).removeprefix("file://")


@dataclass(frozen=True)
class _Found:
    """A match of a source: URL, path below the fixed part of the source's URL, and the filesystem's info."""

    url: str
    relative: str
    info: dict[str, Any]


def state_of(url: str) -> tuple[int, ...]:
    """What changes when a local file is written to: its size and its times, the same on every node that mounts it. Nothing for
    a file that is remote (its reader checks its version) or gone."""
    if not is_local(url):
        return ()
    try:
        facts = os.stat(local_path(url))
    except OSError:
        return ()
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def check_unchanged(file: InputFile, when: str = "while it was read") -> None:
    """Raise UserError if a local file is not as it was listed: with equal size too, its documents would be of two states."""
    if file.state and (now := state_of(file.url)) and now != file.state:
        size, before = now[0], file.state[0]
        what = f"changed {when}" if size == before else f"{size} bytes, {before} when the sources were listed"
        raise UserError(f"{file.shown}: {what}; start again when nothing writes to it")


@dataclass(frozen=True)
class Listing:
    """The files of the sources. `ignored`: files in folders with an unknown extension. `hidden`, `ours`: entries of folders
    and globs that were left out, each without what is in it."""

    files: list[InputFile]
    ignored: int
    hidden: tuple[str, ...]
    ours: tuple[str, ...]


def find_files(sources: Iterable[SourceConfig]) -> tuple[list[InputFile], int]:
    """The files of `list_sources`, and how many files in folders have an unknown extension."""
    listing = list_sources(sources)
    return listing.files, listing.ignored


def list_sources(sources: Iterable[SourceConfig], *, outputs: Iterable[str] = ()) -> Listing:
    """Every file that the sources name, once, in a fixed order. outputs: folders that this run writes.

    Raises UserError for a source that matches nothing new, a file with an unknown extension that is named or matched by a
    glob, or a missing package.
    """
    listed, written = list(sources), list(outputs)
    left: list[LeftOut] = []
    found = [_matches(source.url, written, left) for source in listed]
    names = _names(listed, [how for how, _ in found])
    files: dict[str, InputFile] = {}
    ignored = 0
    for number, (source, (how, matches)) in enumerate(zip(listed, found, strict=True)):
        before, ignored_before = len(files), ignored
        packaged = source.url.startswith(PACKAGE)
        for match in matches:
            kind, compression = _format(match)
            if kind is None:
                if how != "folder":
                    raise UserError(f"{public_url(match.url)}: unknown extension; data.sources reads {KNOWN}")
                ignored += 1
            elif source.split_at is not None and kind not in ("text", NOT_A_FILE):
                raise UserError(
                    f"data.sources: {public_url(match.url)}: split_at cuts txt and md only; remove it or name only those"
                )
            elif match.url not in files:
                files[match.url] = InputFile(
                    url=match.url,
                    name=f"{names[number]}/{match.relative}",
                    kind=kind,
                    compression=compression,
                    text_key=source.text_key,
                    license=source.license,
                    size=int(match.info.get("size") or 0),
                    identity=_identity(match, packaged),
                    source=number,
                    source_name=names[number],
                    state=state_of(match.url),
                    split_at=source.split_at,
                    packaged=packaged,
                )
        if len(files) == before and ignored == ignored_before:
            shown = public_url(source.url)
            raise UserError(
                f"data.sources: {shown} names only files that earlier sources name; remove it or list it first"
            )
    if not files:
        raise UserError(f"data.sources: no file with a known extension ({' '.join(FORMATS)}) in these folders")
    _check_html(files.values())
    hidden, ours = ({path for each in left for path in getattr(each, kind)} for kind in ("hidden", "ours"))
    return Listing(list(files.values()), ignored, tuple(sorted(hidden)), tuple(sorted(ours)))


def _matches(url: str, outputs: list[str], left: list[LeftOut]) -> tuple[str, list[_Found]]:
    """How a source names its files ("folder", "file", "glob"), and what it matches, sorted. What was left out is added to
    `left`."""
    check_url(url)
    located = _locate_package(url) if url.startswith(PACKAGE) else url
    filesystem, path = filesystem_of(located)
    try:
        if is_http(located):
            how, fixed, infos = "file", path.rpartition("/")[0], {path: _http_info(located, filesystem, path)}
        elif is_local(located):
            how, fixed, infos = _list(filesystem, path, outputs, left)
        else:
            how, fixed, infos = retrying(located, lambda: _list(filesystem, path, outputs, left))
    except FileNotFoundError:
        infos = {}
    except OSError as error:
        raise explain_os_error(error, f"data.sources: {public_url(url)}", reading=True) from error
    except ValueError as error:  # from fsspec: `**` inside a name, a URL without a bucket
        if isinstance(error, UserError):
            raise
        raise UserError(f"data.sources: {public_url(url)}: {first_line(error)}; fix the path or glob") from None
    if not infos:
        fix = "fix the path or glob (** matches nested folders)"
        if is_local(url) and "::" in url:
            fix = "`::` starts a chained URL; rename the file"
        if left and left[-1].ours:
            raise UserError(
                f"data.sources: {public_url(url)} matches only what pldr itself wrote ({min(left[-1].ours)}); name the files "
                "one by one to read them"
            )
        if left and left[-1].hidden:
            fix = f"hidden entries ({min(left[-1].hidden)}) are read only where a path or glob names them"
        raise UserError(f"data.sources: {public_url(url)} matches no file; {fix}")
    out = []
    for name, info in sorted(infos.items()):
        if not _is_unicode(name):
            shown = os.fsencode(name).decode("utf-8", "backslashreplace")
            raise UserError(f"data.sources: {shown}: this name is not valid UTF-8; rename the file")
        full = name if is_local(located) else filesystem.unstrip_protocol(name)
        relative = name[len(fixed) :].lstrip("/") if name.startswith(fixed) else name
        if is_http(located):
            full, relative = located, public_url(located).rpartition("/")[2]
        out.append(_Found(full, relative, _follow(name, info) if is_local(located) else info))
    return how, out


def _is_unicode(name: str) -> bool:
    """Whether a name can be encoded as UTF-8: bytes of a file system that cannot come as lone surrogates."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _list(
    filesystem: Any, path: str, outputs: list[str], left: list[LeftOut]
) -> tuple[str, str, dict[str, dict[str, Any]]]:
    """(how, fixed part of the path, path -> info) of files, and of folders where a file is expected."""
    is_folder = filesystem.isdir(path)
    if not is_folder and filesystem.exists(path):  # before globbing: a file name may contain [
        return "file", path.rpartition("/")[0], {path: filesystem.info(path)}
    fixed = path if is_folder else MAGIC.split(path)[0].rpartition("/")[0]
    local = isinstance(filesystem, LocalFileSystem)
    left_out = LeftOut(
        fixed,
        filesystem.exists,
        is_cheap=local,
        outputs=below(filesystem, outputs),
        real_root=os.path.realpath(fixed) if local else fixed,
        take_hidden="/." in path[len(fixed) :],
    )
    left.append(left_out)
    if local:
        filesystem = LocalFolders(left_out)
    if is_folder:
        infos = filesystem.find(path, detail=True)
        return "folder", path, {n: i for n, i in infos.items() if i["type"] != "directory" and not left_out.has(n)}
    infos = {n: i for n, i in filesystem.glob(path, detail=True).items() if n == fixed or not left_out.has(n)}
    files = sorted(name for name, info in infos.items() if info["type"] != "directory")
    for name in [name for name in infos if infos[name]["type"] == "directory"]:
        inside = name.rstrip("/") + "/"
        if any(file.startswith(inside) for file in files):
            del infos[name]  # `**` also matches the folders above the files
        elif _extension(name)[0] is None:
            if any(not left_out.has(entry.rstrip("/")) for entry in filesystem.ls(name, detail=False)):
                raise UserError(f"data.sources: {name} is a folder; end the glob with /** to read its files")
            del infos[name]
    return "glob", fixed, infos


def _follow(path: str, info: dict[str, Any]) -> dict[str, Any]:
    """Info of the target of a local link: fsspec reports the link's own times, which do not change with the file."""
    if info["type"] != "other" or not info.get("islink"):
        return info
    try:
        facts = os.stat(path)
    except OSError:
        return info
    kind = "file" if stat.S_ISREG(facts.st_mode) else "directory" if stat.S_ISDIR(facts.st_mode) else "other"
    return {"type": kind, "size": facts.st_size, "mtime": facts.st_mtime, "ino": facts.st_ino}


def _http_info(url: str, filesystem: Any, path: str) -> dict[str, Any]:
    if MAGIC.search(public_url(url)):
        raise UserError(f"data.sources: {public_url(url)}: web servers cannot be listed; list each file by its URL")
    info: dict[str, Any] = retrying(url, lambda: filesystem.info(path))
    return info


def _format(match: _Found) -> tuple[str | None, str | None]:
    """(kind, compression); kind is None for an unknown extension."""
    kind, compression = _extension(match.relative)
    if match.info["type"] != "file" and (kind is not None or match.info["type"] == "directory"):
        return NOT_A_FILE, None  # a folder here is a link to one; real folders were listed
    return kind, compression


def _extension(name: str) -> tuple[str | None, str | None]:
    base, extension = os.path.splitext(name.lower().rstrip("/"))
    compression = COMPRESSIONS.get(extension)
    if compression is not None:
        extension = os.path.splitext(base)[1]
    return FORMATS.get(extension), compression


def _identity(match: _Found, packaged: bool) -> str:
    if packaged and (file := local_path(match.url)).is_file():
        return sha256_file(file)
    facts = sorted((key, str(value)) for key, value in match.info.items() if key not in ("name", "url", "Key"))
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _names(sources: list[SourceConfig], hows: list[str]) -> list[str]:
    """Each source's name: as configured, or from its URL, with -2, -3 ... if it is taken."""
    taken: set[str] = set()
    for given in (source.name for source in sources if source.name is not None):
        if given in taken:
            raise UserError(f"data.sources: two sources are named {given}; rename one of them")
        taken.add(given)
    names = []
    for source, how in zip(sources, hows, strict=True):
        name = source.name
        if name is None:
            base = _derived_name(source.url, how)
            name = next(n for n in (base, *(f"{base}-{i}" for i in range(2, len(sources) + 2))) if n not in taken)
            taken.add(name)
        names.append(name)
    return names


def _derived_name(url: str, how: str) -> str:
    """The last fixed component of a URL: a folder's name, the last folder before a glob, or a file's name without
    extensions."""
    parts = parts_of(url)
    if how == "glob":
        parts = parts[: next(i for i, part in enumerate(parts) if MAGIC.search(part))]
    name = parts[-1] if parts else NOTHING
    while how == "file" and os.path.splitext(name.lower())[1] in {*FORMATS, *COMPRESSIONS}:
        name = os.path.splitext(name)[0]
    return as_name(name)


def _check_html(files: Iterable[InputFile]) -> None:
    page = next((file for file in files if file.kind == "html"), None)
    if page is not None and any(importlib.util.find_spec(name) is None for name in ("trafilatura", "lxml_html_clean")):
        raise UserError(f"{page.shown}: reading web pages needs trafilatura; pip install 'pldr[html]'")


def _locate_package(url: str) -> str:
    """Path or glob on disk for `package://NAME/GLOB`. Nothing is imported."""
    name, _, glob = url.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier() or not glob:  # find_spec of a dotted name would import its parents
        raise UserError(f"data.sources: {url}: write package://NAME/GLOB with the name of a top-level package")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"data.sources: {url}: package {name} is not installed; pip install {name}")
    return str(Path(next(iter(spec.submodule_search_locations))) / glob)
