"""`pldr launch slurm`: the batch script of a training job, its submission, and what the queue says right after.

The script (templates/train.sbatch) starts one `pldr launch torchrun` on each node. Slurm requeues the job when a node is lost,
and the script requeues it when its time is up or it is preempted; all resume from the last commit. One job at a time trains a
run: a second one is refused here, and one that was submitted by hand ends when it starts (the script looks into the queue).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.backends.dry_run import dry_run
from launch.backends.job import Report
from launch.backends.scheduled import ScheduledJob, fill_in
from pipeline import slurm
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.environment import search_path
from pipeline.errors import ConfigError, UserError
from pipeline.io import locks, storage
from pipeline.stages.train import check as check_training

PLDR = [sys.executable, "-m", "launch.cli"]
MARGIN_S = 120  # Slurm sends its signal up to a minute early, and ranks take a while to start
LOOK_S = 15.0  # after submission, for the first reason why the job waits
POLL_S = 1.0
SUBMITTED = "slurm.json"  # in logs/: the job that was submitted last
ASKS_FOR_GPUS = re.compile(r"gres=(\S*,)?gpu|gpus(-per-\w+)?=")
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
    new = file.with_name(f"{file.name}.new")  # beside it: a refused one must not replace the script of a job
    check(script, new)
    if dry:
        return dry_run(
            {new: script}, [slurm.submit_command(new), ["mv", str(new), str(file)]], slurm.environment(), report=report
        )
    with alone(paths):
        _refuse_second(paths, report)
        storage.publish_bytes(new, script.encode())
        job_id = slurm.submit(new, (), fixes_of(job, options))
        storage.publish_json(paths.logs / SUBMITTED, {"schema_version": 1, "job": job_id})
        os.replace(new, file)
    report(f"submitted   Slurm job {job_id}: {paths.logs}/slurm-{job_id}.out")
    report(f"stop        save and stop: scancel --batch --signal=TERM {job_id}; save and requeue: --signal=USR1")
    state = _first_state(job_id, fixes_of(job, options))
    report(f"state       {state}" + (f"; watch: squeue --jobs={job_id}" if state != "RUNNING" else ""))
    return {"job": job_id, "script": str(file), "state": state}


@contextlib.contextmanager
def alone(paths: RunPaths) -> Iterator[None]:
    """Two launches of a run at once: the second is refused. Between a look into the queue and sbatch nothing may come."""
    paths.logs.mkdir(parents=True, exist_ok=True)
    with open(paths.logs / "submit.lock", "a+", encoding="utf-8") as stream:
        if not locks.lock(stream):
            raise UserError(f"{paths.root}: process {locks.lock_holder(stream)} submits it; look with squeue --me")
        yield


def _refuse_second(paths: RunPaths, report: Report) -> None:
    """Raise UserError when a job of this run is queued or runs, however it was submitted."""
    known = None
    with contextlib.suppress(OSError, UserError, KeyError):
        known = storage.read_json(paths.logs / SUBMITTED)["job"]
    try:
        jobs = [job for job in slurm.queue() if not job.ended]
    except UserError as error:  # then the job itself looks
        report(f"queue       not looked at: {error}")
        return
    for job in jobs:
        if job.name.endswith(f"-{mark_of(paths)}") or job.id == known:
            state = f"waits ({job.why})" if job.waits else f"is {job.state}"
            raise UserError(f"{paths.root}: Slurm job {job.id} of this run {state}; wait for it, or scancel {job.id}")


def mark_of(paths: RunPaths) -> str:
    """The end of the name of every job of this run."""
    return hashlib.sha256(str(paths.root.resolve()).encode()).hexdigest()[:8]


def _first_state(job_id: str, fixes: dict[str, str]) -> str:
    """RUNNING, or why the job waits. Raises UserError when it can never start: then it is canceled."""
    state, looks = "PENDING", 0
    end = time.monotonic() + LOOK_S
    while looks < slurm.SURE and time.monotonic() < end:
        time.sleep(POLL_S)
        try:
            job = next((job for job in slurm.queue() if job.id == job_id), None)
        except UserError as error:
            return f"unknown: {error}"
        if job is None or not job.waits:
            return "unknown: it is not in the queue" if job is None else job.state
        looks = looks + 1 if state == job.why != "PENDING" else 1
        state = job.why
    if slurm.never_starts(state):
        slurm.give_up(f"Slurm job {job_id}", [job_id], state, fixes)
    return f"waits ({state}){slurm.release_hint(job_id, state)}"


def fixes_of(job: ScheduledJob, options: SlurmOptions) -> dict[str, str]:
    """What to change when Slurm refuses the job, or never starts it."""
    gpus = f"--gpus-per-node (now {job.gpus_per_node}; 0 asks for none)"
    cpus = f"--cpus-per-rank (now {job.cpus_per_rank}, for {job.ranks_per_node} ranks on a node)"
    nodes, limit = f"--nodes (now {job.nodes})", f"--time (now {options.time or 'the default of the partition'})"
    by_sbatch = {
        name: f"change --sbatch {name}=…" for name in ("account", "qos", "constraint", "reservation", "nodelist")
    }
    return {
        "time": f"lower {limit} or change --sbatch partition=…",
        "partition": "change --sbatch partition=…",
        "memory": "lower --sbatch mem=…",
        "cpus": f"lower {cpus}",
        "gpus": f"change {gpus}",
        "nodes": f"lower {nodes}, or change --sbatch partition=…",
        "size": f"lower {nodes}, {cpus}, {gpus} or --sbatch mem=…",
        "policy": f"lower {limit}, {nodes} or {gpus}, or change --sbatch account=… or qos=…",
        "license": "change --sbatch licenses=…",
        **by_sbatch,
        "": "fix the options, or what --sbatch adds",
    }


def render(
    config: RunConfig, paths: RunPaths, job: ScheduledJob, options: SlurmOptions, arguments: Sequence[str]
) -> str:
    """The batch script. arguments: those of `pldr launch torchrun`. Raises ConfigError."""
    return fill_in(
        "train.sbatch",
        {
            **frame(config, paths, job, options),
            "mark": mark_of(paths),
            "job": "$SLURM_JOB_ID",
            "again": f"sbatch {paths.logs}/train.sbatch",
            "checkpoints": str(paths.checkpoints),
            "arguments": inside(arguments),
        },
        own=job.template,
    )


def frame(config: RunConfig, paths: RunPaths, job: ScheduledJob, options: SlurmOptions) -> dict[str, Any]:
    """What every batch script of ours is filled in with. Raises ConfigError for options that cannot be."""
    time, signal_s = options.time, options.signal_s
    for option in options.sbatch:
        name, equals, value = option.partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*(=\S+)?", option):
            raise ConfigError(f"--sbatch {option}: write an option of sbatch as NAME or NAME=VALUE, without blanks")
        if (wrong := slurm.wrong_value(name, value if equals else None)) is not None:
            raise ConfigError(f"--sbatch {option}: {wrong}")
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
    return {
        "name": config.name,
        "job_name": f"pldr-{config.name}-{mark_of(paths)}",
        "nodes": job.nodes,
        "ranks_per_node": job.ranks_per_node,
        # Slurm refuses two that ask for GPUs, one with their type and one without.
        "gpus_per_node": 0 if any(ASKS_FOR_GPUS.match(option) for option in options.sbatch) else job.gpus_per_node,
        "cpus_per_node": job.cpus_per_rank * job.ranks_per_node,
        "time": time,
        "signal_s": signal_s,
        "options": options.sbatch,
        "logs": str(logs),
        "cwd": os.getcwd(),
        "python_path": search_path()["PYTHONPATH"],
        "bin": str(Path(sys.executable).parent),
        "pldr": inside(PLDR),
    }


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


def inside(words: Sequence[str]) -> str:
    """Words for a shell command that is itself in single quotes."""
    return shlex.join(words).replace("'", "'\\''")


def check(script: str, where: Path) -> None:
    """Raises UserError when it is not a bash script."""
    parsed = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if parsed.returncode:
        raise UserError(f"{where}: not a bash script ({' '.join(parsed.stderr.split())[:200]}); fix the template")
