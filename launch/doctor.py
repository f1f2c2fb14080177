"""`pldr doctor [CONFIG] [--hostfile H]`: is every node fit to train, before it costs money?

On each host runs launch.probe; launch.findings judges the facts; launch.allreduce measures the network over all hosts at once.
Without a hostfile the same is done for this machine; without CONFIG what the run would need (its directory, object stores,
MLflow) is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from launch.findings import Finding, as_json, judge, judge_bandwidth, judge_clock, table
from launch.hosts import Host, address_of, carried, is_private, on_each, read_hostfile, ssh
from launch.job import free_port
from launch.probe import token_file
from pipeline.config import RunConfig, RunPaths, load_config, tokens_folder
from pipeline.device import num_devices
from pipeline.errors import ConfigError, UserError
from pipeline.mlflow_client import tracking_uri
from pipeline.pretrain import disk_needed, ranks_on_this_node
from pipeline.urls import is_local, without_secrets

Result = dict[str, Any]
Show = Callable[[str], None]
LOCAL = "this host"
PROBE_S, BANDWIDTH_S = 120.0, 150.0


def add_doctor_verb(verbs: Any, common: argparse.ArgumentParser) -> None:
    """The verb `doctor`."""
    about = (
        "check every node before a training: ssh, versions, GPUs, network, storage, MLflow, limits; exit 1 on a failure"
    )
    sub = verbs.add_parser("doctor", help=about, description=about, parents=[common])
    sub.add_argument("config", nargs="?", metavar="CONFIG", help="YAML of the run: its run_dir, stores and MLflow")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the YAML")
    sub.add_argument("--hostfile", metavar="FILE", help="a line `HOST slots=RANKS` for each host (else this machine)")
    sub.add_argument("--master-addr", metavar="ADDRESS", help="where the others reach the first host")
    sub.add_argument("--master-port", type=int, default=29500, help="a free port there (29500)")
    sub.add_argument("--ssh-port", type=int, metavar="PORT")
    sub.add_argument("--quick", action="store_true", help="without the all-reduce, which takes the GPUs for a moment")
    sub.set_defaults(work=_doctor)


def _doctor(arguments: Any, show: Show) -> Result:
    if arguments.config is None and arguments.overrides:
        raise ConfigError("doctor: key=value goes with the YAML of a run")
    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    if arguments.hostfile is not None:
        hosts = read_hostfile(arguments.hostfile)
    else:
        hosts = [Host(LOCAL, ranks_on_this_node(config) if config else num_devices())]
    run = _Runner(arguments.ssh_port)
    findings: list[Finding] = []
    if arguments.hostfile is not None:
        findings += _reach(hosts, run)
    lost = {f.host for f in findings if f.check == "ssh" and f.status == "FAIL"}
    alive = [host for host in hosts if host.name not in lost]
    facts: dict[str, Any] = {}
    if alive:
        with _question(config) as question:
            answers = on_each(alive, lambda host: _probe(host, question, run))
        findings += [answer for answer in answers.values() if isinstance(answer, Finding)]
        facts = {name: answer for name, answer in answers.items() if not isinstance(answer, Finding)}
    if facts:
        findings += judge(facts, slots={h.name: h.slots for h in hosts}, needs=_needs(config))
    if not arguments.quick:
        findings += _bandwidth(arguments, config, hosts, run, all_well=len(facts) == len(hosts))
    for line in table(findings, len(hosts)):
        show(line)
    failures = [f for f in findings if f.status == "FAIL"]
    warnings = [f for f in findings if f.status == "warn"]
    counts = {"failures": len(failures), "warnings": len(warnings)}
    result = {"hosts": [h.name for h in hosts], "findings": as_json(findings), **counts}
    if failures:
        names = ", ".join(dict.fromkeys(f"{f.check} ({f.host})" for f in failures))
        raise UserError(f"doctor: {len(failures)} failed: {names}; mend them, or training will fail", details=result)
    show(f"{len(hosts)} {'hosts' if len(hosts) > 1 else 'host'}, {len(findings)} checks: fit to train")
    return result


class _Runner:
    """Commands on a host: here, or over ssh with this directory and PYTHONPATH, as DeepSpeed's launcher starts ranks."""

    def __init__(self, ssh_port: int | None) -> None:
        self._port = ssh_port
        self.variables = carried()

    def __call__(
        self, host: Host, words: Sequence[str], *, stdin: str = "", timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *words]
        if host.name == LOCAL:
            try:
                return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout_s)
            except subprocess.TimeoutExpired:
                return subprocess.CompletedProcess(command, -1, "", f"no end within {timeout_s:g} s")
        public = {k: v for k, v in self.variables.items() if not is_private(k, v)}
        public["PYTHONPATH"] = ":".join(p for p in (os.getcwd(), os.environ.get("PYTHONPATH")) if p)
        pairs = [f"{name}={value}" for name, value in public.items()]
        there = ["sh", "-c", 'cd "$1" 2>/dev/null; shift; exec "$@"', "sh", os.getcwd(), "env", *pairs, *command]
        return ssh(host.name, there, port=self._port, stdin=stdin, timeout_s=timeout_s)

    def clock(self, host: Host) -> tuple[subprocess.CompletedProcess[str], float, float]:
        """(what `date` said, how far the host's clock is ahead of ours, how uncertain that is), in seconds."""
        started = time.time()
        asked = ssh(host.name, ["date", "+%s.%N"], port=self._port, timeout_s=30)
        ended = time.time()
        with contextlib.suppress(ValueError):
            return asked, float(asked.stdout.strip()) - (started + ended) / 2, (ended - started) / 2
        return asked, 0.0, 0.0


