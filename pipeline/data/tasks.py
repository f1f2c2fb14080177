"""Running a datatrove pipeline over processes: quiet, restartable, and never hanging on a worker that died.

datatrove divides the work into tasks, gives each task the pipeline, its rank and the number of tasks, and
marks what is finished. On top of that:

- Markers live in a folder named by a key of everything that goes in, so changed inputs never meet old
  markers.
- A marker counts only while the files it stands for are there with their sha256 (`records/`): what is
  complete is not redone, what is half-written or damaged is not believed.
- Decision: LocalPipelineExecutor's `run` is replaced by the standard library's process pool. datatrove's own
  pool waits for ever for a worker that was killed (out of memory), and leaves its manager process behind
  when the parent is killed.
- Workers come from a fork server: no fork of a process with threads or open fsspec filesystems (s3 breaks),
  and only the first worker pays the imports.
- What workers print (datatrove's log, C++ libraries) goes to `console.log` in the work folder.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import threading
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from pipeline.data.tar import remove_leftovers
from pipeline.errors import UserError
from pipeline.storage import publish_json, sha256_file

DROPPED = "dropped_"  # datatrove's filters count what they remove under this prefix; so do our readers
RECORDS = "records"


def run_tasks(
    steps: list[PipelineStep], *, tasks: int, workers: int, workers_key: str, work: Path, output: Path
) -> list[dict[str, Any]]:
    """Run the pipeline for every rank in [0, tasks) that is not complete. Returns each task's record, by
    rank.

    work: this job's markers, records and logs. output: the folder the tasks publish their files in; its
    index.json goes away before anything in the folder changes. workers: processes at once; workers_key: what
    a user calls that setting.

    Raises whatever a step raises; UserError when a worker dies.
    """
    work.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    _forget_unbelievable(work, output, tasks)
    executor = _Executor(steps, tasks=tasks, workers=workers, logging_dir=str(work))
    ranks = executor.get_incomplete_ranks()
    if ranks:
        (output / "index.json").unlink(missing_ok=True)
        remove_leftovers(output)
        executor.run_ranks(ranks, console=work / "console.log", workers_key=workers_key)
    return [_read(work, RECORDS, rank) for rank in range(tasks)]


def write_record(work: Path, rank: int, record: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """What a task leaves for the index. `files`: name -> {sha256, size} of what it published; these are
    re-checked."""
    publish_json(work / RECORDS / f"{rank:05d}.json", {**record, "files": files})


def stat_totals(work: Path, tasks: int) -> dict[str, int]:
    """Total of every datatrove statistic, over steps and tasks: the counts of what was read and dropped."""
    totals: dict[str, int] = {}
    for rank in range(tasks):
        for step in _read(work, "stats", rank):
            for label, value in step["stats"].items():
                total = value["total"] if isinstance(value, dict) else value
                totals[label] = totals.get(label, 0) + int(total)
    return totals


def _read(work: Path, kind: str, rank: int) -> Any:
    return json.loads((work / kind / f"{rank:05d}.json").read_text(encoding="utf-8"))


def _forget_unbelievable(work: Path, output: Path, tasks: int) -> None:
    """Remove the marker of each finished task whose record or files are not what they were."""
    for rank in range(tasks):
        marker = work / "completions" / f"{rank:05d}"
        if marker.is_file() and not _believable(work, output, rank):
            marker.unlink()


def _believable(work: Path, output: Path, rank: int) -> bool:
    try:
        _read(work, "stats", rank)
        files = _read(work, RECORDS, rank)["files"]
        return all(
            (output / name).stat().st_size == facts["size"] and sha256_file(output / name) == facts["sha256"]
            for name, facts in files.items()
        )
    except (OSError, ValueError, KeyError):
        return False


class _Executor(LocalPipelineExecutor):  # type: ignore[misc]  # datatrove has no types
    """datatrove's local executor with a pool that notices dead workers and dies with its parent."""

    def run_ranks(self, ranks: list[int], *, console: Path, workers_key: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        pool = ProcessPoolExecutor(
            min(self.workers, len(ranks)),
            mp_context=context,
            initializer=_start_worker,
            initargs=(dict(os.environ), str(console)),
        )
        with pool:
            futures = [pool.submit(self.run_rank, rank) for rank in ranks]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                pool.shutdown(cancel_futures=True)  # tasks that run now finish: their work is kept
                for future in futures:
                    if not future.cancelled():
                        future.result()
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            except BrokenProcessPool:
                raise UserError(
                    f"a worker process died (killed, or out of memory), see {console}; lower {workers_key} or free "
                    "memory and start again, finished work is kept"
                ) from None

    def run_rank(self, rank: int) -> None:
        """One task in a worker, on its own copy of the steps: they count as they go."""
        alone = deepcopy(self)
        alone._run_for_rank(rank, local_rank=1)  # ranks other than 0 do not log to the console


def _start_worker(environment: dict[str, str], console: str) -> None:
    """Take the parent's environment (the fork server may be older), send output to a file, die with the
    parent."""
    os.environ.clear()
    os.environ.update(environment)
    handle = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # a killed parent must not leave a writer behind that outlives the next run's start

    threading.Thread(target=watch, daemon=True).start()
