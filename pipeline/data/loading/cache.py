"""What the ranks of a node share on its local disk: blocks of remote shards, and stamps of shards that were checked.

Both are in one folder that belongs to the user (mode 0700): $XDG_CACHE_HOME/pldr, else pldr-UID in the temporary folder.
Decision: not ~/.cache, which on clusters is a network disk shared by all nodes.

Ranks are separate processes that start in any order and may be killed at any time, so everything here is a lock that ends with
its holder (flock), a rename, or a file that may be deleted at any time. Cached data is never trusted: a block is checked
against its sha256 whenever it is opened.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import shutil
import socket
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from pipeline.errors import UserError, first_line

Buffer = bytes | mmap.mmap

LOCKS = 512  # lock files of blocks: more would only use inodes, fewer would make ranks wait without need
FREE_SHARE = 0.05  # of the disk, at most MOST_FREE bytes, is left free for others
MOST_FREE = 2 << 30
LOW_WATER = 0.9  # of the limit is kept when old blocks are evicted, so that evictions are rare
STAMPS_LIVE_S = 30 * 86400.0
UNFINISHED = ".tmp"
LEFTOVER_S = 3600.0
log = logging.getLogger(__name__)


def node_folder() -> Path:
    """The user's folder on this node, created if necessary. Raises UserError if it belongs to someone else."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) / "pldr" if base.startswith("/") else Path(tempfile.gettempdir()) / f"pldr-{os.getuid()}"
    fix = "set XDG_CACHE_HOME to a folder of your own on this node's disk"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = os.lstat(folder)
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
            raise UserError(f"{folder}: not a folder of this user; {fix}")
        if facts.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise UserError(f"{folder}: cannot be used as the cache ({error.strerror}); {fix}") from None
    return folder


class Stamps:
    """What a job has checked on this node, so that its other ranks do not check it again.

    job: name of the job, the same on all its ranks and different for each start, so that every start checks once.
    """

    def __init__(self, job: str, folder: Path | None = None) -> None:
        self._folder: Path | None = None
        try:
            parent = (node_folder() if folder is None else folder) / "stamps"
        except UserError as error:
            log.warning("%s; each rank checks for itself", error)
            return
        self._folder = parent / hashlib.sha256(f"{socket.gethostname()}|{job}".encode()).hexdigest()[:24]
        old = time.time() - STAMPS_LIVE_S
        for other in parent.glob("*"):
            with contextlib.suppress(OSError):
                if other.stat().st_mtime < old:
                    shutil.rmtree(other, ignore_errors=True)

    def once(self, what: str, check: Callable[[], None]) -> None:
        """Run `check` unless a rank of this job already did for the same `what`; wait for a rank that is running it.

        A check that raises leaves no stamp. If nothing can be written, every rank checks for itself.
        """
        if self._folder is None:
            return check()
        with contextlib.ExitStack() as stack:
            try:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                name = hashlib.sha256(what.encode()).hexdigest()[:40]
                stamp = stack.enter_context(_locked(self._folder / name))
                if os.fstat(stamp.fileno()).st_size:
                    return
            except OSError as error:
                log.warning("%s: %s; each rank checks for itself", self._folder, error.strerror)
                stamp = None
            check()
            if stamp is not None:
                with contextlib.suppress(OSError):
                    stamp.write(b"checked")