def _reach(hosts: list[Host], run: _Runner) -> list[Finding]:
    """ssh and the clock of every host. The second call is timed: the first one may wait for names and keys."""

    def ask(host: Host) -> tuple[subprocess.CompletedProcess[str], float, float]:
        first = run.clock(host)
        return run.clock(host) if first[0].returncode == 0 else first

    answers = on_each(hosts, ask)
    found, skews = [], {}
    for host, (asked, skew, doubt) in answers.items():
        if asked.returncode == 0:
            found.append(Finding("ssh", host, "ok", "answers without a password"))
            skews[host] = (skew, doubt)
            continue
        said = (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
        found.append(Finding("ssh", host, "FAIL", said, _ssh_mend(said, host)))
    return [*found, *judge_clock(skews)]


def _ssh_mend(said: str, host: str) -> str:
    if "Host key verification" in said or "host key" in said.lower():
        return f"ssh-keyscan {host} >> ~/.ssh/known_hosts (after a look at the key)"
    if "Permission denied" in said:
        return f"ssh-copy-id {host}"
    return "is the host up, its name right, sshd running, the port open (--ssh-port)?"


@contextlib.contextmanager
def _question(config: RunConfig | None) -> Iterator[str]:
    """What the probes are asked; while they look, a file of ours is in the run directory."""
    token, environment = uuid.uuid4().hex, carried()
    if config is None:
        yield json.dumps(
            {
                "run_dir": None,
                "token": token,
                "urls": [],
                "mlflow": None,
                "remote_tokens": False,
                "environment": environment,
            }
        )
        return
    run_dir, uri = RunPaths(config.run_dir).root, tracking_uri(config)
    places = (config.data.output, config.tokens.output, config.train.publish_to)
    question = {
        "run_dir": str(run_dir),
        "token": token,
        "urls": sorted({place for place in places if place is not None and not is_local(place)}),
        "mlflow": None if uri.startswith("sqlite:") else uri,
        "remote_tokens": not is_local(tokens_folder(config)),
        "environment": environment,
    }
    ours = token_file(run_dir, token)
    with contextlib.suppress(OSError):  # then the probes tell it
        ours.write_bytes(b"")
    try:
        yield json.dumps(question)
    finally:
        ours.unlink(missing_ok=True)


def _probe(host: Host, question: str, run: _Runner) -> dict[str, Any] | Finding:
    """A host's facts, or why there are none."""
    asked = run(host, ["-m", "launch.probe"], stdin=question, timeout_s=PROBE_S)
    try:
        answer: dict[str, Any] = json.loads(asked.stdout.strip().splitlines()[-1])
        return answer
    except (IndexError, ValueError):
        said = (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
        mend = f"install pldr for {sys.executable} there too: every host has the same paths"
        return Finding("packages", host.name, "FAIL", said[:300], mend)


def _needs(config: RunConfig | None) -> dict[str, Any]:
    if config is None:
        return {}
    paths = RunPaths(config.run_dir)
    return {
        "run_dir": str(paths.root),
        "run_dir_bytes": disk_needed(config, paths),
        "cache_bytes": int(config.data.cache_gigabytes * 1e9),
        "mlflow": without_secrets(tracking_uri(config)),
    }


def _bandwidth(
    arguments: Any, config: RunConfig | None, hosts: list[Host], run: _Runner, *, all_well: bool
) -> list[Finding]:
    """All-reduce over all ranks of all hosts at once."""
    if sum(host.slots for host in hosts) < 2:
        return []
    gradient_bytes = 4 * config.model.num_parameters()["total"] if config is not None else None
    if not all_well:
        return [
            Finding(
                "all-reduce", f"all {len(hosts)}", "warn", "not measured", "first mend the hosts that do not answer"
            )
        ]
    local = hosts[0].name == LOCAL
    address = "127.0.0.1" if local else arguments.master_addr or address_of(hosts[0].name)
    port = free_port() if local else arguments.master_port

    def measure(host: Host) -> subprocess.CompletedProcess[str]:
        rendezvous = ["--master-addr", address, "--master-port", str(port)]
        where = [
            "--nnodes",
            str(len(hosts)),
            "--node-rank",
            str(hosts.index(host)),
            "--nproc-per-node",
            str(host.slots),
        ]
        words = ["-m", "torch.distributed.run", *where, *rendezvous, "-m", "launch.allreduce"]
        return run(host, words, timeout_s=BANDWIDTH_S)

    answers = on_each(hosts, measure)
    said = answers[hosts[0].name]
    measured: dict[str, Any] | str
    try:
        measured = json.loads(said.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        errors = [line for line in said.stderr.splitlines() if "Error" in line]
        measured = (errors or said.stderr.strip().splitlines() or ["no answer"])[-1][:200]
    return [judge_bandwidth(measured, hosts=len(hosts), gradient_bytes=gradient_bytes)]
