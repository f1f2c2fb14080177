"""Running a datatrove pipeline on any engine: quiet, restartable, and never hanging on a worker that died.

datatrove divides the work into tasks, gives each task the pipeline, its rank and the number of tasks, and marks finished
tasks. On top of that:

- Markers are kept in a folder named by a hash of all inputs, so changed inputs never meet old markers.
- A marker counts only while the task's files exist with their recorded sha256 (`records/`): complete tasks are not run again,
  half-written or damaged files are made again.
- Decision: a file in an object store was read back when it was published, and reading all of them again at every start could
  take hours. It counts as unchanged while the store reports the version (ETag, generation) in the record; otherwise, and where
  a store has no versions, it is read and hashed.

Where tasks run (`data.executor`), each one a datatrove executor:

    local  processes of this machine        local.py
    slurm  a job array, one element a task  slurm.py
    ray    processes of a Ray cluster       ray.py

A task does the same in each of them (markers.py), so the results are byte-identical. Slurm and Ray need `run_dir`, and
`data.output` if it is a folder, on a file system that every node mounts at the same path, and the same installation on every
node. Both pass the pipeline as a pickle, `executor.pik` in run_dir: anyone who can write to run_dir can run programs as you on
the nodes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove.pipeline.base import PipelineStep

from pipeline.data.executor import progress
from pipeline.data.executor.local import LocalExecutor
from pipeline.data.executor.markers import RECORDS, forget_errors, read_record, remove_stale_markers
from pipeline.data.tar import remove_leftovers
from pipeline.errors import ConfigError, UserError
from pipeline.io.remote import filesystem_of, retrying
from pipeline.io.urls import is_local, join, local_path

if TYPE_CHECKING:
    from pipeline.config.data import DataConfig

DROPPED = "dropped_"  # prefix under which datatrove's filters, and our readers, count what they remove


@dataclass(frozen=True)
class Engine:
    """Where tasks run. slurm: `data.slurm` as plain values. dry_run: only write and check the scripts. in_process: one task
    after another in this process, because only this process can see memory:// files."""

    kind: str = "local"
    slurm: dict[str, Any] = field(default_factory=dict)
    ray_address: str = "auto"
    dry_run: bool = False
    in_process: bool = False


LOCAL = Engine()


class DryRun(Exception):
    """Not an error: the Slurm scripts of a job were written and checked, but nothing was submitted.

    script: the first; scripts: all of them, one per array of the job. tasks: how many they run.
    """

    def __init__(self, scripts: list[Path], tasks: int) -> None:
        super().__init__(f"{tasks} tasks: {', '.join(map(str, scripts))}")
        self.script = scripts[0]
        self.scripts = scripts
        self.tasks = tasks


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

    work: folder of this job's markers, records and logs. output: the folder or URL where tasks publish their files; its
    index.json is removed before anything in it changes. workers: tasks at once; workers_key: the name of that setting in the
    configuration. label, total_bytes: for the progress bar.

    Raises whatever a step raises (on a cluster always as a UserError); UserError when a worker dies; DryRun.
    """
    work.mkdir(parents=True, exist_ok=True)
    remove_stale_markers(work, output, tasks)
    executor = _executor_of(engine, steps, tasks=tasks, workers=workers, work=work, label=label, output=output)
    ranks = executor.get_incomplete_ranks()
    if engine.dry_run:
        ranks = ranks or list(range(tasks))
        raise DryRun(executor.render(ranks), len(ranks))
    if ranks:
        if not executor.still_running():
            _prepare(output)
            forget_errors(work)
            progress.forget(work, ranks)
        with progress.Bar(work, label, tasks=tasks, total_bytes=total_bytes):
            executor.run_ranks(ranks, console=work / "console.log", workers_key=workers_key)
    return [read_record(work, RECORDS, rank) for rank in range(tasks)]


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

        target = str(local_path(output).resolve()) if is_local(output) else str(output)
        name = f"pldr-{re.sub('[^a-z0-9]+', '-', label.lower())}-{hashlib.sha256(target.encode()).hexdigest()[:8]}"
        return SlurmExecutor(steps, tasks=tasks, workers=workers, work=work, name=name, settings=engine.slurm)
    if engine.kind == "ray":
        from pipeline.data.executor.ray import RayExecutor

        return RayExecutor(steps, tasks=tasks, workers=workers, work=work, address=engine.ray_address, in_process=local)
    return local


def _prepare(output: Path | str) -> None:
    """Remove the index, which an unfinished folder must not have, and the half-written files of a killed run."""
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


def engine_of(data: DataConfig, *, dry_run: bool = False, output: str | None = None) -> Engine:
    """The engine that a configuration selects. output: `tokens.output`, for stage tokenize. Raises UserError when the engine
    cannot be used here."""
    evaluation = data.clean.decontaminate.files if data.clean.decontaminate else []
    urls = [source.url for source in data.sources] + [url for url in (data.output, output, *evaluation) if url]
    in_process = any(url.startswith("memory://") for url in urls)
    if in_process and data.executor != "local":
        raise ConfigError(
            f"memory:// is visible to one process only, data.executor is {data.executor}; set it to local"
        )
    if dry_run and data.executor != "slurm":
        raise ConfigError(f"--dry-run writes Slurm scripts, data.executor is {data.executor}; set data.executor=slurm")
    if data.executor == "slurm" and not dry_run and shutil.which("sbatch") is None:
        raise UserError(
            "data.executor is slurm, but there is no sbatch on this machine; run it on a login node, check the script with "
            "--dry-run, or set data.executor=local"
        )
    if data.executor == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError("data.executor is ray, but ray is not installed; pip install 'pldr[ray]'")
    return Engine(data.executor, data.slurm.model_dump(), data.ray_address, dry_run, in_process)
