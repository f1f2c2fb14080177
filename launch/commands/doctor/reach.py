"""Reaching the hosts for `pldr doctor`: commands here or over ssh, whether a host answers, and what time it has."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from launch.backends.hosts import Host, carried, is_private, on_each, ssh
from launch.commands.doctor.findings import Finding, judge_clock

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
                    command, input=stdin, capture_output=True, text=True, errors="replace", timeout=timeout_s
                )
            except subprocess.TimeoutExpired:
                return subprocess.CompletedProcess(command, -1, "", f"no end within {timeout_s:g} s")
        public = {k: v for k, v in self.variables.items() if not is_private(k, v)}
        public["PYTHONPATH"] = ":".join(p for p in (os.getcwd(), os.environ.get("PYTHONPATH")) if p)
        pairs = [f"{name}={value}" for name, value in public.items()]
        there = ["sh", "-c", 'cd "$1" 2>/dev/null; shift; exec "$@"', "sh", os.getcwd(), "env", *pairs, *command]
        return ssh(host.name, there, port=self._port, stdin=stdin, timeout_s=timeout_s)

    def clock(self, host: Host) -> tuple[subprocess.CompletedProcess[str], Clock | None]:
        """What `date` said there, and the clock when that is a time. What a shell's startup files print comes before it."""
        started = time.time()
        asked = ssh(host.name, ["date", "+%s.%N"], port=self._port, timeout_s=30)
        ended = time.time()
        with contextlib.suppress(ValueError, IndexError):
            now = float(asked.stdout.strip().splitlines()[-1])
            return asked, (now - (started + ended) / 2, (ended - started) / 2)
        return asked, None


def reach(hosts: Sequence[Host], run: Runner) -> list[Finding]:
    """ssh and the clock of every host. The second call is timed: the first one may wait for names and keys."""

    def ask(host: Host) -> tuple[subprocess.CompletedProcess[str], Clock | None]:
        first = run.clock(host)
        return run.clock(host) if first[0].returncode == 0 else first

    found: list[Finding] = []
    clocks: dict[str, Clock] = {}
    for host, (asked, clock) in on_each(hosts, ask).items():
        if asked.returncode:
            said = (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
            found.append(Finding("ssh", host, "FAIL", said, _ssh_mend(said, host)))
            continue
        found.append(Finding("ssh", host, "ok", "answers without a password"))
        if clock is not None:
            clocks[host] = clock
            continue
        text = f"not known: `date +%s.%N` answered {' '.join(asked.stdout.split())[-60:]!r}"
        mend = "let ~/.bashrc there print nothing when no terminal is there; install GNU date (coreutils)"
        found.append(Finding("clock", host, "warn", text, mend))
    return [*found, *judge_clock(clocks)]


def _ssh_mend(said: str, host: str) -> str:
    if "Host key verification" in said or "host key" in said.lower():
        return f"ssh-keyscan {host} >> ~/.ssh/known_hosts (after a look at the key)"
    if "Permission denied" in said:
        return f"ssh-copy-id {host}"
    return "is the host up, its name right, sshd running, the port open (--ssh-port)?"
