"""Around a task, in whatever process and on whatever machine it runs: how far it is, and why it failed.

Slurm and Ray do not bring an exception back to the process that waits (datatrove's Ray executor even drops it), so a task
that fails leaves its error in `work/errors/{rank:05d}.json`, and the waiting process raises it: in one line where it was a
user's mistake. Once a task has failed, tasks that have not begun do not begin; those that run finish, their work is kept.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from datatrove.utils.stats import PipelineStats

from pipeline.data.executor import progress
from pipeline.errors import UserError, first_line
from pipeline.io.remote import size_of, version_of
from pipeline.io.storage import publish_json, sha256_file
from pipeline.io.urls import is_local, join

RECORDS = "records"


ERRORS = "errors"


class Reporting:
    """For datatrove's executors, to be named before them: tasks count their progress and leave their errors."""

    logging_dir: Any

    @property
    def work(self) -> Path:
        """The job's folder of markers, records, errors and logs."""
        return Path(self.logging_dir.path)

    def goes_on(self) -> bool:
        """Whether an earlier start's tasks still run, by themselves. Only Slurm's do."""
        return False

    def _run_for_rank(self, rank: int, *arguments: Any, **options: Any) -> Any:
        if has_failed(self.work):
            return PipelineStats()
        try:
            with progress.counting(self.work, rank):
                return super()._run_for_rank(rank, *arguments, **options)  # type: ignore[misc]  # of the executor
        except Exception as error:
            leave_error(self.work, rank, error)
            raise


def leave_error(work: Path, rank: int, error: Exception) -> None:
    """Write down why a task failed, for the process that waits for it."""
    user = isinstance(error, UserError)
    facts = {
        "message": str(error) if user else f"{type(error).__name__}: {first_line(error)}",
        "user": user,
        "exit_code": getattr(error, "exit_code", 1) if user else 1,
    }
    with contextlib.suppress(UserError, OSError):  # a full disk: what the task said about it counts
        publish_json(work / ERRORS / f"{rank:05d}.json", facts)


def has_failed(work: Path) -> bool:
    """Whether some task left an error."""
    return any((work / ERRORS).glob("*.json"))


def raise_error(work: Path) -> None:
    """Raise the error of the first task that left one, as a UserError."""
    for file in sorted((work / ERRORS).glob("*.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        if facts["user"]:
            raise UserError(facts["message"], exit_code=facts["exit_code"])
        rank = int(file.stem)
        raise UserError(f"task {rank} failed ({facts['message']}); see {work / 'logs' / f'task_{rank:05d}.log'}")


def forget_errors(work: Path) -> None:
    """A new start begins without the errors of the last."""
    shutil.rmtree(work / ERRORS, ignore_errors=True)


def is_complete(work: Path, output: Path | str, tasks: int) -> bool:
    """Whether every task is finished and its files are as they were left."""
    return all(
        (work / "completions" / f"{rank:05d}").is_file() and _believable(work, output, rank) for rank in range(tasks)
    )


def write_record(work: Path, rank: int, record: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """What a task leaves for the index. `files`: name -> {sha256, size} of what it published; these are
    re-checked."""
    publish_json(work / RECORDS / f"{rank:05d}.json", {**record, "files": files})


def step_stats(work: Path, tasks: int) -> list[dict[str, Any]]:
    """What each step counted, in pipeline order, summed over the tasks."""
    steps: list[dict[str, Any]] = []
    for rank in range(tasks):
        for number, step in enumerate(read_record(work, "stats", rank)):
            if number == len(steps):
                steps.append({"name": step["name"].rpartition(": ")[2], "stats": {}})
            for label, value in step["stats"].items():
                total = value["total"] if isinstance(value, dict) else value
                counts = steps[number]["stats"]
                counts[label] = counts.get(label, 0) + int(total)
    return steps


def read_record(work: Path, kind: str, rank: int) -> Any:
    return json.loads((work / kind / f"{rank:05d}.json").read_text(encoding="utf-8"))


def forget_unbelievable(work: Path, output: Path | str, tasks: int) -> None:
    """Remove the marker of each finished task whose record or files are not what they were."""
    for rank in range(tasks):
        marker = work / "completions" / f"{rank:05d}"
        if marker.is_file() and not _believable(work, output, rank):
            marker.unlink()


def _believable(work: Path, output: Path | str, rank: int) -> bool:
    try:
        read_record(work, "stats", rank)
        files = read_record(work, RECORDS, rank)["files"]
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
