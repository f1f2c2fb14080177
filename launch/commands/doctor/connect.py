"""Connections to the hosts for `pldr doctor`: commands here or over ssh, whether ssh works, and each host's clock."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from launch.backends.hosts import Host, carried, is_private, on_each, ssh
from launch.commands.doctor.findings import Finding, check_clock
from pipeline.environment import search_path, without_other_jobs

LOCAL = "this host"
Clock = tuple[float, float]  # how far it is ahead of ours, and how uncertain that is, in seconds


class Runner:
    """Commands on a host: here, or over ssh with this directory and PYTHONPATH, as DeepSpeed's launcher starts ranks."""

    def __init__(self, ssh_port: int | None) -> None:
        self._port = ssh_port
        self.variables = carried()

    def __call__(
        self, host: Host, words: Sequence[str], *, prefix: Sequence[str] = (), stdin: str = "", timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """This Python with `words`, after `prefix`; return code -1 when it took longer than timeout_s."""
        command = [*prefix, sys.executable, *words]
        if host.name == LOCAL:
            try:
                return subprocess.run(
                    command,
                    env=without_other_jobs(os.environ),
                    input=stdin,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=timeout_s,
                )
            except subprocess.TimeoutExpired:
                return subprocess.CompletedProcess(command, -1, "", f"did not finish within {timeout_s:g} s")
        public = {k: v for k, v in self.variables.items() if not is_private(k, v)}
        public |= search_path()
        pairs = [f"{name}={value}" for name, value in public.items()]
        there = ["sh", "-c", 'cd "$1" 2>/dev/null; shift; exec "$@"', "sh", os.getcwd(), "env", *pairs, *command]
        return ssh(host.name, there, port=self._port, stdin=stdin, timeout_s=timeout_s)

    def clock(self, host: Host) -> tuple[subprocess.CompletedProcess[str], Clock | None]:
        """The output of `date` there, and the clock if that is a time. A shell's startup files may print before it."""
        started = time.time()
        done = ssh(host.name, ["date", "+%s.%N"], port=self._port, timeout_s=30)
        ended = time.time()
        with contextlib.suppress(ValueError, IndexError):
            now = float(done.stdout.strip().splitlines()[-1])
            return done, (now - (started + ended) / 2, (ended - started) / 2)
        return done, None


def check_connections(hosts: Sequence[Host], run: Runner) -> list[Finding]:
    """ssh and the clock of every host. The second call is timed: the first one may wait for names and keys."""

    def ask(host: Host) -> tuple[subprocess.CompletedProcess[str], Clock | None]:
        first = run.clock(host)
        return run.clock(host) if first[0].returncode == 0 else first

    found: list[Finding] = []
    clocks: dict[str, Clock] = {}
    for host, (done, clock) in on_each(hosts, ask).items():
        if done.returncode:
            error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            found.append(Finding("ssh", host, "FAIL", error, _ssh_fix(error, host)))
            continue
        found.append(Finding("ssh", host, "ok", "works without a password"))
        if clock is not None:
            clocks[host] = clock
            continue
        text = f"not known: `date +%s.%N` printed {' '.join(done.stdout.split())[-60:]!r}"
        fix = "let ~/.bashrc there print nothing without a terminal; install GNU date (coreutils)"
        found.append(Finding("clock", host, "warn", text, fix))
    return [*found, *check_clock(clocks)]


def _ssh_fix(error: str, host: str) -> str:
    if "Host key verification" in error or "host key" in error.lower():
        return f"ssh-keyscan {host} >> ~/.ssh/known_hosts (after checking the key)"
    if "Permission denied" in error:
        return f"ssh-copy-id {host}"
    return "is the host up, its name right, sshd running, the port open (--ssh-port)?"
