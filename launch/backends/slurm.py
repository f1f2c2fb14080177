"""`pldr launch slurm`: the batch script of a training job, and its submission.

The script (templates/train.sbatch) starts one `pldr launch torchrun` on each node. Slurm queues the job again when a
node is lost, and the script does when the time was up; both go on from the last commit.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.backends.template import fill_in
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, UserError

PLDR = [sys.executable, "-m", "launch.cli"]
MARGIN_S = 120  # Slurm's signal comes up to a minute early, and ranks take a while to start
SET_HERE = {"job-name", "nodes", "ntasks-per-node", "signal", "requeue", "open-mode", "output", "array", "parsable"}


def render(
    config: RunConfig,
    *,
    nodes: int,
    ranks_per_node: int,
    gpus_per_node: int,
    cpus_per_rank: int,
    time: str | None,
    signal_s: int,
    options: Sequence[str],
    arguments: Sequence[str],
    template: str | None = None,
) -> str:
    """The batch script. options: further ones of sbatch, `partition=gpu`; arguments: those of `pldr launch torchrun`."""
    for option in options:
        name = option.partition("=")[0]
        if not re.fullmatch(r"[a-z][a-z-]*(=\S+)?", option):
            raise ConfigError(f"--sbatch {option}: write an option of sbatch as NAME or NAME=VALUE, without blanks")
        if name in SET_HERE:
            raise ConfigError(f"--sbatch {option}: {name} is set by pldr; use the options of `pldr launch slurm`")
    if signal_s < 0:
        raise ConfigError(f"--signal-before {signal_s}: at least 0")
    if time is not None and 0 < seconds_of(time) <= signal_s + MARGIN_S:  # 0: no limit
        raise ConfigError(
            f"--time {time}: leaves no time to train before --signal-before {signal_s} s (which comes up to a minute early); "
            f"give more than {signal_s + MARGIN_S} s"
        )
    paths = RunPaths(config.run_dir)
    logs = paths.logs
    if re.search(r"[\s%'\"\\]", str(logs)):
        raise ConfigError(f"run_dir {logs.parent}: Slurm's options take no path with blanks, quotes, % or backslashes")
    return fill_in(
        "train.sbatch",
        {
            "name": config.name,
            "job_name": f"pldr-{config.name}",
            "nodes": nodes,
            "ranks_per_node": ranks_per_node,
            "gpus_per_node": gpus_per_node,
            "cpus_per_node": cpus_per_rank * ranks_per_node,
            "time": time,
            "signal_s": signal_s,
            "options": options,
            "logs": str(logs),
            "checkpoints": str(paths.checkpoints),
            "cwd": os.getcwd(),
            "bin": str(Path(sys.executable).parent),
            "pldr": _inside(PLDR),
            "arguments": _inside(arguments),
        },
        own=template,
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
    """Words for a shell that is itself given its text between single quotes."""
    return shlex.join(words).replace("'", "'\\''")


def check(script: str, where: Path) -> None:
    """Raises UserError when it is no bash script."""
    parsed = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if parsed.returncode:
        raise UserError(f"{where}: no bash script ({' '.join(parsed.stderr.split())[:200]}); mend the template")


def command(script: Path) -> list[str]:
    """How it is handed to sbatch."""
    return ["sbatch", "--parsable", str(script)]


def environment() -> dict[str, str]:
    """What sbatch gets. Inside a Slurm job, that job's variables would be taken for this one's."""
    kept = ("SLURM_CONF", "SLURM_JWT")
    return {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k in kept}


def submit(script: Path) -> str:
    """Hand it to sbatch; the job's id. Raises UserError."""
    if shutil.which("sbatch") is None:
        raise UserError(f"sbatch is not installed here; on a login node of the cluster: sbatch {script}")
    asked = subprocess.run(command(script), capture_output=True, text=True, errors="replace", env=environment())
    if asked.returncode:
        raise UserError(f"sbatch refused {script} ({' '.join(asked.stderr.split())[:300]}); mend the options")
    return asked.stdout.strip().partition(";")[0]
