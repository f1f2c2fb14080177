"""Limits of the system that an operation ran into: which one, and the fix. A file or a network is not to blame for them."""

from __future__ import annotations

import errno
import resource

KEPT = "and start again, finished work is kept"


def limit_of(error: BaseException) -> str | None:
    """The limit that an error, or one of its causes, is about, and the fix; None for any other error."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        number = getattr(cause, "errno", None)
        if isinstance(number, int) and (limit := _limit(number)):
            return limit
        cause = getattr(cause, "os_error", None) or cause.__cause__ or cause.__context__
    return None


def _limit(number: int) -> str | None:
    if number == errno.ENOSPC:
        return f"the disk is full; free some space {KEPT}"
    if number == errno.EDQUOT:
        return f"your quota of the disk is used up; free some space {KEPT}"
    if number == errno.EMFILE:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"too many open files, a process may have {most:,} here; raise that (`ulimit -n 65536`) {KEPT}"
    if number == errno.ENFILE:
        return f"too many open files on this machine (sysctl fs.file-max); close some {KEPT}"
    if number == errno.ENOMEM:
        return f"not enough memory; free some, or lower the number of workers, {KEPT}"
    if number == errno.EFBIG:
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        which = "of this file system" if most == resource.RLIM_INFINITY else f"of {most:,} bytes (`ulimit -f`)"
        return f"a file would be larger than the limit {which}; raise it, or write to another disk, {KEPT}"
    if number == errno.ENAMETOOLONG:
        return "the name or path is too long for this file system; shorten it"
    return None
