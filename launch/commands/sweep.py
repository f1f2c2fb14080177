"""`pldr sweep SWEEP.yaml`: a grid of runs as children of one MLflow run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.commands.verbs import Report, Result, Verbs, add_config

if TYPE_CHECKING:
    from launch.backends.hosts import Host
    from pipeline.config.run import RunConfig
    from pipeline.stages.train import Launch


def add_sweep_verb(verbs: Verbs) -> None:
    """The verb `sweep`."""
    about = "run every combination of a grid, skip what is complete, and end with one table and plot"
    sweep = verbs.add("sweep", _sweep, about, is_work=True)
    add_config(sweep, metavar="SWEEP", help="YAML of the sweep, such as configs/sweeps/invariance_budget.yaml")
    sweep.add_argument(
        "--hostfile", metavar="FILE", help="train each child on these hosts, as `pldr launch deepspeed` does"
    )
    sweep.add_argument(
        "--master-addr", metavar="ADDRESS", help="with --hostfile: where the others reach its first host"
    )
    sweep.add_argument("--master-port", type=int, default=29500, help="with --hostfile: a free port there (29500)")
    sweep.add_argument("--ssh-port", type=int, metavar="PORT", help="with --hostfile")
    sweep.add_argument(
        "--env", action="append", default=[], metavar="NAME[=VALUE]", help="with --hostfile: set it there, too"
    )


def _sweep(arguments: Any, report: Report) -> Result:
    from launch.backends.hosts import read_hostfile
    from pipeline.sweep.report import table_lines
    from pipeline.sweep.sweep import Sweep

    hosts = [] if arguments.hostfile is None else read_hostfile(arguments.hostfile)
    sweep = Sweep(arguments.config, arguments.overrides, nodes=max(1, len(hosts)))
    if hosts:
        start, ranks = _on_hosts(arguments, hosts, [child.config for child in sweep.children], report)
    else:
        start, ranks = _here(report), None
    result = sweep.run(launch=start, report=report, ranks=ranks)
    for line in table_lines(list(sweep.settings.grid), result["table"]):
        report(line)
    report(result["files"]["page"])
    return result


def _here(report: Report) -> Launch:
    """Train on this node."""
    from launch.backends.deepspeed import launch

    def start(config: RunConfig, job_file: Path, ranks: int) -> None:
        launch(config, job_file, ranks, report=lambda text: report(f"  {text}"))

    return start


def _on_hosts(arguments: Any, hosts: list[Host], children: list[RunConfig], report: Report) -> tuple[Launch, int]:
    """Train over ssh on the hosts of a hostfile, all of them for each child; how many ranks that are. Everything else of a
    child is done here. Raises ConfigError."""
    from launch.backends.deepspeed import SshJob, launch_over_ssh
    from launch.backends.hosts import address_of, require_tools
    from pipeline.train.deepspeed_config import accumulation_steps

    ranks = sum(host.slots for host in hosts)
    for config in children:
        accumulation_steps(config.train, ranks)  # raises when they do not divide
    require_tools()
    address = arguments.master_addr or address_of(hosts[0].name)
    hostfile = str(Path(arguments.hostfile).absolute())
    job = SshJob(hostfile, hosts, address, arguments.master_port, arguments.ssh_port, arguments.env)

    def start(config: RunConfig, job_file: Path, ranks: int) -> None:
        launch_over_ssh(config, job_file, ranks, job, report=lambda text: report(f"  {text}"))

    return start, ranks
