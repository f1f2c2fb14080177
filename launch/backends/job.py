"""Run the launcher of a training job, DeepSpeed's or torchrun, on this node, and wait for it.

Measured behavior of the launchers: one that gets SIGTERM ends the ranks one after another, 30 s each, and DeepSpeed's runner
leaves them running; it can return 0 when a worker died or `launch.py` was killed; torchrun puts each rank in its own session.
So the job has its own process group, which is killed together with all ranks; signals are forwarded to the ranks and not to
the launcher; and whether the job succeeded is decided by the committed checkpoint (pipeline/stages/train.py), not by the exit
code alone. The workers' stdin is a pipe that this process holds: when it closes because this process was killed, they exit.
Ranks on other hosts, behind ssh, watch a file instead (pipeline/train/signals.py).

Slurm sends its warning to every process of a step. The launchers would die of SIGUSR1, and the runner of SIGTERM, while the
ranks save: they are started with both ignored (ranks, and DeepSpeed's launch.py for SIGTERM, set their own handlers).

A rank that fails reports why and exits; the others follow within moments, or hang until a collective times out. What is left
of the group is killed FAILURE_GRACE_S later, or ORPHAN_GRACE_S after a launcher that exited before its ranks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from pipeline.distributed import has_gpu
from pipeline.errors import Stopped, UserError
from pipeline.train.console import FAILURE, LISTENING, STATUS, STOPPED
from pipeline.train.signals import Head
from pipeline.worker import PARENT_PIPE, VISIBLE_DEVICES

WORKER = "pipeline.worker"
FAILURE_GRACE_S = 5.0  # for the other ranks' tracebacks, and for MLflow
ORPHAN_GRACE_S = 2.0
POLL_S = 0.5
Report = Callable[[str], None]  # prints a line for the user
IGNORING = ["sh", "-c", 'trap "" TERM USR1; exec "$@"', "sh"]  # ignored signals stay ignored across exec
_SSH = re.compile(r"\bssh: |Permission denied|Host key verification failed|Connection closed by|not responding")
log = logging.getLogger(__name__)


def rank_environment(ranks: int) -> dict[str, str]:
    """The environment of ranks on this node: this process's, and what makes a CPU node work."""
    environment = {**os.environ, PARENT_PIPE: "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if "CUDA_VISIBLE_DEVICES" in environment:
        environment[VISIBLE_DEVICES] = environment["CUDA_VISIBLE_DEVICES"]
    if not has_gpu():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    return environment


def run_job(
    command: Sequence[str],
    *,
    environment: dict[str, str],
    ranks: int,
    log_file: Path,
    report: Report,
    head: Head | None = None,
) -> None:
    """Run a launcher until it exits. `report` gets each status line. All output is kept in `log_file`.

    ranks: how many write to this launcher's output. head: how ranks on other hosts get signals; None: all ranks are here.

    SIGTERM, SIGUSR1 and the first Ctrl-C are forwarded to the ranks, which save and exit; Stopped is raised then. The second
    Ctrl-C kills the job at once (KeyboardInterrupt). Raises UserError with the first failure that a rank reported and the
    log's name; its exit code is that rank's.
    """
    with open(log_file, "ab") as stream:
        process = subprocess.Popen(
            [*IGNORING, *command],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        job = _Job(process, ranks, head)
        try:
            with _forwarding_signals(job, report):
                watcher = threading.Thread(target=job.watch, name="launcher-watch", daemon=True)
                watcher.start()
                job.read(stream, report)
                code = process.wait()
        finally:
            job.done.set()
            job.end()
    if job.failures:
        exit_code, reason = job.failures[0]
        raise UserError(f"training failed: {reason} (log: {log_file})", exit_code=exit_code, again=not job.forwarded)
    if job.stopped is not None or (job.forwarded and code):
        how = job.stopped or f"{job.forwarded[0]} before a step was done"
        raise Stopped(f"training was stopped by {how}", details={"stopped": how})
    if job.orphaned or code:
        raise UserError(f"training failed: {_how(job, code)} (log: {log_file})")


def _how(job: _Job, code: int) -> str:
    """How a job ended whose ranks reported nothing."""
    if job.orphaned or code == -signal.SIGKILL:
        return "its launcher was killed"
    if code == 256 - signal.SIGKILL:  # DeepSpeed's launch.py ends with its rank's return code, -9
        return "a rank was killed with SIGKILL (out of memory?)"
    return f"the launcher ended with code {code}" + (f", {job.ssh_error}" if job.ssh_error else "")


class _Job:
    """A running process group, and what its output has shown so far."""

    def __init__(self, process: subprocess.Popen[bytes], num_ranks: int, head: Head | None) -> None:
        self.process, self.num_ranks, self.head = process, num_ranks, head
        self.listening = 0  # ranks that have started and handle signals
        self.failures: list[tuple[int, str]] = []
        self.stopped: str | None = None
        self.ssh_error = ""  # why a host is unreachable
        self.forwarded: list[str] = []  # names of signals
        self.orphaned = False  # the launcher exited before its ranks
        self.done = threading.Event()

    def read(self, log_file: IO[bytes], report: Report) -> None:
        """Read the job's output to its end."""
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            line = raw.decode("utf-8", "replace").rstrip("\n")
            try:
                log_file.write(raw)
                log_file.flush()
            except OSError as error:  # a full disk must not end a run
                log.debug("%s", error)
            if STATUS in line:
                report(line.partition(STATUS)[2])
            elif LISTENING in line:
                self.listening += line.count(LISTENING)
            elif STOPPED in line:
                self.stopped = line.partition(STOPPED)[2]
            elif FAILURE in line:
                code, _, reason = line.partition(FAILURE)[2].partition(" ")
                self.failures.append((int(code), reason))
            elif self.head is not None and not self.ssh_error and _SSH.search(line):
                self.ssh_error = f"{line.strip()}; try `pldr doctor --hostfile`"

    def watch(self) -> None:
        """In a thread: kill what is left of a job that has failed, or whose launcher has exited."""
        deadline: float | None = None
        while not self.done.wait(POLL_S):
            ended = self.process.poll() is not None
            if deadline is None and (self.failures or ended):
                deadline = time.monotonic() + (FAILURE_GRACE_S if self.failures else ORPHAN_GRACE_S)
            if deadline is not None and time.monotonic() > deadline:
                self.orphaned = ended and not self.failures
                self.kill()
                return

    def ranks(self) -> list[int]:
        """Process ids of the ranks on this node: of the launcher's group (DeepSpeed), or its descendants (torchrun)."""
        family = set()
        with contextlib.suppress(psutil.Error):
            family = {child.pid for child in psutil.Process(self.process.pid).children(recursive=True)}
        found = []
        for process in psutil.process_iter(["pid", "cmdline"]):
            with contextlib.suppress(ProcessLookupError):
                ours = process.pid in family or os.getpgid(process.pid) == self.process.pid
                if ours and is_rank(process.info["cmdline"] or []):
                    found.append(process.pid)
        return found

    def forward(self, number: int) -> None:
        """Send a signal to all ranks; the launcher does not get it."""
        self.forwarded.append(signal.Signals(number).name)
        if self.listening < self.num_ranks:
            self.kill()  # still starting: a rank would miss it, and there is nothing to save
        elif self.head is not None:
            self.head.pass_on(number)
        else:
            for rank in self.ranks():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, number)

    def kill(self) -> None:
        """Kill every process of the job on this node; ranks elsewhere get a message to exit."""
        if self.head is not None:
            self.head.over()
        ranks = self.ranks()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for rank in ranks:  # torchrun puts them in their own sessions
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)

    def end(self) -> None:
        """Kill what is left and close the pipe to it."""
        self.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


