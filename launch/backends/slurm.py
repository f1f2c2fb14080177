"""`pldr launch slurm`: the batch script of a training job, and its submission.

The script (templates/train.sbatch) starts one `pldr launch torchrun` on each node. Slurm requeues the job when a node is lost,
and the script requeues it when its time is up; both resume from the last commit.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.backends.dry_run import dry_run
from launch.backends.job import Report
from launch.backends.scheduled import ScheduledJob, fill_in
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, UserError
from pipeline.io import storage
from pipeline.stages.train import check as check_training

PLDR = [sys.executable, "-m", "launch.cli"]
MARGIN_S = 120  # Slurm sends its signal up to a minute early, and ranks take a while to start
SET_HERE = {"job-name", "nodes", "ntasks-per-node", "signal", "requeue", "open-mode", "output", "array", "parsable"}


@dataclass(frozen=True)
class SlurmOptions:
    """What only Slurm has."""

    time: str | None = None  # limit of one start; None: the partition's
    signal_s: int = 180  # the ranks save this long before the limit
    sbatch: Sequence[str] = ()  # further options of sbatch, such as `partition=gpu`


def launch_slurm(
    config: RunConfig,
    job: ScheduledJob,
    options: SlurmOptions,
    config_words: Sequence[str],
    *,
    dry: bool,
    report: Report,
) -> dict[str, Any]:
    """Submit the batch script. config_words: the YAML and its overrides, for each node. Raises UserError or ConfigError."""
    paths = RunPaths(config.run_dir)
    job.check_resume(paths, base=Path.cwd())
    check_training(config, paths, ranks=job.ranks)
    script = render(config, paths, job, options, [*config_words, *job.node_arguments()])
    file = paths.logs / "train.sbatch"
    check(script, file)
    if dry:
        return dry_run({file: script}, [command(file)], environment(), report=report)
    storage.publish_bytes(file, script.encode())
    job_id = submit(file)
    report(
        f"Slurm job {job_id}: {paths.logs}/slurm-{job_id}.out; stop and save: scancel --batch --signal=USR1 {job_id}"
    )
    return {"job": job_id, "script": str(file)}


def render(
    config: RunConfig, paths: RunPaths, job: ScheduledJob, options: SlurmOptions, arguments: Sequence[str]
) -> str:
    """The batch script. arguments: those of `pldr launch torchrun`. Raises ConfigError."""
    time, signal_s = options.time, options.signal_s
    for option in options.sbatch:
        name = option.partition("=")[0]
        if not re.fullmatch(r"[a-z][a-z-]*(=\S+)?", option):
            raise ConfigError(f"--sbatch {option}: write an option of sbatch as NAME or NAME=VALUE, without blanks")
        if name in SET_HERE:
            raise ConfigError(f"--sbatch {option}: {name} is set by pldr; use the options of `pldr launch slurm`")
    if signal_s < 0:
        raise ConfigError(f"--signal-before {signal_s}: at least 0")
    if time is not None and 0 < seconds_of(time) <= signal_s + MARGIN_S:  # 0: no limit
        raise ConfigError(
            f"--time {time}: leaves no time to train before --signal-before {signal_s} s (which may come a minute early); "
            f"give more than {signal_s + MARGIN_S} s"
        )
    logs = paths.logs
    if re.search(r"[\s%'\"\\]", str(logs)):
        raise ConfigError(f"run_dir {logs.parent}: Slurm's options take no path with blanks, quotes, % or backslashes")
    return fill_in(
        "train.sbatch",
        {
            "name": config.name,
            "job_name": f"pldr-{config.name}",
            "nodes": job.nodes,
            "ranks_per_node": job.ranks_per_node,
            "gpus_per_node": job.gpus_per_node,
            "cpus_per_node": job.cpus_per_rank * job.ranks_per_node,
            "time": time,
            "signal_s": signal_s,
            "options": options.sbatch,
            "logs": str(logs),
            "checkpoints": str(paths.checkpoints),
            "cwd": os.getcwd(),
            "python_path": os.environ.get("PYTHONPATH"),
            "bin": str(Path(sys.executable).parent),
            "pldr": _inside(PLDR),
            "arguments": _inside(arguments),
        },
        own=job.template,
    )


def seconds_of(time: str) -> int:
    """Slurm's time limit: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, or DAYS- and HOURS, HOURS:MINUTES or all three.

    Raises ConfigError.
    """
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", time):
        raise ConfigError(f"--time {time}: write Slurm's form, for example 24:00:00 or 2-00:00:00")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def _inside(words: Sequence[str]) -> str:
    """Words for a shell command that is itself in single quotes."""
    return shlex.join(words).replace("'", "'\\''")


def check(script: str, where: Path) -> None:
    """Raises UserError when it is not a bash script."""
    parsed = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if parsed.returncode:
        raise UserError(f"{where}: not a bash script ({' '.join(parsed.stderr.split())[:200]}); fix the template")


def command(script: Path) -> list[str]:
    """The command that submits it."""
    return ["sbatch", "--parsable", str(script)]


def environment() -> dict[str, str]:
    """The environment of sbatch, without the variables of a Slurm job that this process may run in."""
    kept = ("SLURM_CONF", "SLURM_JWT")
    return {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k in kept}


def submit(script: Path) -> str:
    """Submit it; returns the job's id. Raises UserError."""
    if shutil.which("sbatch") is None:
        raise UserError(f"sbatch is not installed here; on a login node of the cluster: sbatch {script}")
    done = subprocess.run(command(script), capture_output=True, text=True, errors="replace", env=environment())
    if done.returncode:
        raise UserError(f"sbatch refused {script} ({' '.join(done.stderr.split())[:300]}); fix the options")
    return done.stdout.strip().partition(";")[0]
