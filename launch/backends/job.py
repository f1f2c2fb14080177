"""Run the launcher of a training job, DeepSpeed's or torchrun, on this node, and wait for it.

Measured behavior of the launchers: one that gets SIGTERM ends the ranks one after another, 30 s each, and DeepSpeed's runner
leaves them running; it can return 0 when a worker died or `launch.py` was killed; torchrun puts each rank in its own session.
So the job has its own process group, which is killed together with all ranks; signals are forwarded to the ranks and not to
the launcher; and whether the job succeeded is decided by the committed checkpoint (pipeline/stages/train.py), not by the exit
code alone. The workers' stdin is a pipe that this process holds: when it closes because this process was killed, they exit.
Ranks on other hosts, behind ssh, watch a file instead (pipeline/train/signals.py).

Slurm sends its warning to every process of a step. The launchers would die of SIGUSR1 and SIGHUP, and the runner of SIGTERM,
while the ranks save: they are started with these ignored (ranks, and DeepSpeed's launch.py for SIGTERM, set their own
handlers).

A rank that fails reports why and exits; the others follow within moments, or hang until a collective times out. What is left
of the group is killed FAILURE_GRACE_S later, or ORPHAN_GRACE_S after a launcher that exited before its ranks, or when ranks
that were asked to stop do not react (`Reaction`).
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
from typing import IO

import psutil

from launch.backends.reaction import Reaction
from launch.backends.stop import AGAIN_S, Interrupted, stop_signals
from pipeline.config.paths import RunPaths
from pipeline.errors import Stopped, UserError
from pipeline.stages.still import Still
from pipeline.train.console import FAILURE, LISTENING, PHASE, STATUS, STOPPED
from pipeline.train.signals import Head

WORKER = "pipeline.worker"
FAILURE_GRACE_S = 5.0  # for the other ranks' tracebacks, and for MLflow
ORPHAN_GRACE_S = 2.0
POLL_S = 0.5
Report = Callable[[str], None]  # prints a line for the user
IGNORING = ["/bin/sh", "-c", 'trap "" TERM USR1 HUP; exec "$@"', "sh"]  # ignored signals stay ignored across exec
_SSH = re.compile(r"\bssh: |Permission denied|Host key verification failed|Connection closed by|not responding")
CRASHES = {
    signal.SIGKILL: " (out of memory?)",
    signal.SIGBUS: " (/dev/shm or a disk is full?)",
    signal.SIGSEGV: "",
    signal.SIGABRT: "",
    signal.SIGILL: " (a library was built for another CPU?)",
}
# The last line of a traceback, after what torchrun or pdsh puts before it; Python's own errors; an argument parser's.
_ERROR = re.compile(
    r"(?:[\w.-]+: )??(?:\[rank\d+\]: ?)?"
    r"((?:(?:[A-Za-z_][\w.]*)?(?:Error|Exception)\b|Fatal Python error: |[\w.]+: error: |\S*python[\d.]*: ).*)"
)
_KILLED = re.compile(r"failed \(exitcode: -(\d+)\)")  # torchrun's
log = logging.getLogger(__name__)


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

    A signal to stop is forwarded to the ranks, which save and exit; Stopped is raised then. A second Ctrl-C kills the job at
    once (Interrupted). Both as launch/backends/stop.py has it. Raises UserError with the first failure that a rank reported and
    the log's name; its exit code is that rank's.
    """
    job = _Job(ranks, head, RunPaths.ranks_of(log_file))

    def receive(number: signal.Signals, at_once: bool) -> None:
        if at_once:
            raise Interrupted(stop_signals.names[0])  # the first is the one that is named
        job.forward(number)  # before anything is printed
        report(f"{number.name}: the ranks save and stop; Ctrl-C after {AGAIN_S:g} s more kills them")

    with open(log_file, "ab") as stream:
        try:
            with stop_signals.handed_to(receive):
                code = job.run([*IGNORING, *command], environment, stream, report)
        finally:
            job.done.set()
            job.end()
    if job.failures:
        exit_code, reason = job.failures[0]
        raise UserError(f"training failed: {reason} (log: {log_file})", exit_code=exit_code, again=not job.forwarded)
    if job.stopped is not None or (job.forwarded and (code or job.killed)):
        how = _how_stopped(job)
        raise Stopped(f"training was stopped by {how}", details={"stopped": how})
    if job.orphaned or code:
        raise UserError(f"training failed: {_how(job, code)} (log: {log_file})")


def _how(job: _Job, code: int) -> str:
    """How a job ended whose ranks reported nothing."""
    if job.orphaned or code == -signal.SIGKILL:
        return "its launcher was killed"
    killed_by = job.killed_by or 256 - code  # DeepSpeed's launch.py ends with its rank's return code, -9 for example
    if killed_by in CRASHES:
        return f"a rank was killed with {signal.Signals(killed_by).name}{CRASHES[signal.Signals(killed_by)]}"
    reason = job.ssh_error or job.error
    return f"the launcher ended with code {code}" + (f", {reason}" if reason else "")


