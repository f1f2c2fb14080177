"""Run the launcher of a training job, DeepSpeed's or torchrun, on this node, and wait for it.

Oddities explained once (measured): a launcher that gets SIGTERM ends the ranks one after another, 30 s each, and DeepSpeed's
runner leaves them behind; it can return 0 when a worker died or `launch.py` was killed; torchrun puts each rank in a session of
its own. So the job has its own process group, which goes as a whole, ranks included; signals are passed on to the ranks and
not to the launcher; and whether the job succeeded is judged by the committed checkpoint (pipeline.stages.train), not by the
exit code alone. The workers' stdin is a pipe that this process holds: when it closes, because this process was killed, they
end themselves. Ranks on other hosts, behind ssh, hang on pipeline.train.signals instead.

Slurm sends its warning to every process of a step. The launchers would die of SIGUSR1, and the runner of SIGTERM, while the
ranks save: they are started with both ignored (ranks, and DeepSpeed's launch.py for SIGTERM, set handlers of their own).

A rank that fails says why and ends; the others follow within moments, or hang for as long as a collective waits. After
FAILURE_GRACE_S nothing of the group is left, nor ORPHAN_GRACE_S after a launcher that ended before its ranks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
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
IGNORING = ["sh", "-c", 'trap "" TERM USR1; exec "$@"', "sh"]  # what is ignored stays so across exec
_SSH = re.compile(r"\bssh: |Permission denied|Host key verification failed|Connection closed by|not responding")
log = logging.getLogger(__name__)


def rank_environment(ranks: int) -> dict[str, str]:
    """What ranks on this node get: this process's environment, and what makes a CPU node work."""
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
    show: Callable[[str], None],
    head: Head | None = None,
) -> None:
    """Run a launcher to its end. `show` gets each status line. All output is kept in `log_file`.

    ranks: how many speak through this launcher. head: the line to ranks on other hosts; without one they are all here.

    SIGTERM, SIGUSR1 and the first Ctrl-C are passed on to the ranks, which save and end; Stopped is raised then. The second
    Ctrl-C ends the job at once (KeyboardInterrupt). Raises UserError with the first failure that a rank named, and the log's
    name; its exit code is that rank's.
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
        raise UserError(f"training failed: {_how(job, code)} (log: {log_file})")


def _how(job: _Job, code: int) -> str:
    """How a job ended whose ranks said nothing."""
    if job.orphaned or code == -signal.SIGKILL:
        return "its launcher was killed"
    if code == 256 - signal.SIGKILL:  # DeepSpeed's launch.py ends with its rank's return code, -9
        return "a rank was killed with SIGKILL (was the memory full?)"
    return f"the launcher ended with code {code}" + (f", {job.ssh_said}" if job.ssh_said else "")


class _Job:
    """A running process group, and what its output and its end have told so far."""

    def __init__(self, process: subprocess.Popen[bytes], num_ranks: int, head: Head | None) -> None:
        self.process, self.num_ranks, self.head = process, num_ranks, head
        self.listening = 0  # ranks that have begun, and know what to do with a signal
        self.failures: list[tuple[int, str]] = []
        self.stopped: str | None = None
        self.ssh_said = ""  # why a host cannot be reached
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
            elif self.head is not None and not self.ssh_said and _SSH.search(line):
                self.ssh_said = f"{line.strip()}; try `pldr doctor --hostfile`"

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

    def pass_on(self, number: int) -> None:
        """Send a signal to all ranks; the launcher does not get it."""
        self.passed_on.append(signal.Signals(number).name)
        if self.listening < self.num_ranks:
            self.kill()  # still starting: a rank would not hear it, and there is nothing to save
        elif self.head is not None:
            self.head.pass_on(number)
        else:
            for rank in self.ranks():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, number)

    def kill(self) -> None:
        """Nothing of the job stays on this node, and ranks elsewhere are told to end."""
        if self.head is not None:
            self.head.over()
        ranks = self.ranks()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for rank in ranks:  # torchrun's are in sessions of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)

    def end(self) -> None:
        """Nothing of it stays."""
        self.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


def is_rank(words: Sequence[str]) -> bool:
    """Whether a command line is a rank's. The launchers have the worker's name among their arguments, too."""
    return "-m" in words[:-1] and words[words.index("-m") + 1] == WORKER


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
    """A TCP port that nobody on this host listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
