"""One rank of a training job: what a launcher starts. Joins the data floor to the training floor.

    deepspeed --num_gpus 2 --module pipeline.worker JOB.json

JOB.json (written by `pipeline.stages.train`): the whole configuration, the MLflow run to log to and the checkpoint to
resume from.

How a rank ends: with 0 when training is done, or when a signal (pipeline/train/signals.py) ended it after a save; otherwise
with its first failure in one marked line, which the launching process shows. For a collective that failed, that line names
the rank that was waited for.
"""

from __future__ import annotations

from pipeline.train.signals import PARENT_PIPE, STOP, StopRequest

if __name__ == "__main__":
    STOP.listen()  # before the imports below, which take seconds

import atexit
import faulthandler
import logging
import os
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec.config

from pipeline.checkpoint.format import TRAINING_LOCK, checkpoint_bytes, read_state, step_of
from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths, staging_folder, tokens_folder
from pipeline.config.run import RunConfig
from pipeline.distributed import agreement, end_with_parent, on_every_rank
from pipeline.environment import ENVIRONMENT_FILE, VISIBLE_DEVICES, omp_threads
from pipeline.errors import UserError, first_line
from pipeline.io import locks, storage
from pipeline.io.sealed import read_sealed
from pipeline.network import choose_interface
from pipeline.train import signals
from pipeline.train.backend import set_up, write_recording
from pipeline.train.console import FAILURE, LISTENING, PHASE, STATUS, STOPPED, print_line
from pipeline.train.heartbeat import Heartbeat, blame

if TYPE_CHECKING:
    import numpy as np

    from pipeline.data.loading.loader import TrainLoader
    from pipeline.data.tokens.index import TokenIndex
    from pipeline.tracking.metrics import Tracker
    from pipeline.tracking.publish import Publisher
    from pipeline.train.by_source import Sources
    from pipeline.train.evaluations import Evaluations

log = logging.getLogger(__name__)
STOPPED_WAIT_S = 5.0  # for uploads, when training ends before its last step


def main(argv: list[str]) -> int:
    """Run this rank to the end; the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    print_line(LISTENING)
    STOP.leaving(_leave)
    if os.environ.get(PARENT_PIPE) == "1":
        end_with_parent()
    job_file = Path(next(a for a in argv if not a.startswith("--local_rank")))
    heart = Heartbeat()
    try:
        take_environment()
        run(job_file, heart, STOP)
    except UserError as error:
        return _failed(str(error), error.exit_code)
    except Exception as error:
        from pipeline.train.engine import is_peer_failure
        from pipeline.train.profiling import is_out_of_memory, out_of_memory

        traceback.print_exc()
        rank, world = rank_and_world()
        message = f"rank {rank}: {type(error).__name__}: {first_line(error)}"
        if is_out_of_memory(error):
            message = out_of_memory(error, job_file.parent / "memory", rank, heart.where)
        elif is_peer_failure(error):
            closed = "by peer" in str(error)  # gloo: "Connection closed by peer", "Connection reset by peer"
            at_fault = blame(RunPaths.ranks_of(job_file), _stamp(job_file), me=rank, world=world, closed=closed)
            message = f"{at_fault} ({message})"
            write_recording(RunPaths.recordings_of(job_file), rank)
        return _failed(message, 1)
    return 0


def take_environment() -> None:
    """Set the variables that the launcher does not pass to its processes unchanged. Call it before CUDA is used.

    Raises UserError when their file cannot be read.
    """
    if VISIBLE_DEVICES in os.environ:  # DeepSpeed's launcher numbers the devices of a hostfile from 0
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ[VISIBLE_DEVICES]
    if ENVIRONMENT_FILE in os.environ:
        os.environ.update(storage.read_json(os.environ[ENVIRONMENT_FILE]))
        fsspec.config.set_conf_env(fsspec.config.conf)  # at its import these were not set yet


def rank_and_world() -> tuple[int, int]:
    """This rank and the number of ranks, as set by the launcher."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _failed(message: str, exit_code: int) -> int:
    print_line(f"{FAILURE}{exit_code} {message}")
    return exit_code


def _leave(name: str) -> None:
    """End this process immediately, from any thread: asked to stop before its first step."""
    os.write(1, f"{STOPPED}{name} before a step was done\n".encode())
    os._exit(0)


def _give_up(message: str) -> None:
    """End this process immediately, from any thread: the main one hangs."""
    faulthandler.dump_traceback()
    os._exit(_failed(f"rank {rank_and_world()[0]}: {message}", 1))


def _stamp(job_file: Path) -> str:
    """Identifies this start: every start writes a new job file."""
    return f"{job_file.absolute()}|{job_file.stat().st_mtime_ns}"


