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
from pipeline.io.storage import publish_json

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
