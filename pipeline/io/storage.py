"""Files: atomic publishing, checksums, manifests, free space. fsspec URLs wherever data may be remote.

- A local file is written as a temporary sibling, fsynced, then renamed: a reader sees the old file or the new one. The folder
  is fsynced too, because otherwise a power failure can undo the rename.
- On an object store a failing `with open(url, "wb")` can still publish a truncated object, so `publish` writes a local file
  first, uploads it under a temporary name, reads it back, and only then copies it to the final name.
- `pipe:` URLs run a shell in webdataset: `check_url` refuses them everywhere.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fsspec import AbstractFileSystem

from pipeline.errors import UserError, first_line
from pipeline.io.limits import limit_of
from pipeline.io.remote import filesystem_of, open_retrying, retrying
from pipeline.io.urls import check_url, is_http, is_local, join, public_url

MANIFEST = "MANIFEST.json"
CHUNK = 1 << 20
TAKEN = (errno.ENOTEMPTY, errno.EEXIST)  # the name of a folder


def sha256_file(url: str | Path) -> str:
    """Hex sha256 of a file's bytes, streamed."""
    digest = hashlib.sha256()
    with open_retrying(str(url)) as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a value's canonical JSON: the fingerprint of configurations and indexes."""
    try:
        return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()
    except RecursionError:  # a damaged file, that could just be read
        return hashlib.sha256(b"nested too deeply").hexdigest()


