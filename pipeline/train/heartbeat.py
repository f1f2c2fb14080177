"""Heartbeats: each rank keeps a small file up to date, to tell which rank is at fault when a collective fails.

A collective that times out says "timed out" and nothing else: not which rank was missing. So a thread of every rank writes
`logs/ranks/rank-N.json` once a second: what the rank does (step and phase). A rank whose collective failed
reads these files and names the rank that is gone, stopped, silent, or behind the others.

Decision: files, not keys of the rendezvous store. The store lives in rank 0, which may be the rank that hangs, and the run
directory is on a file system that all nodes see anyway (docs/cluster.md). It costs the training loop one assignment.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

Phase = Literal["start", "data", "compute", "validate", "save", "freeze", "end"]
PHASES: tuple[Phase, ...] = ("start", "data", "compute", "validate", "save", "freeze", "end")  # in the order of a step
BEAT_S = 1.0
SILENT_S = 5.0  # a file this old belongs to a process that does not run: it is rewritten every second


@dataclass(frozen=True)
class Activity:
    """What a rank does (phase) for which step, and since when (monotonic seconds)."""

    step: int
    phase: Phase
    since: float


class Heartbeat:
    """This rank's heartbeat. `at` sets what the rank does; `start` starts the thread that writes it to the file."""

    def __init__(self) -> None:
        self._activity = Activity(0, "start", time.monotonic())
        self._step_began, self._step_s = time.monotonic(), 0.0  # of the last step
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, step: int, phase: Phase) -> None:
        """The rank begins this phase of this step."""
        now = time.monotonic()
        if self._activity.phase == "compute":
            self._step_s = now - self._step_began
        if phase == "data":
            self._step_began = now
        self._activity = Activity(step, phase, now)

    @property
    def where(self) -> str:
        """What the rank does, in words."""
        return f"step {self._activity.step} ({self._activity.phase})"

    def start(self, folder: Path, job: str, rank: int, *, timeout_s: float, fail: Callable[[str], None]) -> None:
        """Write to `folder` from now on. `job`: identifies this start, so that an earlier one's files are ignored.

        fail: called once, with one line, when this rank has waited for its own data longer than timeout_s: it is not in a
        collective that could time out. (Any other wait ends with a collective's error, here or on another rank.)
        """
        folder.mkdir(parents=True, exist_ok=True)
        fixed = {"job": job, "rank": rank, "host": socket.gethostname(), "pid": os.getpid()}

        def beat() -> None:
            while True:
                activity = self._activity
                waited = time.monotonic() - activity.since
                record = {**fixed, "step": activity.step, "phase": activity.phase, "for_s": waited}
                record["step_s"] = self._step_s
                with contextlib.suppress(OSError):  # a full disk must not end a run here
                    _write(folder, rank, record)
                if activity.phase == "data" and waited > timeout_s:
                    fail(
                        f"no batch for step {activity.step} within train.timeout_s={timeout_s:g} s: its data did not arrive"
                    )
                    return
                if self._stop.wait(BEAT_S):
                    return

        self._thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop writing."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


def beats(folder: Path) -> dict[int, dict[str, Any]]:
    """The last heartbeat of each rank that has one here, also of earlier starts; "step_s" is how long its last step took."""
    found = {}
    for file in folder.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = _load(file)
            found[int(record["rank"])] = {**record, "phase": str(record["phase"])}
    return found


def _load(file: Path) -> dict[str, Any]:
    """A heartbeat; "written": when its file was, in seconds by the file system's clock."""
    with open(file, encoding="utf-8") as stream:
        record: dict[str, Any] = json.load(stream)
        return record | {"written": os.fstat(stream.fileno()).st_mtime}


def blame(folder: Path, job: str, *, me: int, world: int, closed: bool = False) -> str:
    """The rank that a failed collective of rank `me` waited for, as far as the files show. One line.

    closed: it failed because a connection was closed, so a rank that is behind did not hang but end (on another host, whose
    processes cannot be inspected).
    """
    others = {rank: _read(folder, rank, job) for rank in range(world) if rank != me}
    mine = _read(folder, me, job)
    for check in (_absent, _gone, partial(_silent, mine)):
        found = [text for rank, record in others.items() if (text := check(rank, record)) is not None]
        if found:
            return "; ".join(found)
    seen = {rank: record for rank, record in others.items() if record is not None}
    if mine is not None:
        seen[me] = mine
    progress = {rank: (r["step"], PHASES.index(r["phase"])) for rank, r in seen.items()}
    behind = [rank for rank, at in progress.items() if at < max(progress.values())]
    if behind:
        did = "ended" if closed else "hangs"
        return "; ".join(f"rank {r} {did} at step {seen[r]['step']} ({seen[r]['phase']})" for r in behind)
    names = ", ".join(f"rank {rank} on {record['host']}" for rank, record in sorted(seen.items()))
    return f"every rank is alive and at step {max(progress.values())[0]}: the network between {names} is cut"


def _absent(rank: int, record: dict[str, Any] | None) -> str | None:
    return f"rank {rank} has not started" if record is None else None


def _gone(rank: int, record: dict[str, Any] | None) -> str | None:
    """Gone, or stopped by a signal; only for a rank of this host."""
    if record is None or record["host"] != socket.gethostname():
        return None
    who = f"rank {rank} (process {record['pid']})"
    try:
        state = Path(f"/proc/{record['pid']}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return f"{who} is gone"
    return f"{who} is gone" if state in "ZX" else f"{who} is stopped" if state in "Tt" else None


def _silent(mine: dict[str, Any] | None, rank: int, record: dict[str, Any] | None) -> str | None:
    """Compared with our own file, which is rewritten every second, too: hosts' clocks differ, and may be set back."""
    assert record is not None, rank
    age = 0.0 if mine is None else mine["written"] - record["written"]
    if age <= SILENT_S:
        return None
    return f"rank {rank} on {record['host']} has given no sign of life for {age:.0f} s, since step {record['step']}"


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def _write(folder: Path, rank: int, record: dict[str, Any]) -> None:
    """Atomic for readers, but not fsynced: after a power loss there is no collective left to explain."""
    target = _file(folder, rank)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(record))
    os.replace(temporary, target)


def _read(folder: Path, rank: int, job: str) -> dict[str, Any] | None:
    try:
        record = _load(_file(folder, rank))
        return record if record["job"] == job else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
