"""`pldr sweep SWEEP.yaml`: variants or a grid of runs as children of one MLflow run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.commands.verbs import Report, Result, Verbs, add_config
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from launch.backends.hosts import Host
    from pipeline.config.run import RunConfig
    from pipeline.stages.train import Launch
    from pipeline.sweep.sweep import Sweep


def add_sweep_verb(verbs: Verbs) -> None:
    """The verb `sweep`."""
    about = "run variants and every combination of a grid, skip what is complete, and end with one table and plot"
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
    sweep.add_argument(
        "--slurm", action="store_true", help="the unfinished children as one Slurm job array, a node each"
    )
    sweep.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        help="children that run at once: here (1), each on one rank; with --slurm (4)",
    )
    sweep.add_argument(
        "--ranks-per-node", type=int, metavar="N", help="with --slurm: ranks of a child, on its node (1)"
    )
    sweep.add_argument("--gpus-per-node", type=int, metavar="N", help="with --slurm (one for each rank; 0: CPUs)")
    sweep.add_argument("--cpus-per-rank", type=int, default=8, metavar="N", help="with --slurm (8)")
    sweep.add_argument(
        "--time", metavar="HH:MM:SS", help="with --slurm: limit of one start of a child (the partition's)"
    )
    sweep.add_argument(
        "--signal-before", type=int, default=180, metavar="S", help="with --slurm: save this early (180)"
    )
    sweep.add_argument("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="with --slurm")
    sweep.add_argument("--dry-run", action="store_true", help="with --slurm: print the script, submit nothing")
    sweep.add_argument("--only", type=int, metavar="NUMBER", help="run this child only, no table: what --slurm starts")
    sweep.add_argument(
        "--stopped-code", type=int, default=0, metavar="N", help="with --only: exit code after a signal (0)"
    )


def _sweep(arguments: Any, report: Report) -> Result:
    _refuse_without_hostfile(arguments)
    if arguments.slurm:
        return _on_slurm(arguments, report)
    _refuse_without_slurm(arguments)
    if arguments.only is not None:
        return _only(arguments, report)
    from launch.backends.hosts import read_hostfile
    from pipeline.sweep.sweep import Sweep

    if arguments.at_once is not None:
        return _at_once(arguments, report)
    hosts = [] if arguments.hostfile is None else read_hostfile(arguments.hostfile)
    sweep = Sweep(arguments.config, arguments.overrides, nodes=max(1, len(hosts)))
    if hosts:
        start, ranks = _on_hosts(arguments, hosts, [child.config for child in sweep.children], report)
    else:
        start, ranks = _here(report), None
    result = sweep.run(launch=start, report=report, ranks=ranks)
    return _shown(sweep, result, report)


def _refuse_without_slurm(arguments: Any) -> None:
    """Raise ConfigError for an option that only --slurm reads: without it a --dry-run would train."""
    given = {
        "--dry-run": arguments.dry_run,
        "--gpus-per-node": arguments.gpus_per_node is not None,
        "--ranks-per-node": arguments.ranks_per_node is not None and arguments.only is None,
        "--time": arguments.time is not None,
        "--sbatch": bool(arguments.sbatch),
    }
    if wrong := [option for option, is_given in given.items() if is_given]:
        raise ConfigError(f"sweep: {wrong[0]} is only read with --slurm; add --slurm, or remove it")


def _refuse_without_hostfile(arguments: Any) -> None:
    """Raise ConfigError for an option that only --hostfile reads."""
    given = {
        "--master-addr": arguments.master_addr is not None,
        "--ssh-port": arguments.ssh_port is not None,
        "--env": bool(arguments.env),
    }
    if arguments.hostfile is None and (wrong := [option for option, is_given in given.items() if is_given]):
        raise ConfigError(f"sweep: {wrong[0]} is only read with --hostfile; add --hostfile, or remove it")


def _shown(sweep: Sweep, result: Result, report: Report) -> Result:
    from pipeline.sweep.compare import compared, to_come
    from pipeline.sweep.config import VARIANT
    from pipeline.sweep.describe import comparison_lines
    from pipeline.sweep.report import table_lines

    settings = sweep.settings
    for line in table_lines([*([VARIANT] if settings.variants else []), *settings.grid], result["table"]):
        report(line)
    if settings.compare is not None:
        rows = {row["child"]: row for row in result["table"]}
        if left := to_come(sweep.children, rows, settings.compare):
            report(f"children    {left} more are to run: start the sweep again")
        report("")
        for line in comparison_lines(compared(sweep.children, rows, settings.compare), settings.compare):
            report(line)
    report(result["files"]["page"])
    return result


def _on_slurm(arguments: Any, report: Report) -> Result:
    """The children as a Slurm job array. Raises ConfigError."""
    from launch.backends.scheduled import ScheduledJob
    from launch.backends.slurm import SlurmOptions
    from launch.backends.slurm_sweep import sweep_on_slurm
    from pipeline.sweep.sweep import Sweep

    if arguments.hostfile is not None or arguments.only is not None:
        raise ConfigError("sweep: --slurm goes without --hostfile and --only")
    ranks = 1 if arguments.ranks_per_node is None else arguments.ranks_per_node
    gpus = ranks if arguments.gpus_per_node is None else arguments.gpus_per_node
    job = ScheduledJob(
        nodes=1,
        ranks_per_node=ranks,
        gpus_per_node=gpus,
        cpus_per_rank=arguments.cpus_per_rank,
        resume="auto",
        force=False,
        template=None,
    )
    options = SlurmOptions(arguments.time, arguments.signal_before, arguments.sbatch)
    words = [str(Path(arguments.config).absolute()), *arguments.overrides]
    at_once = 4 if arguments.at_once is None else arguments.at_once
    sweep = Sweep(arguments.config, arguments.overrides, apart=True)
    result = sweep_on_slurm(sweep, job, options, words, at_once=at_once, dry=arguments.dry_run, report=report)
    return result if arguments.dry_run else _shown(sweep, result, report)


def _at_once(arguments: Any, report: Report) -> Result:
    """Several children at the same time, here. Raises ConfigError."""
    from launch.backends.local_sweep import sweep_at_once
    from pipeline.sweep.sweep import Sweep

    if arguments.hostfile is not None:
        raise ConfigError("sweep: --at-once goes without --hostfile, whose hosts train one child after another")
    words = [str(Path(arguments.config).absolute()), *arguments.overrides]
    sweep = Sweep(arguments.config, arguments.overrides, apart=True)
    return _shown(sweep, sweep_at_once(sweep, words, at_once=arguments.at_once, report=report), report)


def _only(arguments: Any, report: Report) -> Result:
    """One child, here."""
    from launch.backends.job import stopped_exit_code
    from pipeline.sweep.apart import run_only
    from pipeline.sweep.sweep import Sweep

    sweep = Sweep(arguments.config, arguments.overrides, apart=True)
    with stopped_exit_code(arguments.stopped_code):
        return run_only(sweep, arguments.only, launch=_here(report), report=report, ranks=arguments.ranks_per_node)


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
    from launch.backends.hosts import address_of, carried, require_tools
    from pipeline.train.deepspeed_config import accumulation_steps

    ranks = sum(host.slots for host in hosts)
    for config in children:
        accumulation_steps(config.train, ranks)  # raises when they do not divide
    carried(arguments.env)  # raises for what is no variable
    require_tools()
    address = arguments.master_addr or address_of(hosts[0].name)
    hostfile = str(Path(arguments.hostfile).absolute())
    job = SshJob(hostfile, hosts, address, arguments.master_port, arguments.ssh_port, arguments.env)

    def start(config: RunConfig, job_file: Path, ranks: int) -> None:
        launch_over_ssh(config, job_file, ranks, job, report=lambda text: report(f"  {text}"))

    return start, ranks
