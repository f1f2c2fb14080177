"""Running a datatrove pipeline: on any engine, quiet, restartable, and never hanging on a worker that died.

datatrove divides the work into tasks, gives each task the pipeline, its rank and the number of tasks, and marks what is
finished. On top of that:

- Markers live in a folder named by a key of everything that goes in, so changed inputs never meet old markers.
- A marker counts only while the files it stands for are there with their sha256 (`records/`): what is complete is not redone,
  what is half-written or damaged is not believed.
- Decision: a file in an object store was read back when it was published; to read all of them again at every start may cost
  hours. As long as the store names the version (ETag, generation) that the record has, it is believed; otherwise, and where a
  store has no versions, it is read and hashed.
- Decision: LocalPipelineExecutor's `run` is replaced by the standard library's process pool. datatrove's own pool waits for
  ever for a worker that was killed (out of memory), and leaves its manager process behind when the parent is killed. The
  other engines: engines.py.
- Workers come from a fork server: no fork of a process with threads or open fsspec filesystems (s3 breaks), and only the
  first worker pays the imports.
- What workers print (datatrove's log, C++ libraries) goes to `console.log` in the work folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import threading
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from pipeline.data import progress
from pipeline.data.engines import LOCAL, DryRun, Engine
from pipeline.data.reporting import Reporting, forget_errors, raise_error
from pipeline.data.tar import remove_leftovers
from pipeline.errors import UserError
from pipeline.remote import filesystem_of, retrying, size_of, version_of
from pipeline.storage import publish_json, sha256_file
from pipeline.urls import is_local, join, local_path

DROPPED = "dropped_"  # datatrove's filters count what they remove under this prefix; so do our readers
RECORDS = "records"


def run_tasks(
    steps: list[PipelineStep],
    *,
    tasks: int,
    workers: int,
    workers_key: str,
    work: Path,
    output: Path | str,
    engine: Engine = LOCAL,
    label: str = "",
    total_bytes: int | None = None,
) -> list[dict[str, Any]]:
    """Run the pipeline for every rank in [0, tasks) that is not complete. Returns each task's record, by rank.

    work: this job's markers, records and logs. output: the folder or URL the tasks publish their files in; its index.json
    goes away before anything in it changes. workers: tasks at once; workers_key: what a user calls that setting. label,
    total_bytes: of the progress bar.

    Raises whatever a step raises (on a cluster: always as a UserError); UserError when a worker dies; DryRun.
    """
    work.mkdir(parents=True, exist_ok=True)
    _forget_unbelievable(work, output, tasks)
    executor = _executor_of(engine, steps, tasks=tasks, workers=workers, work=work, label=label, output=output)
    ranks = executor.get_incomplete_ranks()
    if engine.dry_run:
        ranks = ranks or list(range(tasks))
        raise DryRun(executor.render(ranks), len(ranks))
    if ranks:
        if not executor.goes_on():
            _prepare(output)
            forget_errors(work)
            progress.forget(work, ranks)
        with progress.Bar(work, label, tasks=tasks, total_bytes=total_bytes):
            executor.run_ranks(ranks, console=work / "console.log", workers_key=workers_key)
    return [_read(work, RECORDS, rank) for rank in range(tasks)]


def is_complete(work: Path, output: Path | str, tasks: int) -> bool:
    """Whether every task is finished and its files are as they were left."""
    return all(
        (work / "completions" / f"{rank:05d}").is_file() and _believable(work, output, rank) for rank in range(tasks)
    )


def _executor_of(
    engine: Engine,
    steps: list[PipelineStep],
    *,
    tasks: int,
    workers: int,
    work: Path,
    label: str,
    output: Path | str,
) -> Any:
    local = _Executor(steps, tasks=tasks, workers=workers, logging_dir=str(work.absolute()))
    local.in_process = engine.in_process
    if engine.kind == "slurm":
        from pipeline.data.slurm import SlurmExecutor

        where = str(local_path(output).resolve()) if is_local(output) else str(output)
        name = f"pldr-{re.sub('[^a-z0-9]+', '-', label.lower())}-{hashlib.sha256(where.encode()).hexdigest()[:8]}"
        return SlurmExecutor(steps, tasks=tasks, workers=workers, work=work, name=name, settings=engine.slurm)
    if engine.kind == "ray":
        from pipeline.data.ray_cluster import RayExecutor

        return RayExecutor(steps, tasks=tasks, workers=workers, work=work, address=engine.ray_address, in_process=local)
    return local


def _prepare(output: Path | str) -> None:
    """An unfinished folder has no index, and nothing of a killed run's half-written files."""
    if is_local(output):
        folder = local_path(output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.json").unlink(missing_ok=True)
        remove_leftovers(folder)
        return
    index = join(output, "index.json")
    filesystem, path = filesystem_of(index)
    with contextlib.suppress(FileNotFoundError):
        retrying(index, lambda: filesystem.info(path))
        retrying(index, lambda: filesystem.rm_file(path), what="removed")


def write_record(work: Path, rank: int, record: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """What a task leaves for the index. `files`: name -> {sha256, size} of what it published; these are
    re-checked."""
    publish_json(work / RECORDS / f"{rank:05d}.json", {**record, "files": files})


def step_stats(work: Path, tasks: int) -> list[dict[str, Any]]:
    """What each step counted, in pipeline order, summed over the tasks."""
    steps: list[dict[str, Any]] = []
    for rank in range(tasks):
        for number, step in enumerate(_read(work, "stats", rank)):
            if number == len(steps):
                steps.append({"name": step["name"].rpartition(": ")[2], "stats": {}})
            for label, value in step["stats"].items():
                total = value["total"] if isinstance(value, dict) else value
                counts = steps[number]["stats"]
                counts[label] = counts.get(label, 0) + int(total)
    return steps


def _read(work: Path, kind: str, rank: int) -> Any:
    return json.loads((work / kind / f"{rank:05d}.json").read_text(encoding="utf-8"))


def _forget_unbelievable(work: Path, output: Path | str, tasks: int) -> None:
    """Remove the marker of each finished task whose record or files are not what they were."""
    for rank in range(tasks):
        marker = work / "completions" / f"{rank:05d}"
        if marker.is_file() and not _believable(work, output, rank):
            marker.unlink()


def _believable(work: Path, output: Path | str, rank: int) -> bool:
    try:
        _read(work, "stats", rank)
        files = _read(work, RECORDS, rank)["files"]
        return all(_is_unchanged(join(output, name), facts) for name, facts in files.items())
    except (OSError, ValueError, KeyError):  # a UserError is a ValueError: what cannot be read is made again
        return False


def _is_unchanged(url: str, facts: dict[str, Any]) -> bool:
    """Whether a published file is what its record says."""
    if not is_local(url):
        version = version_of(url)
        if len(version) > 1 and version == facts.get("version"):  # more than the size
            return True
    size: int = facts["size"]
    return size_of(url) == size and sha256_file(url) == facts["sha256"]


class _Executor(Reporting, LocalPipelineExecutor):  # type: ignore[misc]  # datatrove has no types
    """datatrove's local executor with a pool that notices dead workers and dies with its parent."""

    in_process = False

    def run_ranks(self, ranks: list[int], *, console: Path, workers_key: str) -> None:
        if self.in_process:
            for rank in ranks:
                self.run_rank(rank)
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *sorted({type(step).__module__ for step in self.pipeline})])
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
                raise_error(self.work)  # an exception that cannot be pickled breaks the pool too
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
