"""Watching job arrays in Slurm's queue, and telling the user what happens there: why they wait, that they can never start, that
the controller does not answer, how a task ended."""

from __future__ import annotations

import time
from collections.abc import Mapping

from tqdm import tqdm

from pipeline import slurm
from pipeline.data.executor.progress import tell
from pipeline.errors import UserError

TELL_SECONDS = 60.0  # between two lines about the same
PATIENCE = 60  # looks in a row that squeue may fail: controllers restart


class Watch:
    """What is known about some arrays. fixes: what to change, by subject (slurm.fix_of); ends: what to do about a task, by the
    state it ended in."""

    def __init__(self, jobs: list[str], *, fixes: Mapping[str, str], ends: Mapping[str, str]) -> None:
        self._ids, self._fixes, self._ends = set(jobs), fixes, ends
        self._name = f"Slurm job {' '.join(jobs)}"
        self.ended: dict[str, str] = {}  # element -> state; the controller soon forgets it
        self._failures = self._never = 0
        self._quiet_since = time.monotonic()
        self._said, self._said_at = "PENDING", time.monotonic()  # at first there is no reason yet

    def look(self) -> bool | None:
        """Whether any of the arrays is queued or runs; None while the controller does not answer.

        Raises UserError when they can never start (then they are canceled), and when the controller is gone for long.
        """
        try:
            ours = [job for job in slurm.queue() if job.id in self._ids]
        except UserError as error:
            self._failures += 1
            if self._failures == PATIENCE:
                raise
            self._say(f"Slurm is unreachable, running tasks continue: {error}", same="no answer")
            return None
        self._failures = 0
        self._note_ended(ours)
        there = [job for job in ours if not job.ended]
        waiting = [job for job in there if job.waits]
        if there and len(waiting) == len(there):
            self._wait(waiting)
        elif there:
            if self._said:
                tell(f"{self._name} runs")
            self._said, self._never, self._quiet_since = "", 0, time.monotonic()
        return bool(there)

    def _note_ended(self, ours: list[slurm.Job]) -> None:
        for job in ours:
            if job.ended and job.element not in self.ended:
                self.ended[job.element] = job.state
                if job.state in ("TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL") and self._first(job.state):
                    tell(f"Slurm job {job.element} ended as {job.state}: {self._ends[job.state]}; the others continue")

    def _first(self, state: str) -> bool:
        return list(self.ended.values()).count(state) == 1

    def _wait(self, waiting: list[slurm.Job]) -> None:
        """All that is left waits: say why. Arrays after the first wait for that one."""
        job = next((job for job in waiting if job.why != "Dependency"), waiting[0])
        again = self._said == job.why
        self._never = (self._never if again else 0) + 1 if slurm.never_starts(job.why) else 0
        if self._never == slurm.SURE:
            slurm.give_up(self._name, sorted(self._ids), job.why, self._fixes)
        fix = slurm.release_hint(job.id, job.why)
        since = tqdm.format_interval(time.monotonic() - self._quiet_since)
        self._say(f"{self._name} waits ({job.why}) for {since}{fix}", same=job.why)

    def _say(self, line: str, *, same: str) -> None:
        """Print a line, unless one about the same was printed less than a minute ago."""
        now = time.monotonic()
        if same != self._said or now - self._said_at >= TELL_SECONDS:
            tell(line)
            self._said, self._said_at = same, now
