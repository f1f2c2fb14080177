"""Running a datatrove pipeline: on any engine, quiet, restartable, and never hanging on a worker that died.

datatrove divides the work into tasks, gives each task the pipeline, its rank and the number of tasks, and marks what is
finished. On top of that:

- Markers live in a folder named by a key of everything that goes in, so changed inputs never meet old markers.
- A marker counts only while the files it stands for are there with their sha256 (`records/`): what is complete is not redone,
  what is half-written or damaged is not believed.
- Decision: a file in an object store was read back when it was published; to read all of them again at every start may cost
  hours. As long as the store names the version (ETag, generation) that the record has, it is believed; otherwise, and where a
  store has no versions, it is read and hashed.

The executors: local.py, slurm.py, ray_cluster.py; which one is chosen: engines.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from pipeline.data.executor import progress
from pipeline.data.executor.engines import LOCAL, DryRun, Engine
from pipeline.data.executor.local import LocalExecutor
from pipeline.data.executor.markers import forget_errors
from pipeline.data.tar import remove_leftovers
from pipeline.io.remote import filesystem_of, retrying, size_of, version_of
from pipeline.io.storage import publish_json, sha256_file
from pipeline.io.urls import is_local, join, local_path

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
    local = LocalExecutor(steps, tasks=tasks, workers=workers, logging_dir=str(work.absolute()))
    local.in_process = engine.in_process
    if engine.kind == "slurm":
        from pipeline.data.executor.slurm import SlurmExecutor

        where = str(local_path(output).resolve()) if is_local(output) else str(output)
        name = f"pldr-{re.sub('[^a-z0-9]+', '-', label.lower())}-{hashlib.sha256(where.encode()).hexdigest()[:8]}"
        return SlurmExecutor(steps, tasks=tasks, workers=workers, work=work, name=name, settings=engine.slurm)
    if engine.kind == "ray":
        from pipeline.data.executor.ray import RayExecutor

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
