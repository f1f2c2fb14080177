"""Stage `train`: checks before anything is spent, the MLflow run, where to resume, the ranks, and whether they finished.

The work is done by `pipeline.worker` on every rank; starting those is the launcher's (`launch`), handed in from above.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint.format import TRAINING_LOCK, checkpoint_bytes, committed, step_of, verify
from pipeline.checkpoint.retention import policy_of
from pipeline.config.batches import batch_sizes
from pipeline.config.continued import budget_line, same_schedule, schedule_before, schedule_line, stable_until
from pipeline.config.paths import RunPaths, data_paths, tokens_folder
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, Stopped, UserError
from pipeline.io import locks, storage
from pipeline.io.mounts import same_disk
from pipeline.io.sealed import publish_sealed
from pipeline.stages.announced import about_phases, about_recipe
from pipeline.stages.compatible import Report, changes, newest_stable
from pipeline.stages.described import data_sets, sentence
from pipeline.stages.resume import find_start, parse_resume
from pipeline.stages.still import Still
from pipeline.tracking import outbox
from pipeline.tracking.client import tracking_uri
from pipeline.tracking.run import TrackedRun
from pipeline.tracking.run_record import NOTE_TAG, TIER_TAG, VERDICT_TAG
from pipeline.tracking.sqlite_store import file_of

if TYPE_CHECKING:
    from pipeline.data.tokens.index import TokenIndex

Launch = Callable[[RunConfig, Path, int], None]  # start the ranks of a job file and wait; UserError when it failed
JOB_SCHEMA_VERSION = 1
STOPPED_TAG = "pldr.stopped"  # of the run: the signal that stopped it last, and what the ranks did


@dataclass(frozen=True)
class Job:
    """A training job ready to be started: the file every rank reads, its MLflow run, and the checkpoint it begins with."""

    file: Path
    run: TrackedRun
    start: Path | None


def pretrain(
    config: RunConfig,
    paths: RunPaths,
    *,
    resume: str,
    launch: Launch,
    report: Report,
    force: bool = False,
    ranks: int | None = None,
) -> dict[str, Any]:
    """Train to the last step. `resume`: where it continues (resume.py); `force`: also with other data, model or tokenizer;
    `ranks`: how many on all nodes (None: what this node has).

    Returns {"checkpoint", "run_id", "steps", "tokens", "resumed_from"}. Raises UserError or ConfigError, one line.
    """
    ranks = ranks_on_this_node(config) if ranks is None else ranks
    try:
        job = prepare(config, paths, resume=resume, ranks=ranks, report=report, force=force)
    except KeyboardInterrupt:
        outbox.leave(config, paths)
        raise
    if job.start is None or step_of(job.start) < config.train.steps:
        job = _train(config, paths, job, ranks=ranks, launch=launch, report=report, force=force)
    done = committed(paths.checkpoints)
    if job.start == done[-1]:
        report(f"{done[-1].name} is the last step: nothing was left to train")
    run_id = outbox.finish(job.run)
    state = verify(done[-1])
    return {
        "checkpoint": done[-1].name,
        "run_id": run_id,
        "steps": state["step"],
        "tokens": state["tokens_consumed"],
        "resumed_from": None if job.start is None else job.start.name,
    }


def _train(
    config: RunConfig, paths: RunPaths, job: Job, *, ranks: int, launch: Launch, report: Report, force: bool
) -> Job:
    """Start the ranks; after a crash again, `train.max_restarts` times. Returns the job of the last start."""
    log = paths.logs / "train.log"
    for restarts_left in range(config.train.max_restarts, -1, -1):
        log_from, before = log.stat().st_size if log.exists() else 0, outbox.evidence(paths)
        try:
            try:
                launch(config, job.file, ranks)
            finally:
                job.run.reload()  # rank 0 may have made it in MLflow
                outbox.keep_evidence(paths, before=before)
            done = committed(paths.checkpoints)
            if not done or step_of(done[-1]) != config.train.steps:
                raise UserError(f"training ended before step {config.train.steps}; see {log} and start again")
            return job
        except Stopped as stop:
            outbox.mark(job.run, "KILLED", tags={STOPPED_TAG: stop.details.get("stopped", str(stop))})
            done = committed(paths.checkpoints)
            where = done[-1].name if done else "step 0"
            raise Stopped(
                f"{stop}; start again to resume from {where}",
                details={**stop.details, "run_id": job.run.id, "checkpoint": done[-1].name if done else None},
            ) from None
        except UserError as error:
            if not error.again or not restarts_left:
                outbox.fail(job.run, error, log_from=log_from)
                raise
            crash = error
        except KeyboardInterrupt:
            outbox.mark(job.run, "KILLED")
            raise
        except BaseException as error:
            outbox.fail(job.run, error, log_from=log_from)
            raise
        try:
            job = prepare(config, paths, resume="auto", ranks=ranks, report=report, force=force)
        except KeyboardInterrupt:
            outbox.mark(job.run, "KILLED")
            raise
        except BaseException as error:
            report(f"{crash}; it could not be restarted")
            outbox.fail(job.run, error, log_from=log_from)
            raise
        if job.start is not None and step_of(job.start) == config.train.steps:  # it crashed after its last save
            return job
        where = "the beginning" if job.start is None else job.start.name
        report(f"{crash}; restarted from {where}, {restarts_left - 1} of {config.train.max_restarts} restarts are left")
    raise AssertionError("the last start returns or raises")


def prepare(config: RunConfig, paths: RunPaths, *, resume: str, ranks: int, report: Report, force: bool = False) -> Job:
    """Check everything that can be checked before ranks start, open the MLflow run, write `logs/job.json`.

    ranks: how many there will be, on all nodes. Raises UserError or ConfigError, one line.
    """
    with Still("checking the tokens", lambda text: report(f"  {text}")) as still:
        return _prepare(config, paths, resume=resume, ranks=ranks, report=report, force=force, still=still)


def _prepare(
    config: RunConfig, paths: RunPaths, *, resume: str, ranks: int, report: Report, force: bool, still: Still
) -> Job:
    index = check(config, paths, ranks=ranks)
    still.enter("waiting for ranks of an earlier start")
    _wait_for_old_ranks(paths)
    storage.require_free_space(paths.root, disk_needed(config, paths), "training (its checkpoints)")
    today = {"data_fingerprint": index.fingerprint, "tokenizer_sha256": index.tokenizer_sha256}
    still.enter("opening MLflow, and looking for a checkpoint")
    start = find_start(config, paths, resume, today=today, force=force, report=report)
    still.enter("writing to MLflow")
    outbox.begin(start.run)
    outbox.log_data_sets(start.run, data_sets(config, index))
    if start.checkpoint is None or step_of(start.checkpoint) < config.train.steps:
        before = {} if start.checkpoint is None else {VERDICT_TAG: "", TIER_TAG: ""}  # of the model as it was
        outbox.set_tags(start.run, {NOTE_TAG: sentence(config), **before})
    for line in about_recipe(config, index):
        report(line)
    if start.checkpoint is None and config.train.init_from is not None:
        from pipeline.train.initial import require_fitting

        source = require_fitting(config, tokenizer_sha256=index.tokenizer_sha256)
        report(
            f"begins      with the weights of {config.train.init_from} ({source.get('checkpoint', 'unknown checkpoint')})"
        )
    if start.checkpoint is not None:
        for line in _going_on(config, start.state, parse_resume(resume).path):
            report(line)
        for line in about_phases(config, start.state):
            report(line)
        changed = changes(start.state, config, ranks)
        for key, change in changed.items():
            report(f"changed     {key} {change}")
        outbox.set_tags(start.run, {f"resumed.{step_of(start.checkpoint)}.{k}": v for k, v in changed.items()})
    job_file = paths.logs / "job.json"
    # Decided once: ranks, and whoever reads the job later, may be in another folder and have other variables.
    tracking = config.tracking.model_copy(update={"uri": start.run.uri})
    publish_sealed(
        job_file,
        {
            "schema_version": JOB_SCHEMA_VERSION,
            "config": config.model_copy(update={"run_dir": str(paths.root), "tracking": tracking}).as_dict(),
            "run_id": start.run.id,
            "resume_from": None if start.checkpoint is None else str(start.checkpoint),
        },
    )
    return Job(job_file, start.run, start.checkpoint)


def _going_on(config: RunConfig, state: dict[str, Any], source: Path | None) -> list[str]:
    """What is decided about the learning rate and the invariance budget where a run begins at another one's checkpoint (source:
    what `--resume PATH` names), or goes on with another schedule."""
    train = config.train
    before = schedule_before(state["config"]["train"], train)
    if same_schedule(before, train) and source is None:
        return []
    lines = [f"schedule    {schedule_line(before, train, state['step'])}"]
    stable = None if source is None else newest_stable(source / "checkpoints", train)
    if stable is not None and stable_until(before, state["step"]) is None:
        lines.append(f"            without that jump: --resume {stable}")
    if config.model.g_source == "learned":
        lines.append(f"budget      {budget_line(train, config.model.num_reslayerA, state)}")
    return lines


def check(config: RunConfig, paths: RunPaths, *, ranks: int) -> TokenIndex:
    """Check that tokens, tokenizer, model and batch sizes fit together; returns the tokens to train on. Writes nothing.

    Raises UserError or ConfigError, one line: a mistake must show here, not in a rank's log or after a wait in a queue.
    """
    from pipeline.data.loading.mixture import mixture_of
    from pipeline.data.tokens.index import TokenIndex
    from pipeline.tokenizer import Tokenizer
    from pipeline.train.deepspeed_config import deepspeed_config

    deepspeed_config(config.train, ranks)
    index = TokenIndex.load(tokens_folder(config))
    index.check(
        context_length=config.model.context_length,
        vocab_size=config.model.vocab_size,
        tokenizer_sha256=Tokenizer.load(data_paths(config).tokenizer).sha256,
        boundaries=config.train.document_masks,
    )
    mixture_of(index, config, {})
    return index


def ranks_on_this_node(config: RunConfig, *, nodes: int = 1) -> int:
    """`train.ranks`, or as many GPUs (on a CPU: up to 2 processes) as divide the global batch on so many nodes.

    Raises ConfigError.
    """
    from pipeline.devices import has_gpu, num_devices

    devices, train = num_devices(), config.train
    if train.ranks is not None:
        if has_gpu() and train.ranks > devices:
            raise ConfigError(
                f"train.ranks {train.ranks}: this node has {devices} GPUs; set train.ranks=null to use what fits"
            )
        return train.ranks
    common = math.gcd(*batch_sizes(train))
    fitting = [n for n in range(1, devices + 1) if common % (train.micro_batch * n * nodes) == 0]
    if not fitting:
        raise ConfigError(
            f"train.global_batch {' and '.join(map(str, batch_sizes(train)))}: not a multiple of micro_batch "
            f"{train.micro_batch} x {nodes} nodes; "
            "change one of them"
        )
    return fitting[-1]


def disk_needed(config: RunConfig, paths: RunPaths) -> int:
    """Bytes that training still needs on the run directory's disk: the checkpoints kept, one being staged, and MLflow's copies
    where its store is there too; less what is there already."""
    size = checkpoint_bytes(config.model)
    keep = policy_of(config.train).at_most(config.train.steps, config.train.checkpoint_every)
    # One being staged, one being uploaded while a newer one is already there.
    evaluates = 2 * (config.train.evaluate is not None)  # one stays while it is read, and its weights
    copies = (
        keep
        + 2
        + evaluates
        + (keep if config.train.publish_to is None and _has_store_on_same_disk(config, paths) else 0)
    )
    held = sum(f.stat().st_size for c in committed(paths.checkpoints) for f in c.rglob("*") if f.is_file())
    return max(size, copies * size - held)


def _has_store_on_same_disk(config: RunConfig, paths: RunPaths) -> bool:
    store = file_of(tracking_uri(config))
    return store is not None and same_disk(store.parent, paths.root)


def _wait_for_old_ranks(paths: RunPaths) -> None:
    """Wait until no ranks hold the training lock: those of a killed start end within moments.

    Raises UserError after 30 s: ranks that still run are a job that must not be disturbed."""
    paths.logs.mkdir(parents=True, exist_ok=True)
    with open(paths.logs / TRAINING_LOCK, "a+", encoding="utf-8") as stream:
        if locks.lock_within(stream, 30.0):
            return
        holder = locks.lock_holder(stream)
    raise UserError(f"{paths.root}: process {holder} trains here; wait for it or stop it")
