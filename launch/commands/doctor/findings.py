"""What the facts of the nodes mean: each check is one finding per host, with a fix where something is wrong. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.io.urls import public_url

Facts = dict[str, Any]
Status = Literal["ok", "warn", "FAIL"]
MAX_SKEW_S = 2.0  # heartbeats count as missing after 5 s (pipeline/train/heartbeat.py)
LEAST_FILES, GOOD_FILES = 1024, 4096
LEAST_SHM, LEAST_TMP = 1 << 30, 1 << 30
SLOW_GB_PER_S = {"nccl": 1.0, "gloo": 0.1}  # of bus bandwidth between hosts: 10 Gbit/s and 1 Gbit/s Ethernet


@dataclass(frozen=True)
class Finding:
    """One check of one host. fix: what to do, empty when nothing is wrong."""

    check: str
    host: str
    status: Status
    found: str
    fix: str = ""


def check_nodes(facts: dict[str, Facts], *, slots: dict[str, int], needs: Facts) -> list[Finding]:
    """The findings about the nodes that sent facts. slots: ranks of each host. needs: {"run_dir", "run_dir_bytes",
    "staging_bytes", "cache_bytes", "mlflow"}, null for what is not needed."""
    first = next(iter(facts))
    with_gpus = [host for host, node in facts.items() if node["gpus"]]
    driven = [host for host in with_gpus if (facts[host]["driver"] or {}).get("version")]
    found: list[Finding] = []
    for host, node in facts.items():

        def add(check: str, good: bool, text: str, fix: str, bad: Status = "FAIL", host: str = host) -> None:
            found.append(Finding(check, host, "ok" if good else bad, text, "" if good else fix))

        _software(add, node, facts[first], first)
        model = (with_gpus or [first])[0]  # the others are compared with it
        _gpus(add, node, facts[model], model, slots[host])
        if host in driven:
            _driver(add, node, facts[driven[0]], driven[0])
        _storage(add, node, needs, slots[host] / sum(slots.values()))
        _limits(add, node)
    return found


Add = Callable[..., None]


def _software(add: Add, node: Facts, other: Facts, first: str) -> None:
    mine, theirs = node["versions"], other["versions"]
    differ = [f"{k} {mine[k] or 'missing'} ({first}: {theirs[k] or 'missing'})" for k in mine if mine[k] != theirs[k]]
    shown = ", ".join(f"{k} {v}" for k, v in mine.items() if k in ("python", "torch", "deepspeed", "pldr"))
    add(
        "packages",
        not differ,
        "; ".join(differ) or shown,
        "install with -c constraints.txt on every host, or one venv for all",
    )
    same = node["code"] == other["code"]
    text = f"sha256 {node['code']}" + ("" if same else f" ({first}: {other['code']})")
    add("pldr's code", same, text, "check out the same commit on every host")


def _gpus(add: Add, node: Facts, other: Facts, first: str, slots: int) -> None:
    gpus, driver = node["gpus"], node["driver"]
    if driver is not None and "error" in driver:
        add("GPUs", False, driver["error"], "repair the NVIDIA driver (reboot, or reload the kernel module)")
    elif driver is not None and not gpus:
        text = f"nvidia-smi sees {driver['gpus']}, torch none (CUDA {node['cuda'] or 'not built in'})"
        add("GPUs", False, text, "install torch for this driver's CUDA; look at CUDA_VISIBLE_DEVICES")
    elif gpus and len(gpus) < slots:
        add("GPUs", False, f"{len(gpus)} for {slots} ranks", "write slots=N with N at most the GPUs of the host")
    elif sorted(set(gpus)) != sorted(set(other["gpus"])):
        text = f"{', '.join(sorted(set(gpus))) or 'none'} ({first}: {', '.join(sorted(set(other['gpus']))) or 'none'})"
        add("GPUs", False, text, "use hosts with the same GPUs: the slowest sets the pace, and NCCL needs one on each")
    elif not gpus and node["cuda"] is not None and node["accelerator"] != "cpu":
        text = f"torch is built for CUDA {node['cuda']}, but no GPU is visible: ranks would run on the CPU over gloo"
        add("GPUs", False, text, "install NVIDIA's driver (containers: its runtime), or set DS_ACCELERATOR=cpu", "warn")
    else:
        add("GPUs", True, f"{len(gpus)} x {gpus[0]}" if gpus else "none: ranks run on the CPU over gloo", "")


def _driver(add: Add, node: Facts, other: Facts, first: str) -> None:
    mine, theirs = node["driver"]["version"], other["driver"]["version"]
    same = mine == theirs and node["nccl"] == other["nccl"]
    text = f"{mine}, CUDA {node['cuda']}, NCCL {node['nccl']}"
    add(
        "driver",
        same,
        text + ("" if same else f" ({first}: {theirs}, NCCL {other['nccl']})"),
        "install the same driver",
    )


def _storage(add: Add, node: Facts, needs: Facts, share: float) -> None:
    """share: which part of all ranks is on this host."""
    if "run_dir" in node:
        error = node["run_dir"]
        fix = "mount the same writable file system at the same path on every host, or set run_dir to one"
        add("run_dir", error is None, error or f"{needs['run_dir']}: the same everywhere, writable", fix)
        free, needed = node["run_dir_free"], needs["run_dir_bytes"]
        text = f"run_dir: {_size(free)} free, {_size(needed)} needed for checkpoints"
        add(
            "disk",
            free is not None and free >= needed,
            text,
            "free some space, lower train.keep_checkpoints, or move run_dir",
        )
    if "staging" in node:
        error, free, needed = node["staging"], node["staging_free"], int(needs["staging_bytes"] * share)
        text = error or f"{_size(free)} free, {_size(needed)} needed for this host's part of a checkpoint"
        good = error is None and free is not None and free >= needed
        fix = "free some space, or set train.staging to a writable folder with more of it (null: none)"
        add("staging", good, f"train.staging: {text}", fix)
    for url, error in node["urls"].items():
        add(
            "storage",
            error is None,
            f"{public_url(url)}: {error or 'written, read back, removed'}",
            "correct the address, the network or the credentials (AWS_…)",
        )
    if "mlflow" in node:
        fix = "start the server, open its port to this host, look at MLFLOW_TRACKING_USERNAME and _PASSWORD"
        add("MLflow", node["mlflow"] is None, node["mlflow"] or f"{needs['mlflow']} is reachable", fix)
    if "cache_free" in node:
        text = f"cache of remote tokens: {_size(node['cache_free'])} free, {_size(needs['cache_bytes'])} wanted"
        good = (node["cache_free"] or 0) >= needs["cache_bytes"]
        add("disk", good, text, "set XDG_CACHE_HOME to a larger local disk or lower data.cache_gigabytes", "warn")
    add(
        "disk",
        (node["tmp_free"] or 0) >= LEAST_TMP,
        f"{node['tmp']}: {_size(node['tmp_free'])} free",
        "free some space or set TMPDIR",
    )


def _limits(add: Add, node: Facts) -> None:
    files = node["open_files"]
    few: Status = "FAIL" if 0 <= files < LEAST_FILES else "warn"
    fix = f"raise nofile to {GOOD_FILES} or more in /etc/security/limits.conf (over ssh: and UsePAM yes)"
    add("ulimit -n", files < 0 or files >= GOOD_FILES, "unlimited" if files < 0 else f"{files} open files", fix, few)
    locked, rdma = node["locked_memory"], node["rdma"]
    text = ("unlimited" if locked < 0 else _size(locked)) + (" with RDMA devices" if rdma else ", no RDMA devices")
    add("ulimit -l", locked < 0 or not rdma, text, "set memlock to unlimited: NCCL pins memory for RDMA")
    if node["gpus"]:
        good = (node["shm_free"] or 0) >= LEAST_SHM
        add(
            "/dev/shm",
            good,
            f"{_size(node['shm_free'])} free",
            "enlarge it (containers: --shm-size, an emptyDir): NCCL's buffers",
        )


def check_clock(skews: dict[str, tuple[float, float]]) -> list[Finding]:
    """skews: how far each host's clock is ahead of this one, and the uncertainty of that, in seconds."""
    found = []
    for host, (skew, doubt) in skews.items():
        if abs(skew) - doubt <= MAX_SKEW_S:
            found.append(Finding("clock", host, "ok", f"less than {max(1, math.ceil(abs(skew) + doubt))} s apart"))
            continue
        fix = "let chrony or ntpd set the clock: a rank whose clock differs counts as dead"
        found.append(Finding("clock", host, "FAIL", f"{skew:+.1f} s against this host's (to {doubt:.1f} s)", fix))
    return found


