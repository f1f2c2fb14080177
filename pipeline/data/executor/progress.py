"""Progress of a job: counted in the workers, shown by the process that waits for them.

A worker writes its task's counts to `work/progress/{rank:05d}.json`, at most twice a second, on every engine: the run directory
is on a file system that all nodes share. The waiting process adds them up. On a terminal it draws one bar and leaves one line
when the job is done; otherwise it prints one line a minute.

Counts are for display only: they are not fsynced, and a full disk does not stop the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

FOLDER = "progress"
SECONDS = 0.5  # between two writes of a task, and between two reads of them
LOG_SECONDS = 60.0
LAYOUT = "{desc} {percentage:3.0f}% {remaining} left |{bar}| {n_fmt}/{total_fmt}B {rate_fmt}{postfix}"


@dataclass
class Counts:
    """What a task has processed so far."""

    documents: int = 0
    bytes: int = 0
    done: bool = False


class _Task:
    """The task that this process is running, if any."""

    file: Path | None = None
    counts = Counts()
    written = 0.0


_task = _Task()


@contextmanager
def counting(work: Path, rank: int) -> Iterator[None]:
    """While the block runs, `advance` counts for this task; if it ends without an error, the task is done."""
    _task.file, _task.counts = work / FOLDER / f"{rank:05d}.json", Counts()
    try:
        _write(_task.file)
        yield
        _task.counts.done = True
    finally:
        _write(_task.file)
        _task.file = None


def advance(documents: int = 1, bytes: int = 0) -> None:
    """Add to the counts of the current task; outside of a task do nothing. Cheap: steps call it for every document."""
    if _task.file is None:
        return
    _task.counts.documents += documents
    _task.counts.bytes += bytes
    if time.monotonic() - _task.written > SECONDS:
        _write(_task.file)


def _write(file: Path) -> None:
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    counts = _task.counts
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps([counts.documents, counts.bytes, counts.done]))
        os.replace(temporary, file)  # a reader never sees a partial file
    _task.written = time.monotonic()


def tell(line: str) -> None:
    """Print a line for the user on stderr, above the bar if there is one."""
    with contextlib.suppress(OSError):  # nobody reads it
        tqdm.write(line, file=sys.stderr)


def forget(work: Path, ranks: list[int]) -> None:
    """Reset the counts of tasks that start again."""
    for rank in ranks:
        (work / FOLDER / f"{rank:05d}.json").unlink(missing_ok=True)


class Counter:
    """Adds up a job's tasks; the files of finished tasks are read once."""

    def __init__(self, work: Path) -> None:
        self._folder = work / FOLDER
        self._done: dict[str, Counts] = {}

    def read(self) -> list[Counts]:
        """The counts of every task that has started, now or in an earlier start."""
        found = dict(self._done)
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self._folder):
                if entry.name in self._done or not entry.name.endswith(".json"):
                    continue
                with contextlib.suppress(OSError, ValueError, TypeError):  # gone or damaged: for display only
                    counts = Counts(*json.loads(Path(entry.path).read_bytes()))
                    found[entry.name] = counts
                    if counts.done:
                        self._done[entry.name] = counts
        return list(found.values())


def expected_bytes(counts: list[Counts], *, tasks: int, total_bytes: int) -> int:
    """Estimate of the bytes that the job will have read in the end, from the plan and from finished tasks.

    The plan is an estimate (compressed sources, documents that an earlier job removed), and tasks are about equal, so the mean
    of the finished ones is a better and better estimate for the others.
    """
    done = [task.bytes for task in counts if task.done]
    mean = (total_bytes / tasks + sum(done)) / (1 + len(done))  # the plan has the weight of one task
    running = [max(mean, task.bytes) for task in counts if not task.done]
    return round(sum(done) + sum(running) + mean * max(0, tasks - len(counts)))


class Bar:
    """Shows a job's progress while the block runs: a bar when stderr is a terminal, log lines otherwise.

    total_bytes: of text, estimated; None for a job that is counted in tasks.
    """

    def __init__(self, work: Path, label: str, *, tasks: int, total_bytes: int | None) -> None:
        self._counter = Counter(work)
        self._label = label or "job"
        self._tasks = tasks
        self._total_bytes = total_bytes
        self._ended = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)

    def __enter__(self) -> Bar:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._failed = kind is not None
        self._ended.set()
        self._thread.join()

    def _show(self) -> None:
        if sys.stderr.isatty():
            self._draw()
        else:
            self._log()

    def _draw(self) -> None:
        before = self._counter.read()
        if self._ended.wait(2 * SECONDS):
            return  # already finished: no bar needed
        in_tasks = self._total_bytes is None
        started = time.monotonic()
        sys.stderr.write("\r\033[K")  # clear a status line that may be there
        with tqdm(
            total=self._total(before),
            initial=self._position(before),  # so that the rate is that of this start
            desc=self._label,
            bar_format=LAYOUT.replace("B {rate_fmt}", " tasks") if in_tasks else LAYOUT,
            unit="task" if in_tasks else "B",
            unit_scale=not in_tasks,
            dynamic_ncols=True,
            leave=False,
            smoothing=0.1,
            mininterval=0,
            miniters=1,
            file=sys.stderr,
        ) as bar:
            over = False
            while not over:
                over = self._ended.wait(SECONDS)
                counts = self._counter.read()
                bar.total = self._total(counts)
                bar.set_postfix_str(_documents(counts), refresh=False)
                if not bar.update(max(0, self._position(counts) - bar.n)):
                    bar.refresh()
        if not self._failed:
            print(self._summary(counts, before, 2 * SECONDS + time.monotonic() - started), file=sys.stderr)

    def _log(self) -> None:
        started, before = time.monotonic(), self._counter.read()
        while not self._ended.wait(LOG_SECONDS):
            counts = self._counter.read()
            share = self._position(counts) / max(1, self._total(counts))
            tell(f"{100 * share:3.0f}% of {self._summary(counts, before, time.monotonic() - started)}")

    def _position(self, counts: list[Counts]) -> int:
        if self._total_bytes is None:
            return sum(task.done for task in counts)
        return sum(task.bytes for task in counts)

    def _total(self, counts: list[Counts]) -> int:
        if self._total_bytes is None:
            return self._tasks
        return max(1, expected_bytes(counts, tasks=self._tasks, total_bytes=self._total_bytes))

    def _summary(self, counts: list[Counts], before: list[Counts], seconds: float) -> str:
        done, new = (sum(task.bytes for task in tasks) for tasks in (counts, before))
        parts = [f"{sum(task.done for task in counts)} of {self._tasks} tasks", _documents(counts)]
        if done:
            parts.append(f"{done / 1e6:,.1f} MB, {(done - new) / 1e6 / seconds:,.1f} MB/s")
        return f"{self._label}: {', '.join(part for part in parts if part)} in {tqdm.format_interval(seconds)}"


def _documents(counts: list[Counts]) -> str:
    documents = sum(task.documents for task in counts)
    return f"{documents:,} documents" if documents else ""
