"""How far a job is: counted in the workers, shown in the process that waits for them.

A worker leaves its task's counts in `work/progress/{rank:05d}.json` twice a second at most, whatever the engine: the run
directory is on a file system that all see. On a terminal the parent adds them up and draws one bar; elsewhere it is silent.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

FOLDER = "progress"
SECONDS = 0.5


class _Task:
    """The task this process works on."""

    file: Path | None = None
    documents = 0
    bytes = 0
    written = 0.0


_task = _Task()


def begin(work: Path, rank: int) -> None:
    """This process begins a task."""
    _task.file = work / FOLDER / f"{rank:05d}.json"
    _task.file.parent.mkdir(parents=True, exist_ok=True)
    _task.documents = _task.bytes = 0
    _write()


def advance(documents: int = 1, bytes: int = 0) -> None:
    """So much more is done. Cheap: called for every document."""
    _task.documents += documents
    _task.bytes += bytes
    if _task.file is not None and time.monotonic() - _task.written > SECONDS:
        _write()


def end() -> None:
    """The task is done."""
    if _task.file is not None:
        _write()
        _task.file = None


def _write() -> None:
    assert _task.file is not None
    temporary = _task.file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps([_task.documents, _task.bytes]))
    os.replace(temporary, _task.file)  # a reader never sees half of it; no fsync, it is gone tomorrow
    _task.written = time.monotonic()


def read(work: Path) -> tuple[int, int]:
    """(documents, bytes) of all tasks so far, those of an earlier start too."""
    documents = size = 0
    for file in (work / FOLDER).glob("*.json"):
        try:
            counts = json.loads(file.read_text())
        except (OSError, ValueError):  # a task that starts again
            continue
        documents, size = documents + counts[0], size + counts[1]
    return documents, size


class Bar:
    """A bar with rate and time left while the block runs, when stderr is a terminal."""

    def __init__(self, work: Path, label: str, total_bytes: int | None) -> None:
        self.work = work
        self.label = label
        self.total = total_bytes
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            self._thread = threading.Thread(target=self._draw, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _draw(self) -> None:
        _, before = read(self.work)
        with tqdm(
            total=self.total,
            initial=before,  # the rate is of this start
            desc=self.label,
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            leave=False,
            file=sys.stderr,
        ) as bar:
            while not self._stop.wait(SECONDS / 2):
                documents, size = read(self.work)
                if bar.total is not None:
                    bar.total = max(bar.total, size)  # it was an estimate
                bar.n = size
                bar.set_postfix_str(f"{documents:,} documents", refresh=True)
