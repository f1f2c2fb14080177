"""`pldr launch deepspeed | torchrun | slurm | kubernetes`: start a training on several nodes.

`deepspeed --hostfile` starts it on all hosts from here, over ssh. With `--no-ssh`, and with torchrun, one `pldr launch` runs on
every node (launch/backends/nodes.py); slurm and kubernetes hand a job to a scheduler that does just that. However it is
started, it is the stage `train` of the run: `pldr run CONFIG` finds it complete and goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from launch.backends.deepspeed import SshJob, launch_over_ssh, node_command
from launch.backends.hosts import environment_file, read_hostfile, rendezvous_address, require_tools
from launch.backends.job import WORKER, rank_environment, run_job
from launch.backends.nodes import Follower, Lead
from launch.backends.scheduled import launch_kubernetes, launch_slurm
from launch.commands.dry_run import dry_run
from launch.commands.terminal import say, status_lines
from pipeline.config.load import load_config
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, Stopped, UserError
from pipeline.stages.runner import Pipeline, exclusive
from pipeline.stages.train import check, ranks_on_this_node

Result = dict[str, Any]
Show = Callable[[str], None]


def add_launch_verbs(verbs: Any, common: argparse.ArgumentParser) -> None:
    """The verb `launch` with its own verbs."""
    about = "start a training on several nodes"
    launch = verbs.add_parser("launch", help=about, description=about)
    inner = launch.add_subparsers(dest="launch_verb", required=True, metavar="deepspeed|torchrun|slurm|kubernetes")

    def verb(name: str, work: Callable[[Any, Show], Result], help: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = inner.add_parser(name, help=help, description=help, parents=[common])
        sub.set_defaults(work=work)
        sub.add_argument("config", metavar="CONFIG", help="YAML of the run")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the YAML")
        sub.add_argument("--resume", default="auto", metavar="auto|RUN_ID|PATH", help="as of `pldr train`")
        sub.add_argument("--force", action="store_true", help="as of `pldr train`")
        sub.add_argument("--dry-run", action="store_true", help="print the exact files and commands, start nothing")
        return sub

    def on_nodes(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--master-addr", metavar="ADDRESS", help="where the others reach node 0")
        sub.add_argument("--master-port", type=int, default=29500, help="a free port there (29500)")
        sub.add_argument("--wait", type=float, default=600, metavar="S", help="for the other nodes to come (600)")
        sub.add_argument("--stopped-code", type=int, default=0, metavar="N", help="exit code after a signal's save (0)")

    sub = verb("deepspeed", _deepspeed, "through DeepSpeed's launcher, over ssh or one process a node")
    sub.add_argument("--hostfile", required=True, metavar="FILE", help="a line `HOST slots=RANKS` for each host")
    sub.add_argument("--no-ssh", action="store_true", help="this process is one of those that run on each node")
    sub.add_argument("--node-rank", type=int, metavar="I", help="with --no-ssh: which line of the hostfile, from 0")
    sub.add_argument("--ssh-port", type=int, metavar="PORT")
    sub.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="carry it to the hosts, too")
    on_nodes(sub)
    sub = verb("torchrun", _torchrun, "through torchrun, one process a node")
    sub.add_argument("--nodes", type=int, default=1, metavar="N")
    sub.add_argument("--node-rank", type=int, default=0, metavar="I", help="which of them this is, from 0 (0)")
    sub.add_argument(
        "--ranks-per-node",
        type=int,
        metavar="N",
        help="(train.ranks, or as many GPUs, or up to 2 on a CPU, as divide the batch)",
    )
    on_nodes(sub)

    def scheduled(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--nodes", type=int, required=True, metavar="N")
        sub.add_argument("--ranks-per-node", type=int, required=True, metavar="N")
        sub.add_argument("--gpus-per-node", type=int, metavar="N", help="(one for each rank; 0 trains on CPUs)")
        sub.add_argument("--cpus-per-rank", type=int, default=8, metavar="N", help="(8)")
        sub.add_argument("--template", metavar="FILE", help="instead of launch/backends/templates/")

    sub = verb("slurm", launch_slurm, "as a Slurm job that is queued again until it is done")
    scheduled(sub)
    sub.add_argument("--time", metavar="HH:MM:SS", help="limit of one start (the partition's)")
    sub.add_argument("--signal-before", type=int, default=180, metavar="S", help="save so long before the limit (180)")
    sub.add_argument("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="a further option of sbatch")
    sub = verb("kubernetes", launch_kubernetes, "as a TrainJob of Kubeflow Trainer v2")
    scheduled(sub)
    sub.add_argument("--image", required=True, help="container image with pldr in it")
    sub.add_argument("--volume", required=True, metavar="CLAIM:/PATH", help="ReadWriteMany claim that holds run_dir")
    sub.add_argument("--namespace", default="default", help="(default)")
    sub.add_argument("--secret", metavar="NAME", help="a Secret with variables: AWS_…, MLFLOW_…")
    sub.add_argument("--memory", default="64Gi", help="of a node (64Gi)")
    sub.add_argument("--max-restarts", type=int, default=10, metavar="N", help="of all pods (10)")


def _deepspeed(arguments: Any, show: Show) -> Result:
    config, hosts = load_config(arguments.config, arguments.overrides), read_hostfile(arguments.hostfile)
    if arguments.no_ssh != (arguments.node_rank is not None):
        raise ConfigError("launch deepspeed: --no-ssh and --node-rank I go together")
    hostfile = str(Path(arguments.hostfile).absolute())
    address = arguments.master_addr or rendezvous_address(hosts)
    ranks = sum(host.slots for host in hosts)
    if arguments.no_ssh:
        _check_node(arguments.node_rank, len(hosts))
        command = partial(
            node_command, hostfile=hostfile, node_rank=arguments.node_rank, address=address, port=arguments.master_port
        )
        return _one_node(
            arguments, config, command=command, nodes=len(hosts), ranks=ranks,
            ranks_here=hosts[arguments.node_rank].slots,
        )  # fmt: skip
    job = SshJob(hostfile, hosts, address, arguments.master_port, arguments.ssh_port, arguments.env)
    paths = RunPaths(config.run_dir)
    check(config, paths, ranks=ranks)
    if arguments.dry_run:
        public, private = job.files(paths.logs).items()
        files = {public[0]: environment_file(public[1])}
        if private[1]:
            files[private[0]] = "".join(f"{name}=…\n" for name in sorted(private[1]))
        job_file = paths.logs / "job.json"
        return dry_run(files, [job.command(job_file)], job.environment(paths.logs), job_file=job_file)
    require_tools("ssh", "pdsh")
    live = status_lines(json=arguments.json)

    def start(config: RunConfig, job_file: Path, ranks: int) -> None:
        launch_over_ssh(config, job_file, ranks, job, show=lambda text: live(f"  {text}"))

    pipeline = Pipeline(config, launch=start, report=say, ranks=ranks)
    with _stops_told(arguments), exclusive(pipeline.paths, say):
        return _train(pipeline, arguments)


def _torchrun(arguments: Any, show: Show) -> Result:
    config = load_config(arguments.config, arguments.overrides)
    if arguments.nodes < 1:
        raise ConfigError(f"--nodes {arguments.nodes}: at least 1")
    _check_node(arguments.node_rank, arguments.nodes)
    if arguments.nodes > 1 and arguments.master_addr is None:
        raise ConfigError("launch torchrun: several nodes need --master-addr, at which they reach node 0")
    ranks_here = arguments.ranks_per_node
    if ranks_here is None:
        ranks_here = ranks_on_this_node(config, nodes=arguments.nodes)
    if ranks_here < 1:
        raise ConfigError(f"--ranks-per-node {ranks_here}: at least 1")

    def command(job_file: Path) -> list[str]:
        where = {
            "--nnodes": arguments.nodes,
            "--node-rank": arguments.node_rank,
            "--nproc-per-node": ranks_here,
            "--master-addr": arguments.master_addr or "127.0.0.1",
            "--master-port": arguments.master_port,
            "--max-restarts": 0,  # ours is train.max_restarts: a restart begins at the last commit, not at the first one
        }
        words = [str(word) for pair in where.items() for word in pair]
        return [sys.executable, "-m", "torch.distributed.run", *words, "-m", WORKER, str(job_file)]

    return _one_node(
        arguments, config, command=command, nodes=arguments.nodes, ranks=ranks_here * arguments.nodes,
        ranks_here=ranks_here,
    )  # fmt: skip


def _one_node(
    arguments: Any,
    config: RunConfig,
    *,
    command: Callable[[Path], list[str]],
    nodes: int,
    ranks: int,
    ranks_here: int,
) -> Result:
    """This process is one of those that run on each node."""
    paths, node = RunPaths(config.run_dir), arguments.node_rank
    job_file = paths.logs / "job.json"
    log_file = paths.logs / ("train.log" if node == 0 else f"train-node{node}.log")
    check(config, paths, ranks=ranks)
    if arguments.dry_run:
        return dry_run({}, [command(job_file)], rank_environment(ranks_here), job_file=job_file)
    live = status_lines(json=arguments.json)

    def run() -> None:
        run_job(
            command(job_file),
            environment=rank_environment(ranks_here),
            ranks=ranks_here,
            log_file=log_file,
            show=lambda text: live(f"  {text}"),
        )

    with _stops_told(arguments):
        if node == 0:
            return _lead(arguments, config, run, nodes=nodes, ranks=ranks)
        paths.logs.mkdir(parents=True, exist_ok=True)
        return _follow(arguments, config, run, node)


@contextlib.contextmanager
def _stops_told(arguments: Any) -> Iterator[None]:
    """A stop by signal ends with --stopped-code; so does a signal that came while no rank ran (there is nothing to save)."""
    signal.signal(signal.SIGUSR1, signal.getsignal(signal.SIGTERM))  # to the end of the process: its last moments, too
    try:
        yield
    except Stopped as stop:
        raise Stopped(str(stop), details=stop.details, exit_code=arguments.stopped_code) from None
    except KeyboardInterrupt:
        if not arguments.stopped_code:
            raise
        raise Stopped("stopped while no rank ran", details={}, exit_code=arguments.stopped_code) from None


def _lead(arguments: Any, config: RunConfig, run: Callable[[], None], *, nodes: int, ranks: int) -> Result:
    """Node 0: the stage, and word to the others of each start and of the end."""
    lead = Lead(RunPaths(config.run_dir), nodes, wait_s=arguments.wait)

    def start(config: RunConfig, job_file: Path, ranks: int) -> None:
        lead.start()
        run()

    pipeline = Pipeline(config, launch=start, report=say, ranks=ranks)
    code, message, stopped = 1, "node 0 ended early", False
    try:
        with exclusive(pipeline.paths, say):
            result = _train(pipeline, arguments)
        code, message = 0, "training is complete"
        return result
    except Stopped as stop:
        code, message, stopped = arguments.stopped_code, str(stop), True
        raise
    except UserError as error:
        code, message = error.exit_code, str(error)
        raise
    finally:
        lead.end(code, message, stopped=stopped)


def _follow(arguments: Any, config: RunConfig, run: Callable[[], None], node: int) -> Result:
    """Another node: its ranks as often as node 0 starts the job, and its verdict."""
    follower = Follower(RunPaths(config.run_dir), node, wait_s=arguments.wait + config.train.publish_wait_s)
    while (end := follower.wait()) is None:
        try:
            run()
        except Stopped:
            pass  # node 0 tells
        except UserError as error:
            say(f"node {node}: {error}")
    if end.stopped:
        raise Stopped(end.message, details={"node": node}, exit_code=end.exit_code)
    if end.exit_code:
        raise UserError(f"node 0: {end.message}", exit_code=end.exit_code)
    say(f"node {node}: {end.message}")
    return {"node": node}


def _train(pipeline: Pipeline, arguments: Any) -> Result:
    return pipeline.stage("train", resume=arguments.resume, force=arguments.force)


def _check_node(node_rank: int, nodes: int) -> None:
    if not 0 <= node_rank < nodes:
        raise ConfigError(f"--node-rank {node_rank}: there are {nodes} nodes, 0 to {nodes - 1}")
