"""Locks between processes. All of them end with their holder, also on kill -9, so there are no stale ones."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline.errors import UserError

HELD = (errno.EACCES, errno.EAGAIN)


class NoLocks(UserError):
    """A file system that has no locks."""


def lock(stream: IO[str], *, wait: bool = False) -> bool:
    """Lock an open lock file and write our process id to it; False if another process holds the lock.

    A POSIX record lock: children do not inherit it, and it works between the clients of an NFS server. Raises NoLocks.
    """
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in HELD:
            return False
        raise NoLocks(
            f"{stream.name}: its file system has no locks ({error.strerror}); use one that has (Lustre with -o flock, NFS "
            "without nolock), or two jobs could write here at once"
        ) from error
    stream.truncate(0)
    stream.write(str(os.getpid()))
    stream.flush()
    return True


def lock_within(stream: IO[str], seconds: float | None) -> bool:
    """`lock`, waiting this long for another process to end; None: as long as it takes."""
    if seconds is None:
        return lock(stream, wait=True)
    end = time.monotonic() + seconds
    while not lock(stream):
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def lock_holder(stream: IO[str]) -> str:
    """The process id in a lock file."""
    for _ in range(10):  # it may be about to write it
        stream.seek(0)
        if holder := stream.read().strip():
            return holder
        time.sleep(0.02)
    return "?"


def is_in_place(stream: IO[str]) -> bool:
    """Whether an open file still has its name: whoever waited for a lock may have got one that was removed meanwhile."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(stream.name))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock file for a short change, waited for by processes and threads alike. A file system without locks has none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as stream:
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # not by closing alone: a forked child has the file, too
                fcntl.flock(stream, fcntl.LOCK_UN)
