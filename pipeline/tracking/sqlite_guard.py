"""A lock that keeps SQLite from removing a store's log under an open connection.

Who closes the last connection to a database in WAL mode removes `-wal` and `-shm`. The last one is whoever can lock the whole
file, and SQLite's locks are POSIX's: a process loses those it has on a file when it closes any descriptor of it, for instance
when a notebook copies `mlflow.db` while its own MLflow client is open. The next process that ends is then the last one, and
the client is left with a log that has no name: "disk I/O error", and what it writes is lost.

A lock of an open file description (fcntl(2), Linux) stands in the way of SQLite's and is not lost in this manner. Every process
of ours holds one, shared, on each store that it has opened. So no log is removed by us, and none under us.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import sys
import threading
from pathlib import Path

SHARED = (
    0x40000000 + 2,
    510,
)  # the bytes that a reader locks and the last connection must lock alone (SQLite's os_unix.c)
_lock = threading.Lock()
_descriptors: dict[tuple[int, int], int] = {}  # never closed: that would lose SQLite's locks of this process
_held: set[tuple[int, int]] = set()


def keep_log(file: Path) -> None:
    """Keep the log of a database in WAL mode until this process ends. Of a database in another mode it would stop writers."""
    if sys.platform != "linux":
        return
    status = file.stat()
    key = (status.st_dev, status.st_ino)
    with _lock, contextlib.suppress(OSError):  # also of a file system without such locks
        if key not in _descriptors:
            _descriptors[key] = os.open(file, os.O_RDONLY)
        if key not in _held:
            flock = struct.pack("hhqqi0q", fcntl.F_RDLCK, os.SEEK_SET, *SHARED, 0)
            fcntl.fcntl(_descriptors[key], fcntl.F_OFD_SETLK, flock)
            _held.add(key)
