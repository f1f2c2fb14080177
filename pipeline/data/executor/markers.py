"""What tasks leave in the work folder of their job: completion markers, records of their files, and errors.

    completions/{rank:05d}     datatrove's marker of a finished task
    records/{rank:05d}.json    what the task counted, and size and sha256 of the files it published
    errors/{rank:05d}.json     why it failed

Slurm and Ray do not return an exception to the waiting process (datatrove's Ray executor drops it), so a task that fails writes
its error here, and the waiting process raises it, in one line if it was a user's mistake. After a task has failed, no further
task starts; running tasks finish, and their work is kept.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import dill
from datatrove.utils.stats import PipelineStats

from pipeline.data.executor import progress
from pipeline.errors import UserError, first_line
from pipeline.io.limits import limit_of
from pipeline.io.remote import size_of, version_of
from pipeline.io.sealed import publish_sealed, read_sealed
from pipeline.io.storage import publish_bytes, publish_json, read_json, sha256_file
from pipeline.io.urls import is_local, join

RECORDS = "records"
STATS = "stats"  # datatrove's
ERRORS = "errors"
# Version of the pickled executors that Slurm and Ray jobs run. A pickle names modules and classes: raise this when one of them
# moves or changes its fields. A job of another version is never joined: it is refused while it runs, and started anew after.
PICKLE_VERSION = 3


class Reporting:
    """Mixin for datatrove's executors, listed before them: tasks count their progress and write down their errors."""

    logging_dir: Any

    @property
    def work(self) -> Path:
        """The job's folder for markers, records, errors and logs."""
        return Path(self.logging_dir.path)

    @property
    def cluster_folder(self) -> Path:
        """Where the pickled executor, and what else belongs to a job on a cluster, is kept."""
        return self.work / f"cluster-v{PICKLE_VERSION}"

    @property
    def pickle(self) -> Path:
        """The pickled executor that the processes of the cluster load."""
        return self.cluster_folder / "executor.pik"

    def dump(self, executor: Any) -> None:
        """Write `pickle`. An unfinished job of another version has its own folder."""
        self.cluster_folder.mkdir(parents=True, exist_ok=True)
        with open(self.pickle, "wb") as stream:
            dill.dump(executor, stream)

    def still_running(self) -> bool:
        """Whether the tasks of an earlier start are still running on their own. Only Slurm's can be."""
        return False

    def _run_for_rank(self, rank: int, *arguments: Any, **options: Any) -> Any:
        if has_failed(self.work):
            return PipelineStats()
        try:
            with progress.counting(self.work, rank):
                stats = super()._run_for_rank(rank, *arguments, **options)  # type: ignore[misc]  # of the executor
            _seal_stats(self.work, rank)
            return stats
        except Exception as error:
            leave_error(self.work, rank, error)
            raise


def leave_error(work: Path, rank: int, error: Exception) -> None:
    """Write down why a task failed, for the waiting process."""
    if isinstance(error, OSError) and (limit := limit_of(error)):
        error = UserError(f"{error.filename or f'task {rank}'}: {limit}")
    user = isinstance(error, UserError)
    facts = {
        "message": str(error) if user else f"{type(error).__name__}: {first_line(error)}",
        "user": user,
        "exit_code": getattr(error, "exit_code", 1) if user else 1,
    }
    with contextlib.suppress(UserError, OSError):  # a full disk: the task's own error is the one to report
        publish_json(work / ERRORS / f"{rank:05d}.json", facts)


def has_failed(work: Path) -> bool:
    """Whether any task has failed."""
    return any((work / ERRORS).glob("*.json"))


def raise_error(work: Path) -> None:
    """Raise the error of the first task that failed, as a UserError."""
    for file in sorted((work / ERRORS).glob("*.json")):
        facts = read_json(file)
        if facts["user"]:
            raise UserError(facts["message"], exit_code=facts["exit_code"])
        rank = int(file.stem)
        raise UserError(f"task {rank} failed ({facts['message']}); see {work / 'logs' / f'task_{rank:05d}.log'}")


def forget_errors(work: Path) -> None:
    """Remove the errors of an earlier start."""
    shutil.rmtree(work / ERRORS, ignore_errors=True)


def is_complete(work: Path, output: Path | str, tasks: int) -> bool:
    """Whether every task is finished and its files are unchanged."""
    return all(
        (work / "completions" / f"{rank:05d}").is_file() and _is_intact(work, output, rank) for rank in range(tasks)
    )


def write_record(work: Path, rank: int, record: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Write a task's record for the index. `files`: name -> {sha256, size} of what it published, to be checked again later."""
    publish_sealed(work / RECORDS / f"{rank:05d}.json", {**record, "files": files})


def _seal_stats(work: Path, rank: int) -> None:
    """Datatrove writes a task's counts, which become part of the index, without a checksum: it is written beside them."""
    file = work / STATS / f"{rank:05d}.json"
    if file.is_file():
        publish_bytes(file.with_suffix(".sha256"), sha256_file(file).encode())


def has_stats(work: Path, tasks: int) -> bool:
    """Whether the counts of every task are there and undamaged."""
    try:
        return all(isinstance(read_record(work, STATS, rank), list) for rank in range(tasks))
    except (OSError, UserError):
        return False


def step_stats(work: Path, tasks: int) -> list[dict[str, Any]]:
    """The counts of each step, in pipeline order, summed over tasks."""
    steps: list[dict[str, Any]] = []
    for rank in range(tasks):
        for number, step in enumerate(read_record(work, STATS, rank)):
            if number == len(steps):
                steps.append({"name": step["name"].rpartition(": ")[2], "stats": {}})
            for label, value in step["stats"].items():
                total = value["total"] if isinstance(value, dict) else value
                counts = steps[number]["stats"]
                counts[label] = counts.get(label, 0) + int(total)
    return steps


def read_record(work: Path, kind: str, rank: int) -> Any:
    """A task's JSON file of this kind, RECORDS or STATS. Raises UserError when it is damaged."""
    file = work / kind / f"{rank:05d}.json"
    if kind == RECORDS:
        return read_sealed(file)
    sha256 = file.with_suffix(".sha256")
    if sha256.is_file() and sha256.read_bytes() != sha256_file(file).encode():
        raise UserError(f"{file}: its sha256 is not the one beside it: damaged; start again")
    return read_json(file)


def remove_stale_markers(work: Path, output: Path | str, tasks: int) -> None:
    """Remove the marker of each finished task whose record or files are missing, changed or damaged."""
    for rank in range(tasks):
        marker = work / "completions" / f"{rank:05d}"
        if marker.is_file() and not _is_intact(work, output, rank):
            marker.unlink()


def _is_intact(work: Path, output: Path | str, rank: int) -> bool:
    try:
        read_record(work, STATS, rank)
        files = read_record(work, RECORDS, rank)["files"]
        return all(_is_unchanged(join(output, name), facts) for name, facts in files.items())
    # A UserError is a ValueError. Files that cannot be read are made again.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_unchanged(url: str, facts: dict[str, Any]) -> bool:
    """Whether a published file matches its record."""
    if not is_local(url):
        version = version_of(url)
        if len(version) > 1 and version == facts.get("version"):  # it holds more than the size
            return True
    size: int = facts["size"]
    return size_of(url) == size and sha256_file(url) == facts["sha256"]