class NodeCache:
    """Blocks on the node's disk, one file each, at most `limit` bytes; the least recently used are evicted first.

    A rank can still read a block that is removed meanwhile, because it holds the file open.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        self.folder = (node_folder() if folder is None else folder) / "blocks"
        self.limit = limit
        self._warned = False

    def get(self, name: str, sha256: str, fetch: Callable[[], bytes]) -> Buffer:
        """The bytes whose sha256 begins with `sha256`: from the disk, else from `fetch`, called once on this node.

        fetch: returns the right bytes or raises. A full or broken disk costs speed, but does not stop the run.
        """
        path = self.folder / name[:2] / name
        if (found := _open_block(path, sha256)) is not None:
            return found
        with self._lock(f"block-{int(hashlib.sha256(name.encode()).hexdigest(), 16) % LOCKS:03d}"):
            if (found := _open_block(path, sha256)) is not None:  # another rank has fetched it
                return found
            data = fetch()
            try:
                stored = self._store(path, data)
            except OSError as error:
                self._warn(error)
                stored = False
            return (_open_block(path, sha256) if stored else None) or data

    def _store(self, path: Path, data: bytes) -> bool:
        """Write a block; False if there is no room for it even after eviction. One rank at a time, because another one would
        not count a block that is being written."""
        if len(data) > self.limit:
            return False
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._lock("held") as stream:
            held = _read_number(stream)
            if held is None or held + len(data) > self.limit or self._missing_space(len(data)) > 0:
                held = self._evict(len(data))
            fits = held + len(data) <= self.limit and self._missing_space(len(data)) <= 0
            if fits:
                self._write(path, data)
                held += len(data)
            if stream is not None:
                stream.truncate(0)
                stream.write(b"%d" % held)
        return fits

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{UNFINISHED}")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            held = sum(size for _, size, _ in self._files())
            self.limit = min(self.limit, int(held * LOW_WATER))  # a quota, or a disk filled by others: shrink
            raise

    def _missing_space(self, size: int) -> int:
        """Bytes missing on the disk to write `size` more and leave the free share to others; negative if there is room."""
        disk = shutil.disk_usage(self.folder)
        return size + min(int(disk.total * FREE_SHARE), MOST_FREE) - disk.free

    def _evict(self, size: int) -> int:
        """Remove the least recently used blocks until there is room for `size` bytes. Returns the bytes kept."""
        files = sorted(self._files())
        held = sum(size for _, size, _ in files)
        goal = min(self.limit - size, held - max(0, self._missing_space(size)))
        if held <= goal:
            return held
        goal = min(goal, int(self.limit * LOW_WATER))
        for _, length, path in files:
            if held <= goal:
                break
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            held -= length
        return held

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of every block. Removes half-written files of killed ranks."""
        for folder in self.folder.glob("[0-9a-f][0-9a-f]"):
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):  # another rank may remove it first
                    facts = entry.stat()
                    if entry.name.endswith(UNFINISHED) and facts.st_mtime < time.time() - LEFTOVER_S:
                        os.unlink(entry.path)
                    else:
                        yield facts.st_mtime, facts.st_size, Path(entry.path)

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[IO[bytes] | None]:
        """Hold a lock of the node; None if the disk does not support locks: then a block may be fetched more than once."""
        with contextlib.ExitStack() as stack:
            try:
                (self.folder / "locks").mkdir(mode=0o700, parents=True, exist_ok=True)
                stream = stack.enter_context(_locked(self.folder / "locks" / name))
            except OSError as error:
                self._warn(error)
                yield None
                return
            yield stream

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            log.warning("%s: %s; the cache is used as far as possible", self.folder, first_line(error))
        self._warned = True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """An open file under an exclusive lock, for which threads and processes wait. Unlocked explicitly, not by closing,
    because a forked child has the open file too."""
    with open(path, "a+b", buffering=0) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield stream
        finally:
            fcntl.flock(stream, fcntl.LOCK_UN)


def _read_number(stream: IO[bytes] | None) -> int | None:
    if stream is None:
        return None
    stream.seek(0)
    text = stream.read(32)
    return int(text) if text.isdigit() else None


def _open_block(path: Path, sha256: str) -> Buffer | None:
    """A block of the cache, mapped, if it exists and is intact; updates its time of use. A damaged one is removed."""
    try:
        with open(path, "rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest().startswith(sha256):
                data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
                os.utime(path)
                return data
        log.warning("%s: damaged in the cache; it is fetched again", path)
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s: %s; it is fetched again", path, first_line(error))
    return None
