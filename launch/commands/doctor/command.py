"""`pldr doctor [CONFIG] [--hostfile H]`: is every node fit to train, before it costs money?

On each host (launch.commands.doctor.reach) runs launch.commands.doctor.probe; launch.commands.doctor.findings judges the
facts; launch.commands.doctor.allreduce measures the network over all hosts at once. Without a hostfile the same is done for
this machine; without CONFIG what the run would need (its directory, object stores, MLflow) is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from launch.backends.hosts import Host, carried, on_each, read_hostfile, rendezvous_address, require_tools
from launch.backends.job import free_port
from launch.commands.doctor.findings import Finding, as_json, judge, judge_bandwidth, table
from launch.commands.doctor.probe import token_file
from launch.commands.doctor.reach import LOCAL, Runner, reach
from pipeline.checkpoint.format import checkpoint_bytes
from pipeline.config.load import load_config
from pipeline.config.paths import RunPaths, staging_folder, tokens_folder
from pipeline.config.run import RunConfig
from pipeline.distributed import num_devices
from pipeline.errors import ConfigError, UserError
from pipeline.io.urls import is_local, without_secrets
from pipeline.stages.train import disk_needed, ranks_on_this_node
from pipeline.tracking.client import tracking_uri

Result = dict[str, Any]
Show = Callable[[str], None]
PROBE_S, BANDWIDTH_S = 120.0, 150.0
# On the host itself: an ssh that is given up leaves what it has started there.
BANDWIDTH_LIMIT = ["timeout", "-k", "5", "140"]


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
        require_tools("ssh")
    else:
        hosts = [Host(LOCAL, ranks_on_this_node(config) if config else num_devices())]
    run = Runner(arguments.ssh_port)
    findings: list[Finding] = []
    if arguments.hostfile is not None:
        findings += reach(hosts, run)
        if shutil.which("pdsh") is None:
            mend = "apt install pdsh, or start one process a node with --no-ssh --node-rank I"
            findings.append(Finding("pdsh", LOCAL, "warn", "not installed", mend))
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


@contextlib.contextmanager
def _question(config: RunConfig | None) -> Iterator[str]:
    """What the probes are asked; while they look, a file of ours is in the run directory."""
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
    places = (config.data.output, config.tokens.output, config.train.publish_to)
    question |= {
        "run_dir": str(run_dir),
        "urls": sorted({place for place in places if place is not None and not is_local(place)}),
        "mlflow": None if uri.startswith("sqlite:") else uri,
        "remote_tokens": not is_local(tokens_folder(config)),
        "staging": None if staging is None else str(staging),
    }
    ours = token_file(run_dir, question["token"])
    with contextlib.suppress(OSError):  # then the probes tell it
        ours.write_bytes(b"")
    try:
        yield json.dumps(question)
    finally:
        ours.unlink(missing_ok=True)


def _probe(host: Host, question: str, run: Runner) -> dict[str, Any] | Finding:
    """A host's facts, or why there are none."""
    asked = run(host, ["-m", "launch.commands.doctor.probe"], stdin=question, timeout_s=PROBE_S)
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
        "staging_bytes": checkpoint_bytes(config.model),
        "cache_bytes": int(config.data.cache_gigabytes * 1e9),
        "mlflow": without_secrets(tracking_uri(config)),
    }


def _bandwidth(
    arguments: Any, config: RunConfig | None, hosts: list[Host], run: Runner, *, all_well: bool
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
    try:
        address = "127.0.0.1" if local else arguments.master_addr or rendezvous_address(hosts)
    except ConfigError as error:
        found, _, mend = str(error).rpartition("; ")
        return [Finding("all-reduce", f"all {len(hosts)}", "FAIL", found, mend)]
    port = free_port() if local else arguments.master_port

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
    return [judge_bandwidth(measured, hosts=len(hosts), gradient_bytes=gradient_bytes)]


def first_failure(answers: dict[str, tuple[float, subprocess.CompletedProcess[str]]]) -> str:
    """The host that failed first, and why: the others only lost it. answers: when each ended, and with what."""
    failed = sorted((ended, host) for host, (ended, done) in answers.items() if done.returncode)
    if not failed:
        return "no answer"
    host = failed[0][1]
    done = answers[host][1]
    if done.returncode in (-1, 124, 137):
        return f"{host}: no end within {BANDWIDTH_LIMIT[-1]} s"
    errors = re.findall(r"\w*(?:Error|Exception): \S.*", done.stderr)  # a rank's; torchrun's own names no reason
    reason = (errors or done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"{host}: {reason[:200]}"
