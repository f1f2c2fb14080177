"""`pldr sweep --at-once N`: several children of a sweep at the same time on this machine.

Each is an ordinary `pldr sweep SWEEP --only NUMBER` in a process of its own, as an element of a Slurm array is
(slurm_sweep.py): it has its own log, and without a server an MLflow store of its own. This process starts them, gives each its
share of the CPU's cores, or a GPU of its own, and writes the table. Stopped, it asks them to stop, and waits while they save,
however long. Killed, it leaves them running; a start after that waits for them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from launch.backends.job import Report
from launch.backends.stop import AGAIN_S, Interrupted, stop_signals
from pipeline.devices import has_gpu, num_devices
from pipeline.errors import ConfigError
from pipeline.stages.runner import exclusive
from pipeline.sweep import apart
from pipeline.sweep.sweep import Sweep
from pipeline.train.deepspeed_config import accumulation_steps

POLL_S = 0.5
ERROR = "pldr: error: "  # what begins the line that tells why a command failed
DEVICES = "CUDA_VISIBLE_DEVICES"


def sweep_at_once(sweep: Sweep, words: Sequence[str], *, at_once: int, report: Report) -> dict[str, Any]:
    """Run the unfinished children, so many at a time; the table. words: the YAML and the overrides. Raises UserError when
    children failed, ConfigError, and Interrupted once all have stopped."""
    if at_once < 1:
        raise ConfigError(f"--at-once {at_once}: at least 1")
    for child in sweep.children:
        accumulation_steps(child.config.train, 1)  # raises when its batch does not divide
    devices = devices_for(at_once)
    apart.report_stores(sweep, report)
    with exclusive(sweep.paths, report):
        parent = sweep.open_parent()
        status = "KILLED"
        try:
            if apart.unfinished(sweep):
                apart.make_shared_data(sweep, report=report)
            errors = _Children(sweep, words, devices, report).run(parent)
            table = apart.collect(sweep, parent, errors)
            rows = table.pop("rows")
            status = "FAILED" if any(row["status"] == "failed" for row in rows) else "FINISHED"
        finally:
            sweep.log(parent, {}, status=status)
    return sweep.result(parent, rows, table)


def devices_for(at_once: int) -> list[str | None]:
    """A place for each child that runs at once: the name of its GPU, None on CPUs. Raises ConfigError for too few GPUs."""
    if not has_gpu():
        return [None] * at_once
    chosen = [name.strip() for name in os.environ.get(DEVICES, "").split(",") if name.strip()]
    names = chosen[: num_devices()] or [str(number) for number in range(num_devices())]
    if at_once > len(names):
        raise ConfigError(f"--at-once {at_once}: each child takes a GPU, and {len(names)} are visible here; lower it")
    return list(names[:at_once])


class _Children:
    """The processes that run now, and what became of the others."""

    def __init__(self, sweep: Sweep, words: Sequence[str], devices: Sequence[str | None], report: Report) -> None:
        self.sweep, self.report = sweep, report
        self.command = [sys.executable, "-m", "launch.cli", "sweep", *words]
        self.threads = max(1, (os.cpu_count() or 1) // len(devices))
        self.free = list(devices)
        self.running: dict[int, tuple[subprocess.Popen[bytes], str | None]] = {}  # and its device
        self.errors: dict[str, str] = {}
        self.stopped: signal.Signals | None = None
        self.asked: set[int] = set()  # to stop

    def run(self, parent: str) -> dict[str, str]:
        """Until none is left; why, of those that failed, by name."""
        with stop_signals.handed_to(self._receive):
            try:
                self._start()
                while self.running:
                    time.sleep(POLL_S)
                    if self._ended():
                        apart.collect(self.sweep, parent, self.errors)
                    if self.stopped is None:
                        self._start()
                    else:
                        self._ask()
            except BaseException:
                self._ask()
                for process, _ in self.running.values():
                    process.wait()
                raise
        if self.stopped is not None:
            raise Interrupted(self.stopped.name)
        return self.errors

    def _start(self) -> None:
        """Start children on what is free."""
        waiting = apart.unfinished(self.sweep, self.errors) if self.free else {}
        for number in [number for number in waiting if number not in self.running][: len(self.free)]:
            if self.stopped is not None:
                return
            log, device = self._log(number), self.free.pop(0)
            log.parent.mkdir(parents=True, exist_ok=True)
            self.report(f"child       {number} of {len(self.sweep.children)}: {waiting[number]}; {log}")
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [*self.command, "--only", str(number), "--ranks-per-node", "1"],
                    env=self._environment(device),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches this process, which hands it on once
                )
            self.running[number] = process, device

    def _environment(self, device: str | None) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self.threads), **os.environ, **({} if device is None else {DEVICES: device})}

    def _ended(self) -> bool:
        """Take away those that have ended; whether there were any."""
        ended = [number for number, (process, _) in self.running.items() if process.poll() is not None]
        for number in ended:
            process, device = self.running.pop(number)
            self.free.append(device)
            name = self.sweep.children[number - 1].name
            if self.stopped is not None:
                continue  # it may have been asked to
            if process.returncode:
                self.errors[name] = last_error(self._log(number)).removeprefix(f"{name}: ")
            elif not apart.is_complete(self.sweep, self.sweep.children[number - 1]):
                self.errors[name] = "it was stopped by a signal of its own"
            if name in self.errors:
                self.report(f"{name}: {self.errors[name]}")
        return bool(ended)

    def _receive(self, number: signal.Signals, at_once: bool) -> None:
        """A signal to this process."""
        if at_once:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            raise Interrupted(stop_signals.names[0])
        self.stopped = number
        self.report(
            f"{number.name}: {len(self.running)} children save and stop; Ctrl-C after {AGAIN_S:g} s more kills them"
        )

    def _ask(self) -> None:
        """Ask those that run to stop, each once."""
        for number, (process, _) in self.running.items():
            if number not in self.asked and process.poll() is None:
                process.send_signal(signal.SIGTERM)
            self.asked.add(number)

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
