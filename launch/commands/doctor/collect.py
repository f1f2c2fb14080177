"""The findings of all hosts: connections first, then the facts of each, then the network over all of them at once."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

from launch.backends.hosts import Host, carried, on_each, rendezvous_address
from launch.commands.doctor.connect import LOCAL, Runner, check_connections
from launch.commands.doctor.findings import Finding, check_bandwidth, check_nodes
from launch.commands.doctor.probe import token_file
from pipeline.checkpoint.format import checkpoint_bytes
from pipeline.config.paths import RunPaths, staging_folder, tokens_folder
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError
from pipeline.io.urls import is_local, without_secrets
from pipeline.network import free_port
from pipeline.stages.train import disk_needed
from pipeline.tracking.client import tracking_uri

PROBE_S, BANDWIDTH_S = 120.0, 150.0
# A limit on the host itself: when ssh times out, what it started there keeps running.
BANDWIDTH_LIMIT = ["timeout", "-k", "5", "140"]


def collect(
    config: RunConfig | None,
    hosts: list[Host],
    *,
    master_addr: str | None,
    master_port: int,
    ssh_port: int | None,
    quick: bool,
) -> list[Finding]:
    """All findings. hosts: those of a hostfile, or LOCAL alone. quick: without the all-reduce."""
    run = Runner(ssh_port)
    findings: list[Finding] = []
    if hosts[0].name != LOCAL:
        findings += check_connections(hosts, run)
        if shutil.which("pdsh") is None:
            fix = "apt install pdsh, or start one process a node with --no-ssh --node-rank I"
            findings.append(Finding("pdsh", LOCAL, "warn", "not installed", fix))
    unreachable = {f.host for f in findings if f.check == "ssh" and f.status == "FAIL"}
    reachable = [host for host in hosts if host.name not in unreachable]
    facts: dict[str, Any] = {}
    if reachable:
        with _question(config) as question:
            answers = on_each(reachable, lambda host: _probe(host, question, run))
        findings += [answer for answer in answers.values() if isinstance(answer, Finding)]
        facts = {name: answer for name, answer in answers.items() if not isinstance(answer, Finding)}
    if facts:
        findings += check_nodes(facts, slots={h.name: h.slots for h in hosts}, needs=_needs(config))
    if not quick:
        findings += bandwidth(
            hosts,
            run,
            gradient_bytes=None if config is None else 4 * config.model.num_parameters()["total"],
            master_addr=master_addr,
            master_port=master_port,
            all_ok=len(facts) == len(hosts),
        )
    return findings


@contextlib.contextmanager
def _question(config: RunConfig | None) -> Iterator[str]:
    """What the probes are asked, as JSON. While they run, a file of ours is in the run directory."""
    question: dict[str, Any] = {
        "run_dir": None,
        "token": uuid.uuid4().hex,
        "urls": [],
        "mlflow": None,
        "remote_tokens": False,
        "staging": None,
        "environment": carried(),
    }
    if config is None:
        yield json.dumps(question)
        return
    run_dir, uri, staging = RunPaths(config.run_dir).root, tracking_uri(config), staging_folder(config)
    stores = (config.data.output, config.tokens.output, config.train.publish_to)
    question |= {
        "run_dir": str(run_dir),
        "urls": sorted({url for url in stores if url is not None and not is_local(url)}),
        "mlflow": None if uri.startswith("sqlite:") else uri,
        "remote_tokens": not is_local(tokens_folder(config)),
        "staging": None if staging is None else str(staging),
    }
    ours = token_file(run_dir, question["token"])
    with contextlib.suppress(OSError):  # then the probes report it
        ours.write_bytes(b"")
    try:
        yield json.dumps(question)
    finally:
        ours.unlink(missing_ok=True)


def _probe(host: Host, question: str, run: Runner) -> dict[str, Any] | Finding:
    """A host's facts, or why there are none."""
    done = run(host, ["-m", "launch.commands.doctor.probe"], stdin=question, timeout_s=PROBE_S)
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return answer
    except (IndexError, ValueError):
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        fix = f"install pldr for {sys.executable} there too: every host has the same paths"
        return Finding("packages", host.name, "FAIL", error[:300], fix)


def _needs(config: RunConfig | None) -> dict[str, Any]:
    if config is None:
        return {}
    paths = RunPaths(config.run_dir)
    return {
        "run_dir": str(paths.root),
        "run_dir_bytes": disk_needed(config, paths),
        "staging_bytes": checkpoint_bytes(config.model),
        "cache_bytes": int(config.data.cache_gigabytes * 1e9),
        "mlflow": without_secrets(tracking_uri(config)),
    }


def bandwidth(
    hosts: list[Host],
    run: Runner,
    *,
    gradient_bytes: int | None,
    master_addr: str | None,
    master_port: int,
    all_ok: bool,
) -> list[Finding]:
    """All-reduce over all ranks of all hosts at once. all_ok: every host sent facts."""
    if sum(host.slots for host in hosts) < 2:
        return []
    if not all_ok:
        fix = "first fix the hosts that sent no facts"
        return [Finding("all-reduce", f"all {len(hosts)}", "warn", "not measured", fix)]
    local = hosts[0].name == LOCAL
    try:
        address = "127.0.0.1" if local else master_addr or rendezvous_address(hosts)
    except ConfigError as error:
        found, _, fix = str(error).rpartition("; ")
        return [Finding("all-reduce", f"all {len(hosts)}", "FAIL", found, fix)]
    port = free_port() if local else master_port

    def measure(host: Host) -> tuple[float, subprocess.CompletedProcess[str]]:
        where = [
            "--nnodes",
            str(len(hosts)),
            "--node-rank",
            str(hosts.index(host)),
            "--nproc-per-node",
            str(host.slots),
        ]
        rendezvous = ["--master-addr", address, "--master-port", str(port)]
        words = ["-m", "torch.distributed.run", *where, *rendezvous, "-m", "launch.commands.doctor.allreduce"]
        done = run(host, words, prefix=BANDWIDTH_LIMIT, timeout_s=BANDWIDTH_S)
        return time.monotonic(), done

    answers = on_each(hosts, measure)
    measured: dict[str, Any] | str
    try:
        measured = json.loads(answers[hosts[0].name][1].stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        measured = first_failure(answers)
    return [check_bandwidth(measured, hosts=len(hosts), gradient_bytes=gradient_bytes)]


def first_failure(answers: dict[str, tuple[float, subprocess.CompletedProcess[str]]]) -> str:
    """The host that failed first, and why; the others failed because of it. answers: when each ended, and with what."""
    failed = sorted((ended, host) for host, (ended, done) in answers.items() if done.returncode)
    if not failed:
        return "no result"
    host = failed[0][1]
    done = answers[host][1]
    if done.returncode in (-1, 124, 137):
        return f"{host}: did not finish within {BANDWIDTH_LIMIT[-1]} s"
    errors = re.findall(r"\w*(?:Error|Exception): \S.*", done.stderr)  # a rank's; torchrun's own gives no reason
    reason = (errors or done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"{host}: {reason[:200]}"