@contextlib.contextmanager
def stopped_exit_code(exit_code: int) -> Iterator[None]:
    """A job stopped by a signal exits with this code, also when the signal came while no rank ran (nothing to save then)."""
    signal.signal(signal.SIGUSR1, signal.getsignal(signal.SIGTERM))  # until the process ends: its last moments, too
    try:
        yield
    except Stopped as stop:
        raise Stopped(str(stop), details=stop.details, exit_code=exit_code) from None
    except KeyboardInterrupt:
        if not exit_code:
            raise
        raise Stopped("stopped while no rank ran", details={}, exit_code=exit_code) from None


def is_rank(words: Sequence[str]) -> bool:
    """Whether a command line is a rank's. The launchers, too, have the worker's name in their arguments."""
    return "-m" in words[:-1] and words[words.index("-m") + 1] == WORKER


@contextlib.contextmanager
def _forwarding_signals(job: _Job, report: Report) -> Iterator[None]:
    """SIGTERM and SIGUSR1 go to the ranks; so does the first Ctrl-C, as SIGTERM. Only the main thread can set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, frame: Any) -> None:
        if number == signal.SIGINT and job.forwarded:
            raise KeyboardInterrupt
        again = "; Ctrl-C again kills them at once" if number == signal.SIGINT else ""
        report(f"{signal.Signals(number).name}: the ranks save and stop{again}")
        job.forward(signal.SIGTERM if number == signal.SIGINT else number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
