"""`pldr sweep --at-once N`: several children of a sweep at the same time on this machine.

Each is an ordinary `pldr sweep SWEEP --only NUMBER` in a process of its own, as an element of a Slurm array is
(slurm_sweep.py): it has its own log, and without a server an MLflow store of its own. This process starts them, gives each its
share of the CPU's cores, and writes the table. Stopped, it asks them to stop, and waits while they save.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.backends.job import Report
from pipeline.errors import ConfigError
from pipeline.stages.runner import exclusive
from pipeline.sweep import apart
from pipeline.sweep.sweep import Sweep

POLL_S = 0.5
ERROR = "pldr: error: "  # what begins the line that tells why a command failed


def sweep_at_once(sweep: Sweep, words: Sequence[str], *, at_once: int, report: Report) -> dict[str, Any]:
    """Run the unfinished children, so many at a time; the table. words: the YAML and the overrides. Raises UserError when
    children failed, ConfigError, and KeyboardInterrupt once all have stopped."""
    if at_once < 1:
        raise ConfigError(f"--at-once {at_once}: at least 1")
    with exclusive(sweep.paths, report):
        parent = sweep.open_parent()
        status = "KILLED"
        try:
            if apart.unfinished(sweep):
                apart.make_shared_data(sweep, report=report)
            errors = _Children(sweep, words, at_once, report).run(parent)
            table = apart.collect(sweep, parent, errors)
            rows = table.pop("rows")
            status = "FAILED" if any(row["status"] == "failed" for row in rows) else "FINISHED"
        finally:
            sweep.log(parent, {}, status=status)
    return sweep.result(parent, rows, table)


class _Children:
    """The processes that run now, and what became of the others."""

    def __init__(self, sweep: Sweep, words: Sequence[str], at_once: int, report: Report) -> None:
        self.sweep, self.at_once, self.report = sweep, at_once, report
        self.command = [sys.executable, "-m", "launch.cli", "sweep", *words]
        threads = max(1, (os.cpu_count() or 1) // at_once)
        self.environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.errors: dict[str, str] = {}

    def run(self, parent: str) -> dict[str, str]:
        """Until none is left; why, of those that failed, by name."""
        try:
            self._start()
            while self.running:
                time.sleep(POLL_S)
                if self._ended():
                    self._start()
                    apart.collect(self.sweep, parent, self.errors)
            return self.errors
        except BaseException:
            self._stop()
            raise

    def _start(self) -> None:
        free = self.at_once - len(self.running)
        waiting = apart.unfinished(self.sweep, self.errors)
        for number in [number for number in waiting if number not in self.running][:free]:
            log = self._log(number)
            log.parent.mkdir(parents=True, exist_ok=True)
            self.report(f"child       {number} of {len(self.sweep.children)}: {waiting[number]}; {log}")
            with log.open("wb") as output:
                self.running[number] = subprocess.Popen(
                    [*self.command, "--only", str(number), "--ranks-per-node", "1"],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches this process, which hands it on once
                )

    def _ended(self) -> bool:
        ended = {number: process for number, process in self.running.items() if process.poll() is not None}
        for number, process in ended.items():
            del self.running[number]
            if process.returncode:
                name = self.sweep.children[number - 1].name
                self.errors[name] = f"exit {process.returncode}: {last_error(self._log(number))}"
                self.report(f"{name}: {self.errors[name]}")
        return bool(ended)

    def _stop(self) -> None:
        self.report(f"stopping    {len(self.running)} children; they save what they have")
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            process.wait()

    def _log(self, number: int) -> Path:
        return self.sweep.paths.logs / f"child-{number}.out"


def last_error(output: Path) -> str:
    """The error that `pldr` printed last, else the last line."""
    try:
        lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "no output"
    ours = [line.partition(ERROR)[2] for line in lines if ERROR in line]
    return (ours or lines or ["no output"])[-1][:300]
