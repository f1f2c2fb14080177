"""`pldr doctor [CONFIG] [--hostfile H]`: is every node ready to train, before GPU time is spent?

`probe.py` runs on each host (through `connect.py`) and reports facts; `findings.py` checks them; `allreduce.py` measures the
network over all hosts at once; `collect.py` puts it together. Without a hostfile the same is done for this machine; without
CONFIG what the run would need (its directory, object stores, MLflow) is left out.
"""

from __future__ import annotations

from typing import Any

from launch.commands.verbs import Report, Result, Verbs, add_overrides
from pipeline.errors import ConfigError, UserError


def add_doctor_verb(verbs: Verbs) -> None:
    """The verb `doctor`."""
    about = (
        "check every node before a training: ssh, versions, GPUs, network, storage, MLflow, limits; exit 1 on a failure"
    )
    sub = verbs.add("doctor", _doctor, about)
    sub.add_argument("config", nargs="?", metavar="CONFIG", help="YAML of the run: its run_dir, stores and MLflow")
    add_overrides(sub, "override a key of the YAML")
    sub.add_argument("--hostfile", metavar="FILE", help="a line `HOST slots=RANKS` for each host (else this machine)")
    sub.add_argument("--master-addr", metavar="ADDRESS", help="where the others reach the first host")
    sub.add_argument("--master-port", type=int, default=29500, help="a free port there (29500)")
    sub.add_argument("--ssh-port", type=int, metavar="PORT")
    sub.add_argument("--quick", action="store_true", help="without the all-reduce, which uses the GPUs for a moment")


def _doctor(arguments: Any, report: Report) -> Result:
    from pipeline.config.load import load_config

    if arguments.config is None and arguments.overrides:
        raise ConfigError("doctor: key=value goes with the YAML of a run")
    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    from launch.backends.hosts import Host, read_hostfile, require_tools
    from launch.commands.doctor.collect import collect
    from launch.commands.doctor.connect import LOCAL
    from launch.commands.doctor.findings import as_json, table
    from pipeline.devices import num_devices
    from pipeline.stages.train import ranks_on_this_node

    if arguments.hostfile is not None:
        hosts = read_hostfile(arguments.hostfile)
        require_tools("ssh")
    else:
        hosts = [Host(LOCAL, ranks_on_this_node(config) if config else num_devices())]
    findings = collect(
        config,
        hosts,
        master_addr=arguments.master_addr,
        master_port=arguments.master_port,
        ssh_port=arguments.ssh_port,
        quick=arguments.quick,
    )
    for line in table(findings, len(hosts)):
        report(line)
    failures = [f for f in findings if f.status == "FAIL"]
    warnings = [f for f in findings if f.status == "warn"]
    counts = {"failures": len(failures), "warnings": len(warnings)}
    result = {"hosts": [h.name for h in hosts], "findings": as_json(findings), **counts}
    if failures:
        names = ", ".join(dict.fromkeys(f"{f.check} ({f.host})" for f in failures))
        raise UserError(f"doctor: {len(failures)} failed: {names}; fix them, or training will fail", details=result)
    report(f"{len(hosts)} {'hosts' if len(hosts) > 1 else 'host'}, {len(findings)} checks: ready to train")
    return result
