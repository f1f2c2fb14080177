"""Stand-ins for Slurm's commands, which print what those of Slurm 22.05 print (recorded on a real one, 2026-11-28)."""

from __future__ import annotations

from pathlib import Path

NO_ACCOUNTING = "echo 'Slurm accounting storage is disabled' >&2; exit 1"
FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
NO_ANSWER = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
NO_GPUS = "echo 'sbatch: error: Invalid generic resource (gres) specification' >&2; exit 1"


def install(folder: Path, **commands: str) -> Path:
    """Write commands (bash) into a folder for PATH; the folder."""
    folder.mkdir(exist_ok=True)
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def scontrol_show(state: str, *, job: int = 44, array: int = 40, task: int = 1, reason: str = "None") -> str:
    """A command that prints what `scontrol -o show job` prints of an element of an array."""
    return (
        f"echo 'JobId={job} ArrayJobId={array} ArrayTaskId={task} ArrayTaskThrottle=3 JobName=a.sh UserId=root(0) "
        f"Account=(null) QOS=(null) JobState={state} Reason={reason} Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 "
        "ExitCode=0:15 RunTime=00:00:03 TimeLimit=01:00:00'"
    )
