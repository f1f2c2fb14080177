"""Training, joined: checks before anything is spent, the MLflow run, the point to resume from, the ranks, the verdict.

The work is done by `pipeline.worker` on every rank; starting those is the launcher's (`launch`), handed in from above.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import storage, tracking
from pipeline.checkpoints import TRAINING_LOCK, clean, committed, set_aside, step_of, verify
from pipeline.config import RunConfig, RunPaths, tokens_folder
from pipeline.device import has_gpu, num_devices
from pipeline.errors import ConfigError, Stopped, UserError

Launch = Callable[[RunConfig, Path, int], None]  # start the ranks of a job file and wait; UserError when it failed
Say = Callable[[str], None]
JOB_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Job:
    """A training job ready to be started: the file every rank reads, its MLflow run, and where it begins."""

    file: Path
    run_id: str
    start: Path | None


def pretrain(config: RunConfig, paths: RunPaths, *, resume: str, launch: Launch, say: Say) -> dict[str, Any]:
    """Train to the last step. `resume`: auto (go on with this run directory's run) or an MLflow run id.

    Returns {"checkpoint", "run_id", "steps", "tokens", "resumed_from"}. Raises UserError or ConfigError, one line.
    """
    ranks = ranks_on_this_node(config)
    job = prepare(config, paths, resume=resume, ranks=ranks, say=say)
    if job.start is None or step_of(job.start) < config.train.steps:
        job = _train(config, paths, job, ranks=ranks, launch=launch, say=say)
    done = committed(paths.checkpoints)
    if not done or step_of(done[-1]) != config.train.steps:
        raise UserError(
            f"training ended before step {config.train.steps}; see {paths.logs / 'train.log'} and start again"
        )
    if job.start == done[-1]:
        say(f"{done[-1].name} is the last step: nothing was left to train")
    tracking.finish(config, job.run_id)
    state = verify(done[-1])
    return {
        "checkpoint": done[-1].name,
        "run_id": job.run_id,
        "steps": state["step"],
        "tokens": state["tokens_consumed"],
        "resumed_from": None if job.start is None else job.start.name,
    }


def _train(config: RunConfig, paths: RunPaths, job: Job, *, ranks: int, launch: Launch, say: Say) -> Job:
    """Start the ranks; after a crash again, `train.max_restarts` times. Returns the job of the last start."""
    for restarts_left in range(config.train.max_restarts, -1, -1):
        try:
            launch(config, job.file, ranks)
            return job
        except Stopped as stop:
            tracking.mark(config, job.run_id, "KILLED")
            done = committed(paths.checkpoints)
            where = done[-1].name if done else "step 0"
            raise Stopped(
                f"{stop}; start again to go on from {where}",
                details={**stop.details, "run_id": job.run_id, "checkpoint": done[-1].name if done else None},
            ) from None
        except UserError as error:
            if error.exit_code == 2 or not restarts_left:  # 2: it would only happen again
                tracking.mark(config, job.run_id, "FAILED")
                raise
            crash = error
        except BaseException:
            tracking.mark(config, job.run_id, "FAILED")
            raise
        job = prepare(config, paths, resume="auto", ranks=ranks, say=say)
        if job.start is not None and step_of(job.start) == config.train.steps:  # it crashed after its last save
            return job
        where = "the beginning" if job.start is None else job.start.name
        say(f"{crash}; restarted from {where}, {restarts_left - 1} of {config.train.max_restarts} restarts are left")
    raise AssertionError("the last start returns or raises")


def prepare(config: RunConfig, paths: RunPaths, *, resume: str, ranks: int, say: Say) -> Job:
    """Check everything that can be checked before ranks start, open the MLflow run, write `logs/job.json`.

    ranks: how many there will be, on all nodes. Raises UserError or ConfigError, one line.
    """
    from pipeline.data.index import TokenIndex
    from pipeline.tokenizer import Tokenizer
    from pipeline.train.engine import deepspeed_config

    index = TokenIndex.load(tokens_folder(config))
    index.check(
        context_length=config.model.context_length,
        vocab_size=config.model.vocab_size,
        tokenizer_sha256=Tokenizer.load(paths.tokenizer).sha256,
    )
    deepspeed_config(config.train, ranks)  # its errors belong here, not in a rank's log
    _wait_for_old_ranks(paths)
    _require_disk(config, paths)
    run_id = tracking.open_run(config, run_id=None if resume == "auto" else resume)
    clean(paths.checkpoints)
    start = _resume_point(config, paths, run_id, explicit=resume != "auto", say=say)
    if start is not None:
        _check_inputs(start, {"data_fingerprint": index.fingerprint, "tokenizer_sha256": index.tokenizer_sha256})
    job_file = paths.logs / "job.json"
    storage.publish_json(
        job_file,
        {
            "schema_version": JOB_SCHEMA_VERSION,
            "config": config.model_copy(update={"run_dir": str(paths.root)}).as_dict(),
            "run_id": run_id,
            "resume_from": None if start is None else str(start),
        },
    )
    return Job(job_file, run_id, start)


def ranks_on_this_node(config: RunConfig) -> int:
    """`train.ranks`, or as many GPUs (on a CPU: up to 2 processes) as divide the global batch."""
    devices, train = num_devices(), config.train
    if train.ranks is not None:
        if has_gpu() and train.ranks > devices:
            raise ConfigError(
                f"train.ranks {train.ranks}: this node has {devices} GPUs; set train.ranks=null to use what fits"
            )
        return train.ranks
    fitting = [n for n in range(1, devices + 1) if train.global_batch % (train.micro_batch * n) == 0]
    return fitting[-1]


def _require_disk(config: RunConfig, paths: RunPaths) -> None:
    """Room for the checkpoints kept, one being staged, and MLflow's copies where its store is in the run directory."""
    # fp32 masters and two Adam moments, the weights themselves, DeepSpeed's records.
    size = 17 * config.model.num_parameters()["total"]
    keep = config.train.keep_checkpoints
    copies = keep + 1 + (keep if config.tracking.uri is None else 0)
    held = sum(f.stat().st_size for c in committed(paths.checkpoints) for f in c.rglob("*") if f.is_file())
    storage.require_free_space(paths.root, max(size, copies * size - held), "training (its checkpoints)")


def _wait_for_old_ranks(paths: RunPaths) -> None:
    """Ranks of a killed start end within moments; ranks that go on are a job that must not be disturbed."""
    paths.logs.mkdir(parents=True, exist_ok=True)
    with open(paths.logs / TRAINING_LOCK, "a+", encoding="utf-8") as stream:
        for _ in range(100):
            if storage.lock(stream):
                return
            time.sleep(0.3)
        holder = storage.lock_holder(stream)
    raise UserError(f"{paths.root}: process {holder} trains here; wait for it or stop it")


def _check_inputs(checkpoint: Path, today: dict[str, str]) -> None:
    """A checkpoint goes on with the data and tokenizer it was trained with, or not at all."""
    saved = verify(checkpoint)
    for key, ours in today.items():
        if saved[key] != ours:
            raise ConfigError(
                f"{checkpoint}: was trained with {key} {saved[key][:12]}, the run directory now holds {ours[:12]}; "
                "use another run_dir for other data"
            )


def _resume_point(config: RunConfig, paths: RunPaths, run_id: str, *, explicit: bool, say: Say) -> Path | None:
    """The newest committed checkpoint of the run that is whole: local first, then MLflow's. None: step 0."""
    for candidate in reversed(committed(paths.checkpoints)):
        try:
            state = verify(candidate)
        except UserError as error:
            say(f"{candidate.name} is damaged and left out: {error}")
            set_aside(candidate)
            continue
        if state["mlflow_run_id"] != run_id:
            raise ConfigError(
                f"{candidate}: belongs to MLflow run {state['mlflow_run_id']}, not to {run_id}; use another run_dir, "
                f"or go on with --resume {state['mlflow_run_id']}"
            )
        return candidate
    uri = tracking.tracking_uri(config)
    for name in tracking.published_checkpoints(uri, run_id):
        fetched = tracking.fetch_checkpoint(uri, run_id, name, paths.checkpoints)
        try:
            verify(fetched)
        except UserError as error:
            say(f"{name} in MLflow is damaged and left out: {error}")
            set_aside(fetched)
            continue
        say(f"{name} fetched from MLflow run {run_id}")
        return fetched
    if explicit:
        raise UserError(f"MLflow run {run_id} has no committed checkpoint; start without --resume {run_id}")
    return None