@dataclass(frozen=True)
class Job:
    """What this rank has to do. stamp: identifies the start of the job; run_id: the MLflow run's, which rank 0 logs to."""

    file: Path
    stamp: str
    config: RunConfig
    paths: RunPaths
    run_id: str
    start: Path | None
    rank: int
    world: int


@dataclass(frozen=True)
class Data:
    """What this rank trains on. held_out: validation sequences [n, S+1], with document masks [2, n, S+1], the same on every
    rank; sources: of their tokens."""

    index: TokenIndex
    loader: TrainLoader
    held_out: np.ndarray
    sources: Sources | None


def run(job_file: Path, heart: Heartbeat, stop: StopRequest) -> None:
    """Train as the job file says: read it, join the other ranks, open the data and the tracking, train, close."""
    job = read_job(job_file)
    set_up(job.config.train, job.paths.recordings)
    _enter(job, "waiting for all ranks to meet")
    join(job, heart, stop)
    _enter(job, "opening the data")
    data = open_data(job)
    tracker, publisher, evaluations = open_tracking(job)
    _enter(job, "building the model" if job.start is None else f"building the model, reading {job.start.name}")
    status, wait_s = "FAILED", STOPPED_WAIT_S
    try:
        if train(job, data, tracker, publisher, evaluations, heart, stop) == job.config.train.steps:
            status, wait_s = "FINISHED", job.config.train.publish_wait_s
        else:
            status = "KILLED"
        leave(heart)
    finally:
        if evaluations is not None:
            evaluations.close(_announce, finished=status == "FINISHED", stop=lambda: any(stop.flags()))
        if publisher is not None:
            publisher.close(wait_s, stop=lambda: any(stop.flags()))
        if tracker is not None:
            tracker.close(status)


def read_job(file: Path) -> Job:
    """Raises UserError when this host does not have the file, or it is of another version."""
    from pipeline.stages.train import JOB_SCHEMA_VERSION

    if not file.exists():
        raise UserError(
            f"{file}: not on host {socket.gethostname()}; run_dir has to be on a file system that every node sees"
        )
    job = read_sealed(file, schema_version=JOB_SCHEMA_VERSION)
    config = parse_config(job["config"], where=str(file))
    start = None if job["resume_from"] is None else Path(job["resume_from"])
    rank, world = rank_and_world()
    return Job(file, _stamp(file), config, RunPaths(config.run_dir), job["run_id"], start, rank, world)


def join(job: Job, heart: Heartbeat, stop: StopRequest) -> None:
    """Join the process group, with a heartbeat from now on; rank 0 locks the run directory. Collective.

    Raises UserError on rank 0 when another process trains there.
    """
    import torch

    from pipeline.devices import has_gpu
    from pipeline.train.engine import init_distributed

    if not has_gpu():
        torch.set_num_threads(omp_threads(os.environ) or 1)
    timeout_s = job.config.train.timeout_s
    if signals.HEAD_FILE in os.environ:
        signals.follow(Path(os.environ[signals.HEAD_FILE]), patience_s=timeout_s, note=stop.note, fail=_give_up)
    heart.start(RunPaths.ranks_of(job.file), job.stamp, job.rank, timeout_s=timeout_s, fail=_give_up)
    choose_interface()
    init_distributed(timeout_s)
    lock = open(job.paths.logs / TRAINING_LOCK, "a+", encoding="utf-8")  # noqa: SIM115
    atexit.register(lock.close)  # it is held to the end of the process
    if job.rank == 0 and not locks.lock(lock):
        raise UserError(f"{job.paths.root}: process {locks.lock_holder(lock)} trains here; wait for it or stop it")