def canonical_json(value: Any) -> str:
    """Compact JSON with sorted keys: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def fsync_dir(path: Path) -> None:
    """Make renames inside a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(url: str | Path, write: Callable[[Path], None]) -> None:
    """Create a file atomically: `write(temporary)` fills it, then it is renamed.

    Raises UserError if the disk is full or the store refuses, with nothing new under the final name.
    """
    check_url(str(url))
    target = Path(str(url).removeprefix("file://")) if is_local(url) else None
    folder = target.parent if target is not None else Path(tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{Path(str(url)).name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        write(temporary)
        if target is None:
            _upload(temporary, str(url))
            return
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, target)
        fsync_dir(folder)
    except OSError as error:
        raise explain_os_error(error, public_url(url)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _upload(source: Path, url: str) -> None:
    """Upload a file under a temporary name, read it back, and rename it if the content is correct."""
    if is_http(url):
        raise UserError(
            f"{public_url(url)}: web servers are for reading; name a folder or an object store (s3://, gs://)"
        )
    filesystem, path = filesystem_of(url)
    parent, _, name = path.rpartition("/")
    temporary = f"{parent}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary_url = join(url.rpartition("/")[0], temporary.rpartition("/")[2])
    size, sha256 = source.stat().st_size, sha256_file(source)
    try:
        if _can_rename(filesystem):  # so it has folders
            retrying(url, lambda: filesystem.makedirs(parent, exist_ok=True), what="written")
        retrying(url, lambda: filesystem.put_file(str(source), temporary), what="written")
        if sha256_file(temporary_url) != sha256:
            raise UserError(f"{public_url(url)}: the store returned other bytes than were sent; start again")
        retrying(url, lambda: _rename(filesystem, temporary, path, size), what="written")
    finally:
        with contextlib.suppress(Exception):  # already renamed; or the earlier error is the one to raise
            retrying(url, lambda: filesystem.rm_file(temporary), what="removed")


def _rename(filesystem: Any, old: str, new: str, size: int) -> None:
    """Rename if the filesystem can; otherwise (object stores) copy, which is atomic too."""
    filesystem.invalidate_cache()
    if _can_rename(filesystem):
        if filesystem.exists(old):  # else an earlier attempt did it, but its response was lost
            filesystem.mv(old, new)
    else:
        filesystem.cp_file(old, new)
    filesystem.invalidate_cache()
    found = filesystem.info(new)["size"]
    if found != size:
        filesystem.rm_file(new)
        raise OSError(f"{found} bytes under the final name, {size} were sent")


def _can_rename(filesystem: Any) -> bool:
    return type(filesystem).mv is not AbstractFileSystem.mv  # which copies and deletes


def publish_bytes(url: str | Path, data: bytes) -> None:
    """`publish` for bytes."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    publish(url, write)


def publish_json(url: str | Path, value: Any) -> None:
    """`publish` for JSON, formatted by `render_json`."""
    publish_bytes(url, render_json(value))


def render_json(value: Any) -> bytes:
    """Readable JSON: indented, sorted keys, final newline; equal values give equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def parse_json(data: bytes | str) -> Any:
    """`json.loads` that raises ValueError for everything that JSON does not have: NaN, other encodings, endless nesting."""
    try:
        return json.loads(data.decode() if isinstance(data, bytes) else data, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON value")


def read_json(url: str | Path, *, schema_version: int | None = None) -> Any:
    """Parse a JSON file. Raises UserError naming the file if it is absent, truncated, or has another schema version."""
    try:
        with open_retrying(check_url(str(url))) as stream:
            value = parse_json(stream.read())
    except FileNotFoundError:
        raise UserError(f"{public_url(url)}: no such file") from None
    except IsADirectoryError:
        raise UserError(
            f"{public_url(url)}: is a folder, a file is expected; move it away and make the file again"
        ) from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{public_url(url)}: not valid JSON ({error}); it was damaged: make it again") from None
    if schema_version is not None:
        found = value.get("schema_version") if isinstance(value, dict) else None
        if found != schema_version:
            raise UserError(
                f"{public_url(url)}: schema_version {found!r}, this program reads {schema_version}; make it again"
            )
    return value


def exists(url: str | Path) -> bool:
    """Whether a file or folder exists."""
    if is_local(url):
        return Path(str(url).removeprefix("file://")).exists()
    filesystem, path = filesystem_of(str(url))
    try:
        retrying(str(url), lambda: filesystem.info(path))
    except FileNotFoundError:
        return False
    return True


def manifest_of(folder: Path, *, leave_out: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """`relative name -> {sha256, size}` of every file below a local folder, names sorted."""
    skip = {MANIFEST, *leave_out}
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return {
        name: {"sha256": sha256_file(folder / name), "size": (folder / name).stat().st_size}
        for name in names
        if name not in skip
    }


def verify_manifest(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Check existence, size and hash of every file of a manifest. Raises UserError naming the first wrong one."""
    for name, expected in files.items():
        path = folder / safe_member(name)
        if not path.is_file():
            raise UserError(f"{path}: missing, but {MANIFEST} lists it")
        if path.stat().st_size != expected["size"]:
            raise UserError(f"{path}: {path.stat().st_size} bytes, {MANIFEST} says {expected['size']}: damaged")
        if sha256_file(path) != expected["sha256"]:
            raise UserError(f"{path}: sha256 differs from {MANIFEST}: damaged")


def require_unsealed(target: Path) -> None:
    """Nothing is written into a folder whose files a manifest lists: it would not be valid any more. Raises UserError."""
    resolved = target.resolve()
    for folder in (resolved, *resolved.parents):
        if (folder / MANIFEST).is_file():
            raise UserError(f"{target}: {folder} holds verified files ({MANIFEST}), and no others; name another folder")


def safe_member(name: str) -> str:
    """The name, if it stays below its folder. Raises UserError for `../x`, absolute or empty names."""
    parts = Path(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise UserError(f"{name!r}: a member name must stay inside its folder")
    return name


@contextlib.contextmanager
def publish_dir(target: Path) -> Iterator[Path]:
    """Create a folder atomically: fill the yielded one; it is renamed when the block ends without an error."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        replace_dir(temporary, target)
    except OSError as error:
        raise explain_os_error(error, str(target)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_dir(temporary: Path, target: Path) -> None:
    """Rename a finished folder to its final name, replacing an older one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    renamed = False
    while not renamed:
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
        with contextlib.suppress(FileNotFoundError):
            os.replace(target, old)
        try:
            os.replace(temporary, target)
            renamed = True
        except OSError as error:
            if error.errno not in TAKEN:  # else another process has put its own there meanwhile
                raise
        fsync_dir(target.parent)
        shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class Need:
    """Bytes that will be written below a folder (which may not exist yet). fix: how to write them to another disk."""

    folder: Path
    bytes: int
    what: str
    fix: str = "set run_dir to another disk"


def require_free_space(folder: Path, needed: int, what: str) -> None:
    """Raise UserError if fewer than `needed` bytes are free on the disk of `folder` (which may not exist yet)."""
    require_space([Need(folder, needed, what)])


def require_space(needs: Iterable[Need]) -> None:
    """Raise UserError if on any disk fewer bytes are free than all that is written to it needs. It names the largest need."""
    disks: dict[int, list[Need]] = {}
    for need in needs:
        disks.setdefault(_existing(need.folder).stat().st_dev, []).append(need)
    for there in disks.values():
        needed, largest = sum(need.bytes for need in there), max(there, key=lambda need: need.bytes)
        free = shutil.disk_usage(_existing(largest.folder)).free
        if free < needed:
            named = [need.what for need in sorted(there, key=lambda need: -need.bytes) if need.bytes]
            raise UserError(
                f"{largest.folder}: about {needed / 1e6:,.0f} MB are needed for {', '.join(named)}, {free / 1e6:,.0f} MB are "
                f"free; free some space or {largest.fix}"
            )


def path_of(stream: IO[bytes]) -> Path:
    """A path to an open file without a name (`tempfile.TemporaryFile`), which is gone when this process is, however it ends."""
    return Path(f"/proc/self/fd/{stream.fileno()}")


def temporary_space(needed: int, what: str) -> Need:
    """A need of the folder for temporary files."""
    return Need(Path(tempfile.gettempdir()), needed, what, "set TMPDIR to a folder on another disk")


def bytes_below(folder: Path, pattern: str = "**/*") -> int:
    """The size of the files in a folder: what an earlier start has already written there."""
    return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file()) if folder.is_dir() else 0


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def explain_os_error(error: OSError, where: str, *, reading: bool = False) -> UserError:
    """An error such as a full disk, a missing permission or a limit of the system as one line with the fix."""
    if limit := limit_of(error):
        return UserError(f"{where}: {limit}")
    if "No usable temporary directory" in str(error):
        return UserError(f"TMPDIR: {error.strerror}; set it to a folder that can be written")
    if reading:
        return UserError(f"{where}: cannot be read ({first_line(error)}); fix the file's permissions or its disk")
    if error.errno in (errno.EACCES, errno.EROFS):
        return UserError(f"{where}: cannot be written ({error.strerror}); set run_dir to a folder that can")
    return UserError(f"{where}: {error}")