def check_bandwidth(measured: Facts | str, *, hosts: int, gradient_bytes: int | None) -> Finding:
    """measured: the result of launch/commands/doctor/allreduce.py, or why there is none."""
    where = f"all {hosts}" if hosts > 1 else "this host"
    if isinstance(measured, str):
        fix = (
            "open all ports between the hosts; set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO shows more"
        )
        return Finding("all-reduce", where, "FAIL", measured, fix)
    rate, backend = measured["bus_gb_per_s"], measured["backend"]
    text = f"{backend}, {measured['ranks']} ranks: {rate:.2f} GB/s bus bandwidth"
    if gradient_bytes is not None:
        text += f", {gradient_bytes / measured['bytes'] * measured['seconds']:.2g} s for one step's gradients"
    if hosts > 1 and rate < SLOW_GB_PER_S[backend]:
        fix = "is this the fast network? NCCL_SOCKET_IFNAME and NCCL_IB_HCA select it; NCCL_DEBUG=INFO shows which one is used"
        return Finding("all-reduce", where, "warn", text, fix)
    return Finding("all-reduce", where, "ok", text)


def table(findings: Iterable[Finding], num_hosts: int) -> list[str]:
    """The findings as lines: one for all hosts where they agree, and below each problem its fix."""
    groups: dict[tuple[str, Status, str, str], list[str]] = {}
    for f in findings:
        groups.setdefault((f.check, f.status, f.found, f.fix), []).append(f.host)
    lines = [f"{'':4}  {'check':<12} {'host':<20} found"]
    for (check, status, found, fix), hosts in groups.items():
        where = f"all {num_hosts}" if len(hosts) == num_hosts > 1 else ", ".join(hosts)
        lines.append(f"{status:<4}  {check:<12} {where:<20} {found}")
        if fix:
            lines.append(f"{'':4}  {'':<12} {'':<20} -> {fix}")
    return lines


def as_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Plain values."""
    return [asdict(finding) for finding in findings]


def _size(count: int | None) -> str:
    if count is None:
        return "?"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