def open_data(job: Job) -> Data:
    """Open the token shards and read the held-out sequences; before that, check on every rank that this start can work.
    Collective.

    Raises UserError on every rank when one of them cannot read its data or write a checkpoint.
    """
    import numpy as np

    from pipeline.data.loading.cache import Stamps
    from pipeline.data.loading.loader import TrainLoader, evenly_spread
    from pipeline.data.loading.mixture import Mixture, mixture_of
    from pipeline.data.loading.reader import TokenReader, open_split
    from pipeline.data.tokens.index import TokenIndex
    from pipeline.stages.compatible import require_newest
    from pipeline.train.by_source import Sources

    config, masked = job.config, job.config.train.document_masks
    stamps = Stamps(job.stamp)  # what the ranks check together is checked once a start on each node

    def check_and_open() -> tuple[TokenIndex, TokenReader, TokenReader, Mixture | None]:
        require_newest(job.start, job.paths)
        require_disk(config, job.paths, job.rank)
        index = TokenIndex.load(tokens_folder(config))
        index.check(context_length=config.model.context_length, vocab_size=config.model.vocab_size)
        more: dict[str, Any] = {"cache_gigabytes": config.data.cache_gigabytes, "stamps": stamps, "segments": masked}
        reader = open_split(index, "train", **more)
        val = open_split(index, "val", **more, sources=bool(index.sources))
        if config.data.on_bad_shard == "error":  # else what cannot be read is skipped
            val.read(np.arange(min(1, val.num_sequences)))
        state = {} if job.start is None else read_state(job.start)
        return index, reader, val, mixture_of(index, config, state)

    index, reader, val, order = on_every_rank(check_and_open)
    skip = config.data.on_bad_shard == "skip"
    agree = agreement(config.train.timeout_s) if skip else None
    # One more than are scored: it lends its G to the others.
    wanted = config.train.val_sequences + 1
    chosen = evenly_spread(val, np.arange(val.num_sequences), wanted, skip=skip, agree=agree)
    if len(chosen) < 2:
        raise UserError(f"{index.folder}: a single held-out sequence, validation needs two; raise data.val_fraction")
    held_out = val.read_with_documents(chosen) if masked else val.read(chosen)
    sources = Sources(index.sources, val.sources(chosen)) if index.sources else None
    loader = TrainLoader(
        reader,
        seed=config.seed,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=job.rank,
        world_size=job.world,
        on_bad_shard=config.data.on_bad_shard,
        agree=agree,
        order=order,
        documents=masked,
    )
    return Data(index, loader, held_out, sources)


def open_tracking(job: Job) -> tuple[Tracker | None, Publisher | None, Evaluations | None]:
    """Rank 0's tracker, publisher and evaluations (where there are any) of the run; None on the others. Collective."""
    import torch.distributed as dist

    from pipeline.tracking.outbox import open_tracker, set_tags
    from pipeline.tracking.publish import open_publisher
    from pipeline.tracking.run import run_named
    from pipeline.train.telemetry import NODES_TAG, first_on_node, node_names

    hosts: list[Any] = [None] * job.world
    dist.all_gather_object(hosts, (socket.gethostname(), first_on_node()))
    if job.rank != 0:
        return None, None, None
    run = run_named(job.config, job.paths, job.run_id)
    set_tags(run, {NODES_TAG: node_names(hosts)})
    tracker = open_tracker(run, running=True)
    if job.config.train.evaluate is None:
        return tracker, open_publisher(run, tracker), None
    from pipeline.train.evaluations import Evaluations

    start = 0 if job.start is None else step_of(job.start)
    evaluations = Evaluations(job.config, job.paths, job.file, tracker.log, start=start)
    return tracker, open_publisher(run, tracker, evaluations.busy), evaluations


def train(
    job: Job,
    data: Data,
    tracker: Tracker | None,
    publisher: Publisher | None,
    evaluations: Evaluations | None,
    heart: Heartbeat,
    stop: StopRequest,
) -> int:
    """Train to the last step or until stopped; returns the step. Collective."""
    from pipeline.train.state import Lineage
    from pipeline.train.trainer import Trainer

    val = data.index.splits["val"]
    trainer = Trainer(
        job.config,
        job.paths,
        data.loader,
        data.held_out,
        bytes_per_token=val["text_bytes"] / val["tokens_in"],
        lineage=Lineage(data.index.fingerprint, data.index.tokenizer_sha256, job.run_id),
        tracker=tracker,
        publisher=publisher,
        evaluations=evaluations,
        resume_from=job.start,
        heart=heart,
        stop=stop,
        sources=data.sources,
    )
    stop.leaving(None)
    _enter(job, "compiling, and the first step" if job.config.train.compile else "the first step")
    return trainer.train().step


def _announce(line: str) -> None:
    """Rank 0 says something after the loop."""
    print_line(f"{STATUS}{line}")
    log.warning("%s", line)


def _enter(job: Job, phase: str) -> None:
    """Rank 0 says what all ranks do now."""
    if job.rank == 0:
        print_line(f"{PHASE}{phase}")


def leave(heart: Heartbeat) -> None:
    """Leave the process group. The other ranks end here and do not wait for rank 0's uploads. Collective."""
    import torch.distributed as dist

    dist.barrier()
    heart.close()
    dist.destroy_process_group()


def require_disk(config: RunConfig, paths: RunPaths, rank: int) -> None:
    """Check that this rank can write its part of a checkpoint. Raises UserError or OSError."""
    probe = paths.checkpoints / f".probe-{rank}"
    storage.publish_bytes(probe, b"")
    probe.unlink()
    share = checkpoint_bytes(config.model) // int(os.environ["WORLD_SIZE"])
    storage.require_free_space(paths.checkpoints, share, "this rank's part of a checkpoint")
    staging = staging_folder(config)
    if staging is not None:
        storage.publish_bytes(staging.parent / f".probe-{rank}", b"")
        (staging.parent / f".probe-{rank}").unlink()
        storage.require_free_space(staging, share, "train.staging: this rank's part of a checkpoint")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
