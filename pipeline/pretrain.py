"""Training, joined: checks before anything is spent, the MLflow run, the point to resume from, the ranks, the verdict.

The work is done by `pipeline.worker` on every rank; starting those is the launcher's (`launch`), handed in from above.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import storage, tracking
from pipeline.checkpoints import clean, committed, step_of, verify
from pipeline.config import RunConfig, RunPaths
from pipeline.errors import UserError

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
        try:
            launch(config, job.file, ranks)
        except BaseException:
            tracking.mark(config, job.run_id, "FAILED")
            raise
    done = committed(paths.checkpoints)
    if not done or step_of(done[-1]) != config.train.steps:
        raise UserError(
            f"training ended before step {config.train.steps}; see {paths.logs / 'train.log'} and start again"
        )
    if job.start == done[-1]:  # nothing was left to train: the run was complete all along
        tracking.mark(config, job.run_id, "FINISHED")
    state = verify(done[-1])
    return {
        "checkpoint": done[-1].name,
        "run_id": job.run_id,
        "steps": state["step"],
        "tokens": state["tokens_consumed"],
        "resumed_from": None if job.start is None else job.start.name,
    }


def prepare(config: RunConfig, paths: RunPaths, *, resume: str, ranks: int, say: Say) -> Job:
    """Check everything that can be checked before ranks start, open the MLflow run, write `logs/job.json`.

    ranks: how many there will be, on all nodes. Raises UserError or ConfigError, one line.
    """
    from pipeline.data.index import TokenIndex
    from pipeline.tokenizer import Tokenizer
    from pipeline.train.engine import deepspeed_config

    index = TokenIndex.load(paths.tokens)
    index.check(
        context_length=config.model.context_length,
        vocab_size=config.model.vocab_size,
        tokenizer_sha256=Tokenizer.load(paths.tokenizer).sha256,
    )
    deepspeed_config(config.train, ranks)  # its errors belong here, not in a rank's log
    parameters = config.model.num_parameters()["total"]
    # A checkpoint holds weights and two Adam moments (fp32, plus bf16 weights); one is staged while k are kept.
    needed = 14 * parameters * (config.train.keep_checkpoints + 1)
    storage.require_free_space(paths.root, needed, "training (its checkpoints)")
    run_id = tracking.open_run(config, run_id=None if resume == "auto" else resume)
    clean(paths.checkpoints)
    start = _resume_point(config, paths, run_id, explicit=resume != "auto", say=say)
    job_file = paths.logs / "job.json"
    storage.publish_json(
        job_file,
        {
            "schema_version": JOB_SCHEMA_VERSION,
            "config": config.as_dict(),
            "run_id": run_id,
            "resume_from": None if start is None else str(start),
        },
    )
    return Job(job_file, run_id, start)


def ranks_on_this_node(config: RunConfig) -> int:
    """`train.ranks`, or every GPU, or 2 on a CPU."""
    return config.train.ranks or (torch.cuda.device_count() if torch.cuda.is_available() else 2)


def _resume_point(config: RunConfig, paths: RunPaths, run_id: str, *, explicit: bool, say: Say) -> Path | None:
    """The newest committed checkpoint of the run that is whole: local first, then MLflow's. None: step 0."""
    for candidate in reversed(committed(paths.checkpoints)):
        try:
            state = verify(candidate)
        except UserError as error:
            say(f"{candidate.name} is damaged and left out: {error}")
            shutil.rmtree(candidate, ignore_errors=True)
            continue
        if state["mlflow_run_id"] == run_id:
            return candidate
    fetched = tracking.fetch_checkpoint(tracking.tracking_uri(config), run_id, paths.checkpoints)
    if fetched is not None:
        verify(fetched)
        say(f"{fetched.name} fetched from MLflow run {run_id}")
    elif explicit:
        raise UserError(f"MLflow run {run_id} has no committed checkpoint; start without --resume {run_id}")
    return fetched
