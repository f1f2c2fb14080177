"""`pldr launch slurm | kubernetes`: check, write and submit what a scheduler gets (launch/backends/slurm.py, kubernetes.py)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.backends import kubernetes, slurm
from launch.commands.dry_run import dry_run
from launch.commands.terminal import say
from pipeline.checkpoint.format import is_checkpoint_name
from pipeline.config.load import load_config
from pipeline.config.paths import RunPaths
from pipeline.errors import ConfigError
from pipeline.io import storage
from pipeline.stages.train import check

Result = dict[str, Any]
Show = Callable[[str], None]


def launch_slurm(arguments: Any, show: Show) -> Result:
    """Submit the batch script. Raises UserError or ConfigError."""
    config = load_config(arguments.config, arguments.overrides)
    _check_sizes(arguments)
    paths = RunPaths(config.run_dir)
    _check_resume(arguments.resume, paths, base=Path.cwd())
    check(config, paths, ranks=arguments.nodes * arguments.ranks_per_node)
    script = slurm.render(
        config,
        nodes=arguments.nodes,
        ranks_per_node=arguments.ranks_per_node,
        gpus_per_node=_gpus(arguments),
        cpus_per_rank=arguments.cpus_per_rank,
        time=arguments.time,
        signal_s=arguments.signal_before,
        options=arguments.sbatch,
        arguments=[str(Path(arguments.config).absolute()), *arguments.overrides, *_choices(arguments)],
        template=arguments.template,
    )
    file = paths.logs / "train.sbatch"
    slurm.check(script, file)
    if arguments.dry_run:
        return dry_run({file: script}, [slurm.command(file)], slurm.environment())
    storage.publish_bytes(file, script.encode())
    job = slurm.submit(file)
    say(f"Slurm job {job}: {paths.logs}/slurm-{job}.out; stop and save: scancel --batch --signal=USR1 {job}")
    return {"job": job, "script": str(file)}


def launch_kubernetes(arguments: Any, show: Show) -> Result:
    """Apply the manifests. Raises UserError or ConfigError."""
    from pipeline.train.engine import accumulation_steps

    config = load_config(arguments.config, arguments.overrides)
    _check_sizes(arguments)
    mount = Path(arguments.volume.partition(":")[2])  # the pods' working directory
    _check_resume(arguments.resume, RunPaths(config.run_dir), base=mount)
    accumulation_steps(config.train, arguments.nodes * arguments.ranks_per_node)  # raises when they do not divide
    name, manifests = kubernetes.render(
        config,
        image=arguments.image,
        volume=arguments.volume,
        namespace=arguments.namespace,
        secret=arguments.secret,
        nodes=arguments.nodes,
        ranks_per_node=arguments.ranks_per_node,
        gpus_per_node=_gpus(arguments),
        cpus_per_rank=arguments.cpus_per_rank,
        memory=arguments.memory,
        max_restarts=arguments.max_restarts,
        grace_s=180,
        arguments=_choices(arguments),
        template=arguments.template,
    )
    file = Path(f"{name}.yaml")  # run_dir is in the cluster's volume, not here
    if arguments.dry_run:
        return dry_run({file: manifests}, [["kubectl", "apply", "-f", str(file)]], os.environ)
    storage.publish_bytes(file, manifests.encode())
    say(kubernetes.submit(file))
    say(f"watch       kubectl -n {arguments.namespace} get trainjob {name} -w")
    say(f"again       kubectl delete -f {file} && kubectl apply -f {file}   (goes on from the last commit)")
    return {"job": name, "file": str(file)}


def _check_resume(given: str, paths: RunPaths, *, base: Path) -> None:
    """A scheduler starts the same command again: what goes back to an earlier checkpoint would do so every time.

    base: the directory that the job runs in, which a relative `--resume` is below.
    """
    if given.startswith("runs:/"):
        back = "/checkpoints/step-" in given
    else:
        path = Path(os.path.normpath(base / Path(given).expanduser()))
        back = str(path.parent) == os.path.normpath(paths.checkpoints) and is_checkpoint_name(path.name)
    if back:
        raise ConfigError(
            f"--resume {given}: would go back there at every start; go back once with `pldr train CONFIG --resume {given} "
            "--prepare N`, then launch without --resume"
        )


def _check_sizes(arguments: Any) -> None:
    for option in ("nodes", "ranks_per_node", "cpus_per_rank"):
        if getattr(arguments, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')} {getattr(arguments, option)}: at least 1")

    if arguments.gpus_per_node is not None and arguments.gpus_per_node < 0:
        raise ConfigError(f"--gpus-per-node {arguments.gpus_per_node}: at least 0, which trains on CPUs")


def _gpus(arguments: Any) -> int:
    return int(arguments.ranks_per_node if arguments.gpus_per_node is None else arguments.gpus_per_node)


def _choices(arguments: Any) -> list[str]:
    """What is handed on to the `pldr launch` of each node."""
    resume = [] if arguments.resume == "auto" else ["--resume", arguments.resume]
    return [*resume, *(["--force"] if arguments.force else [])]