def _how_stopped(job: _Job) -> str:
    """The signal that this process was sent (else the one that a rank got), and what the ranks did."""
    if job.stopped is None:
        return job.forwarded[0] + (f", {job.killed}" if job.killed else " before a step was done")
    name, _, what = job.stopped.partition(" ")
    return f"{job.forwarded[0] if job.forwarded else name} {what}"


class _Job:
    """A process group, and what its output has shown so far."""

    def __init__(self, num_ranks: int, head: Head | None, heartbeats: Path) -> None:
        self.num_ranks, self.head = num_ranks, head
        self.process: subprocess.Popen[bytes] | None = None
        self.listening = 0  # ranks that have started and handle signals
        self.failures: list[tuple[int, str]] = []
        self.stopped: str | None = None
        self.ssh_error = ""  # why a host is unreachable
        self.error = ""  # the last error that a launcher or rank printed without a mark of ours
        self.killed_by = 0  # the signal that ended a rank, if torchrun says so
        self.forwarded: list[str] = []  # names of signals
        self.killed = ""  # why ranks that were asked to stop were killed
        self._heartbeats = heartbeats
        self._reaction: Reaction | None = None  # of ranks that were asked to stop
        self.orphaned = False  # the launcher exited before its ranks
        self.done = threading.Event()

    def run(self, command: Sequence[str], environment: dict[str, str], log_file: IO[bytes], report: Report) -> int:
        """Start it, and wait until it ends; the launcher's exit code."""
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        if self.forwarded:  # it came just now
            self.kill()
        threading.Thread(target=self.watch, name="launcher-watch", daemon=True).start()
        self.read(self.process, log_file, report)
        return self.process.wait()

    def read(self, process: subprocess.Popen[bytes], log_file: IO[bytes], report: Report) -> None:
        """Read the job's output to its end."""
        assert process.stdout is not None
        doing = f"starting {self.num_ranks} ranks" if self.num_ranks > 1 else "starting the rank"
        report(doing)
        startup = Still(doing, report)
        try:
            self._read(process.stdout, log_file, report, startup)
        finally:
            startup.over()

    def _read(self, output: IO[bytes], log_file: IO[bytes], report: Report, startup: Still) -> None:
        for raw in output:
            line = raw.decode("utf-8", "replace").rstrip("\n")
            try:
                log_file.write(raw)
                log_file.flush()
            except OSError as error:  # a full disk must not end a run
                log.debug("%s", error)
            if STATUS in line:
                text = line.partition(STATUS)[2]
                if text.startswith("step "):
                    startup.over()
                report(text)
            elif PHASE in line:
                startup.enter(line.partition(PHASE)[2])
            elif LISTENING in line:
                self.listening += line.count(LISTENING)
            elif STOPPED in line:
                self.stopped = self.stopped or line.partition(STOPPED)[2]
                self._expect_end()
            elif FAILURE in line and self.stopped is None:  # else because the others have gone
                code, _, reason = line.partition(FAILURE)[2].partition(" ")
                self.failures.append((int(code), reason))
            elif self.head is not None and not self.ssh_error and _SSH.search(line):
                self.ssh_error = f"{line.strip()}; try `pldr doctor --hostfile`"
            elif found := _KILLED.search(line):
                self.killed_by = int(found[1])
            elif (found := _ERROR.match(line)) and "ChildFailedError" not in line:  # torchrun's: a rank has failed
                self.error = found[1][:300]

    def watch(self) -> None:
        """In a thread: kill what is left of a job that has failed, or whose launcher has exited."""
        assert self.process is not None
        deadline: float | None = None
        while not self.done.wait(POLL_S):
            if self._reaction is not None and self._reaction.overdue():
                self.killed = self._reaction.what()
                self.kill()
                return
            ended = self.process.poll() is not None
            if deadline is None and (self.failures or ended):
                deadline = time.monotonic() + (FAILURE_GRACE_S if self.failures else ORPHAN_GRACE_S)
            if deadline is not None and time.monotonic() > deadline:
                self.orphaned = ended and not self.failures
                self.kill()
                return

    def ranks(self) -> list[int]:
        """Process ids of the ranks on this node: of the launcher's group (DeepSpeed), or its descendants (torchrun)."""
        assert self.process is not None
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
        self._expect_end()
        if self.process is None:
            return  # `run` kills it
        if self.listening < self.num_ranks:
            self.kill()  # still starting: a rank would miss it, and there is nothing to save
        elif self.head is not None:
            self.head.pass_on(number)
        else:
            for rank in self.ranks():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, number)

    def _expect_end(self) -> None:
        self._reaction = self._reaction or Reaction(self._heartbeats)

    def kill(self) -> None:
        """Kill every process of the job on this node; ranks elsewhere get a message to exit."""
        assert self.process is not None
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
        if self.process is None:
            return
        self.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


@contextlib.contextmanager
def stopped_exit_code(exit_code: int) -> Iterator[None]:
    """Stopped gets this exit code. A signal while no rank runs is Interrupted, for which launch/cli.py has the same code."""
    try:
        yield
    except Stopped as stop:
        raise Stopped(str(stop), details=stop.details, exit_code=exit_code) from None


def is_rank(words: Sequence[str]) -> bool:
    """Whether a command line is a rank's. The launchers, too, have the worker's name in their arguments."""
    return "-m" in words[:-1] and words[words.index("-m") + 1] == WORKER
