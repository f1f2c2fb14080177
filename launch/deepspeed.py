"""Start a training job's ranks on this node with the `deepspeed` launcher, and wait for them.

Oddities explained once (measured): the launcher that gets SIGTERM ends the ranks one after another, 30 s each, and its runner
leaves them behind; it can return 0 when a worker died or `launch.py` was killed. So the job has its own process group, which
goes as a whole; signals are passed on to the ranks and not to the launcher; and whether the job succeeded is judged by the
committed checkpoint (pipeline.pretrain), not by the exit code alone. The workers' stdin is a pipe that this process holds:
when it closes, because this process was killed, they end themselves.

A rank that fails says why and ends; the others follow within moments, or hang for as long as a collective waits. After
FAILURE_GRACE_S nothing of the group is left, nor ORPHAN_GRACE_S after a launcher that ended before its ranks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import psutil

from pipeline.config import RunConfig, RunPaths
from pipeline.device import has_gpu
from pipeline.errors import Stopped, UserError
from pipeline.train.progress import FAILURE, LISTENING, STATUS, STOPPED
from pipeline.worker import PARENT_PIPE

GRACE_S = 20.0  # between asking a job to end and killing it
FAILURE_GRACE_S = 5.0  # for the other ranks' tracebacks, and for MLflow
ORPHAN_GRACE_S = 2.0
POLL_S = 0.5
log = logging.getLogger(__name__)


def command(job_file: Path, ranks: int) -> list[str]:
    """The launcher's command line for one node, run with this Python.

    With `--num_gpus` DeepSpeed forgets CUDA_VISIBLE_DEVICES and takes the first GPUs, so a choice of GPUs is handed over.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if has_gpu() and chosen.replace(",", "").isdigit():
        where = ["--include", f"localhost:{','.join(chosen.split(',')[:ranks])}"]
    else:
        where = ["--num_gpus", str(ranks)]
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        *where,
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(free_port()),
        "--module",
        "pipeline.worker",
        str(job_file),
    ]


def launch(config: RunConfig, job_file: Path, ranks: int, *, show: Callable[[str], None]) -> None:
    """Run the job to its end. `show` gets each status line. All output is kept in `logs/train.log`.

    SIGTERM, SIGUSR1 and the first Ctrl-C are passed on to the ranks, which save and end; Stopped is raised then. The second
    Ctrl-C ends the job at once (KeyboardInterrupt). Raises UserError with the first failure that a rank named, and the log's
    name; its exit code is that rank's.
    """
    log_file = RunPaths(config.run_dir).logs / "train.log"
    environment = {**os.environ, PARENT_PIPE: "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not has_gpu():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with open(log_file, "ab") as stream:
        process = subprocess.Popen(
            command(job_file, ranks),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        job = _Job(process, ranks)
        try:
            with _passing_signals_on(job, show):
                watcher = threading.Thread(target=job.watch, name="launcher-watch", daemon=True)
                watcher.start()
                job.read(stream, show)
                code = process.wait()
        finally:
            job.done.set()
            job.end()
    if job.failures:
        exit_code, reason = job.failures[0]
        raise UserError(f"training failed: {reason} (log: {log_file})", exit_code=exit_code, again=not job.passed_on)
    if job.stopped is not None or (job.passed_on and code):
        how = job.stopped or f"{job.passed_on[0]} before a step was done"
        raise Stopped(f"training was stopped by {how}", details={"stopped": how})
    if job.orphaned or code:
        killed = job.orphaned or code == -signal.SIGKILL
        reason = "its launcher was killed" if killed else f"the launcher ended with code {code}"
        raise UserError(f"training failed: {reason} (log: {log_file})")


class _Job:
    """A running process group, and what its output and its end have told so far."""

    def __init__(self, process: subprocess.Popen[bytes], num_ranks: int) -> None:
        self.process, self.num_ranks = process, num_ranks
        self.listening = 0  # ranks that have begun, and know what to do with a signal
        self.failures: list[tuple[int, str]] = []
        self.stopped: str | None = None
        self.passed_on: list[str] = []  # names of signals
        self.orphaned = False  # the launcher ended before its ranks
        self.done = threading.Event()

    def read(self, log_file: IO[bytes], show: Callable[[str], None]) -> None:
        """The job's output to its end."""
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            line = raw.decode("utf-8", "replace").rstrip("\n")
            try:
                log_file.write(raw)
                log_file.flush()
            except OSError as error:  # a full disk must not end a run
                log.debug("%s", error)
            if STATUS in line:
                show(line.partition(STATUS)[2])
            elif LISTENING in line:
                self.listening += line.count(LISTENING)
            elif STOPPED in line:
                self.stopped = line.partition(STOPPED)[2]
            elif FAILURE in line:
                code, _, reason = line.partition(FAILURE)[2].partition(" ")
                self.failures.append((int(code), reason))

    def watch(self) -> None:
        """In a thread: kill what is left of a job that has failed, or whose launcher is gone."""
        doomed: float | None = None
        while not self.done.wait(POLL_S):
            ended = self.process.poll() is not None
            if doomed is None and (self.failures or ended):
                doomed = time.monotonic() + (FAILURE_GRACE_S if self.failures else ORPHAN_GRACE_S)
            if doomed is not None and time.monotonic() > doomed:
                self.orphaned = ended and not self.failures
                self.kill()
                return

    def ranks(self) -> list[int]:
        """Process ids of the ranks on this node; DeepSpeed's launcher gives each its `--local_rank=`."""
        found = []
        for process in psutil.process_iter(["pid", "cmdline"]):
            words = process.info["cmdline"] or []
            with contextlib.suppress(ProcessLookupError):
                if any(w.startswith("--local_rank=") for w in words) and os.getpgid(process.pid) == self.process.pid:
                    found.append(process.pid)
        return found

    def pass_on(self, number: int) -> None:
        """Send a signal to all ranks; the launcher does not get it."""
        self.passed_on.append(signal.Signals(number).name)
        if self.listening < self.num_ranks:
            self.kill()  # still starting: a rank would die of it, and there is nothing to save
        for rank in self.ranks():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, number)

    def kill(self) -> None:
        """Nothing of the job's process group stays."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Nothing of it stays; what still runs is asked first."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_S)
        self.kill()
        self.process.wait()


@contextlib.contextmanager
def _passing_signals_on(job: _Job, show: Callable[[str], None]) -> Iterator[None]:
    """SIGTERM and SIGUSR1 go to the ranks; so does Ctrl-C (as SIGTERM), but only once. In the main thread; else nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, frame: Any) -> None:
        if number == signal.SIGINT and job.passed_on:
            raise KeyboardInterrupt
        again = "; Ctrl-C again ends them at once" if number == signal.SIGINT else ""
        show(f"{signal.Signals(number).name}: the ranks save and stop{again}")
        job.pass_on(signal.SIGTERM if number == signal.SIGINT else number)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
