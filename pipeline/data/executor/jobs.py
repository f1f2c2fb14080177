"""Running a datatrove pipeline: on any engine, quiet, restartable, and never hanging on a worker that died.

datatrove divides the work into tasks, gives each task the pipeline, its rank and the number of tasks, and marks what is
finished. On top of that:

- Markers live in a folder named by a key of everything that goes in, so changed inputs never meet old markers.
- A marker counts only while the files it stands for are there with their sha256 (`records/`): what is complete is not redone,
  what is half-written or damaged is not believed.
- Decision: a file in an object store was read back when it was published; to read all of them again at every start may cost
  hours. As long as the store names the version (ETag, generation) that the record has, it is believed; otherwise, and where a
  store has no versions, it is read and hashed.

Where tasks run (`data.executor`), all of them datatrove's executors:

    local  processes of this machine        local.py
    slurm  a job array, one task an element slurm.py
    ray    processes of a Ray cluster       ray.py

A task does the same in each of them (markers.py), so the result has the same bytes. Slurm and Ray need `run_dir`, and
`data.output` where it is a folder, on a file system that every node sees at the same path, and the same installation on every
node. Both hand the pipeline over as a pickle, `executor.pik` in run_dir: whoever may write to run_dir may run programs as you
on the nodes.
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
from pipeline.data.executor.markers import RECORDS, forget_errors, forget_unbelievable, read_record
from pipeline.data.tar import remove_leftovers
from pipeline.errors import ConfigError, UserError
from pipeline.io.remote import filesystem_of, retrying
from pipeline.io.urls import is_local, join, local_path

if TYPE_CHECKING:
    from pipeline.config.data import DataConfig

DROPPED = "dropped_"  # datatrove's filters count what they remove under this prefix; so do our readers


@dataclass(frozen=True)
class Engine:
    """Where tasks run. slurm: `data.slurm` as plain values. dry_run: only write the scripts and check them. in_process: one
    after the other in this process, which alone sees what memory:// holds."""

    kind: str = "local"
    slurm: dict[str, Any] = field(default_factory=dict)
    ray_address: str = "auto"
    dry_run: bool = False
    in_process: bool = False


LOCAL = Engine()


class DryRun(Exception):
    """Not an error: the Slurm scripts of a job were written and checked, and nothing was submitted.

    script: the first; scripts: all, one for each array of the job. tasks: how many they run.
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

    work: this job's markers, records and logs. output: the folder or URL the tasks publish their files in; its index.json
    goes away before anything in it changes. workers: tasks at once; workers_key: what a user calls that setting. label,
    total_bytes: of the progress bar.

    Raises whatever a step raises (on a cluster: always as a UserError); UserError when a worker dies; DryRun.
    """
    work.mkdir(parents=True, exist_ok=True)
    forget_unbelievable(work, output, tasks)
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


def engine_of(data: DataConfig, *, dry_run: bool = False, output: str | None = None) -> Engine:
    """The engine a configuration asks for. output: `tokens.output`, of stage tokenize. Raises UserError when the engine cannot
    be used here."""
    evaluation = data.clean.decontaminate.files if data.clean.decontaminate else []
    urls = [source.url for source in data.sources] + [url for url in (data.output, output, *evaluation) if url]
    in_process = any(url.startswith("memory://") for url in urls)
    if in_process and data.executor != "local":
        raise ConfigError(f"memory:// is seen by one process only, data.executor is {data.executor}; set it to local")
    if dry_run and data.executor != "slurm":
        raise ConfigError(f"--dry-run writes Slurm scripts, data.executor is {data.executor}; set data.executor=slurm")
    if data.executor == "slurm" and not dry_run and shutil.which("sbatch") is None:
        raise UserError(
            "data.executor is slurm, but there is no sbatch on this machine; start it where there is (a login node), look at "
            "the script with --dry-run, or set data.executor=local"
        )
    if data.executor == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError("data.executor is ray, but ray is not installed; pip install 'pldr[ray]'")
    return Engine(data.executor, data.slurm.model_dump(), data.ray_address, dry_run, in_process)
