"""`pldr launch deepspeed | torchrun | slurm | kubernetes`: start a training on several nodes.

`deepspeed --hostfile` starts it on all hosts from here, over ssh. With `--no-ssh`, and with torchrun, one `pldr launch` runs on
every node (launch/backends/nodes.py); slurm and kubernetes submit a job to a scheduler that does just that. However it is
started, it is the stage `train` of the run: `pldr run CONFIG` finds it complete and continues with the next stage.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.commands.terminal import status_lines
from launch.commands.verbs import Report, Result, Verbs, Work, add_config
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from launch.backends.nodes import NodeJob
    from launch.backends.scheduled import ScheduledJob
    from pipeline.config.run import RunConfig


def add_launch_verbs(verbs: Verbs) -> None:
    """The verb `launch` with its own verbs."""
    inner = verbs.group("launch", "start a training on several nodes", metavar="deepspeed|torchrun|slurm|kubernetes")

    def verb(name: str, work: Work, help: str) -> argparse.ArgumentParser:
        sub = inner.add(name, work, help, is_work=True)
        add_config(sub)
        sub.add_argument("--resume", default="auto", metavar="auto|RUN_ID|PATH", help="as of `pldr train`")
        sub.add_argument("--force", action="store_true", help="as of `pldr train`")
        sub.add_argument("--dry-run", action="store_true", help="print the exact files and commands, start nothing")
        return sub

    def on_nodes(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--master-addr", metavar="ADDRESS", help="where the others reach node 0")
        sub.add_argument("--master-port", type=int, default=29500, help="a free port there (29500)")
        sub.add_argument("--wait", type=float, default=600, metavar="S", help="for the other nodes to come up (600)")
        sub.add_argument("--stopped-code", type=int, default=0, metavar="N", help="exit code after a signal's save (0)")

    sub = verb("deepspeed", _deepspeed, "through DeepSpeed's launcher, over ssh or one process a node")
    sub.add_argument("--hostfile", required=True, metavar="FILE", help="a line `HOST slots=RANKS` for each host")
    sub.add_argument("--no-ssh", action="store_true", help="this process is one of those that run on each node")
    sub.add_argument("--node-rank", type=int, metavar="I", help="with --no-ssh: which line of the hostfile, from 0")
    sub.add_argument("--ssh-port", type=int, metavar="PORT")
    sub.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="set it on the hosts, too")
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

    sub = verb("slurm", _slurm, "as a Slurm job that is requeued until training is complete")
    scheduled(sub)
    sub.add_argument("--time", metavar="HH:MM:SS", help="limit of one start (the partition's)")
    sub.add_argument(
        "--signal-before", type=int, default=180, metavar="S", help="save this long before the limit (180)"
    )
    sub.add_argument("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="a further option of sbatch")
    sub = verb("kubernetes", _kubernetes, "as a TrainJob of Kubeflow Trainer v2")
    scheduled(sub)
    sub.add_argument("--image", required=True, help="container image with pldr in it")
    sub.add_argument("--volume", required=True, metavar="CLAIM:/PATH", help="ReadWriteMany claim that holds run_dir")
    sub.add_argument("--namespace", default="default", help="(default)")
    sub.add_argument("--secret", metavar="NAME", help="a Secret with variables: AWS_…, MLFLOW_…")
    sub.add_argument("--memory", default="64Gi", help="of a node (64Gi)")
    sub.add_argument("--max-restarts", type=int, default=10, metavar="N", help="of all pods (10)")


def _config(arguments: Any, report: Report) -> RunConfig:
    """The configuration, with the data of the run that `--resume PATH` goes on from."""
    from pipeline.config.load import load_config

    config = load_config(arguments.config, arguments.overrides)
    from launch.commands.going_on import with_data

    return with_data(config, arguments, report)


def _deepspeed(arguments: Any, report: Report) -> Result:
    from launch.backends import deepspeed, hosts
    from launch.backends.nodes import NodeJob
    from pipeline.config.paths import RunPaths
    from pipeline.stages.train import check
    from pipeline.tracking.default_store import for_several_nodes

    config, known = _config(arguments, report), hosts.read_hostfile(arguments.hostfile)
    if arguments.no_ssh != (arguments.node_rank is not None):
        raise ConfigError("launch deepspeed: --no-ssh and --node-rank I go together")
    if arguments.no_ssh and arguments.env:
        raise ConfigError("launch deepspeed: --env is only read over ssh; with --no-ssh set it in this shell")
    hosts.carried(arguments.env)  # raises for what is no variable
    hostfile = str(Path(arguments.hostfile).absolute())
    address = arguments.master_addr or hosts.rendezvous_address(known)
    job = deepspeed.SshJob(hostfile, known, address, arguments.master_port, arguments.ssh_port, arguments.env)
    if arguments.no_ssh:
        node = arguments.node_rank
        _check_node(node, len(known))
        command = partial(
            deepspeed.node_command, hostfile=hostfile, node_rank=node, address=address, port=arguments.master_port
        )
        sizes = {"nodes": len(known), "ranks": job.ranks, "ranks_here": known[node].slots}
        return _on_node(
            NodeJob(command, node, **sizes, wait_s=arguments.wait, stopped_code=arguments.stopped_code),
            config, arguments, report,
        )  # fmt: skip
    paths = RunPaths(config.run_dir)
    check(config, paths, ranks=job.ranks)
    if arguments.dry_run:
        return job.dry_run(paths.logs, report)
    hosts.require_tools("ssh", "pdsh")
    config = for_several_nodes(config, len(known))
    return deepspeed.train_over_ssh(
        config,
        job,
        resume=arguments.resume,
        force=arguments.force,
        stopped_code=arguments.stopped_code,
        report=report,
        live=status_lines(json=arguments.json),
    )


def _torchrun(arguments: Any, report: Report) -> Result:
    from launch.backends import torchrun
    from launch.backends.nodes import NodeJob
    from pipeline.stages.train import ranks_on_this_node

    config = _config(arguments, report)
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
    command = partial(
        torchrun.node_command,
        nodes=arguments.nodes,
        node_rank=arguments.node_rank,
        ranks_here=ranks_here,
        address=arguments.master_addr,
        port=arguments.master_port,
    )
    sizes = {"nodes": arguments.nodes, "ranks": ranks_here * arguments.nodes, "ranks_here": ranks_here}
    job = NodeJob(command, arguments.node_rank, **sizes, wait_s=arguments.wait, stopped_code=arguments.stopped_code)
    return _on_node(job, config, arguments, report)


def _on_node(job: NodeJob, config: RunConfig, arguments: Any, report: Report) -> Result:
    """This process is one of those that run on each node."""
    from launch.backends.nodes import run_node
    from pipeline.config.paths import RunPaths
    from pipeline.stages.train import check
    from pipeline.tracking.default_store import for_several_nodes

    paths = RunPaths(config.run_dir)
    check(config, paths, ranks=job.ranks)
    if arguments.dry_run:
        return job.dry_run(paths.logs, report)
    live = status_lines(json=arguments.json)
    if job.node == 0:  # the one that logs
        config = for_several_nodes(config, job.nodes)
    return run_node(config, paths, job, resume=arguments.resume, force=arguments.force, report=report, live=live)


def _check_node(node_rank: int, nodes: int) -> None:
    if not 0 <= node_rank < nodes:
        raise ConfigError(f"--node-rank {node_rank}: there are {nodes} nodes, 0 to {nodes - 1}")


def _slurm(arguments: Any, report: Report) -> Result:
    from launch.backends.slurm import SlurmOptions, launch_slurm
    from pipeline.config.load import load_config

    config = load_config(arguments.config, arguments.overrides)
    options = SlurmOptions(arguments.time, arguments.signal_before, arguments.sbatch)
    words = [str(Path(arguments.config).absolute()), *arguments.overrides]
    return launch_slurm(config, _scheduled_job(arguments), options, words, dry=arguments.dry_run, report=report)


def _kubernetes(arguments: Any, report: Report) -> Result:
    from launch.backends.kubernetes import KubernetesOptions, launch_kubernetes
    from pipeline.config.load import load_config

    config = load_config(arguments.config, arguments.overrides)
    options = KubernetesOptions(
        image=arguments.image,
        volume=arguments.volume,
        namespace=arguments.namespace,
        secret=arguments.secret,
        memory=arguments.memory,
        max_restarts=arguments.max_restarts,
    )
    return launch_kubernetes(config, _scheduled_job(arguments), options, dry=arguments.dry_run, report=report)


def _scheduled_job(arguments: Any) -> ScheduledJob:
    from launch.backends.scheduled import ScheduledJob

    gpus = arguments.ranks_per_node if arguments.gpus_per_node is None else arguments.gpus_per_node
    return ScheduledJob(
        nodes=arguments.nodes,
        ranks_per_node=arguments.ranks_per_node,
        gpus_per_node=gpus,
        cpus_per_rank=arguments.cpus_per_rank,
        resume=arguments.resume,
        force=arguments.force,
        template=arguments.template,
    )
