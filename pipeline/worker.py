"""One rank of a training job: what the `deepspeed` launcher starts. Joins the data floor to the training floor.

    deepspeed --num_gpus 2 --module pipeline.worker JOB.json

JOB.json (written by `pipeline.stages.train`): the whole configuration, the MLflow run to log to and the checkpoint to
resume from.

How a rank ends: 0 when training is done, or when a signal (stop.py) ended it after a save; otherwise with its first failure in
one marked line, which the launching process shows. A collective that failed is told as the rank that was waited for.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import fsspec.config

from pipeline.checkpoint.format import TRAINING_LOCK
from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths, staging_folder, tokens_folder
from pipeline.config.run import RunConfig
from pipeline.distributed import agreement, choose_interface, on_every_rank
from pipeline.errors import UserError, first_line
from pipeline.io import storage
from pipeline.train import signals
from pipeline.train.console import FAILURE, LISTENING, say_line
from pipeline.train.heartbeat import Heartbeat, blame
from pipeline.train.signals import StopRequest

log = logging.getLogger(__name__)
STOPPED_WAIT_S = 5.0  # for uploads, when training ends before its last step
ENVIRONMENT_FILE = "PLDR_ENVIRONMENT_FILE"  # names a JSON file of variables that must not stand in a command line
VISIBLE_DEVICES = "PLDR_VISIBLE_DEVICES"  # the CUDA_VISIBLE_DEVICES that the launching process has
PARENT_PIPE = "PLDR_PARENT_PIPE"  # set when stdin is a pipe whose other end the launching process holds open


def main(argv: list[str]) -> int:
    """Run this rank to the end; the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    stop = StopRequest()
    stop.listen()
    say_line(LISTENING)
    if os.environ.get(PARENT_PIPE) == "1":
        threading.Thread(target=_die_with_parent, daemon=True).start()
    job_file = Path(next(a for a in argv if not a.startswith("--local_rank")))
    heart = Heartbeat()
    try:
        take_environment()
        run(job_file, heart, stop)
    except UserError as error:
        return _failed(str(error), error.exit_code)
    except Exception as error:
        from pipeline.train.engine import is_peer_failure
        from pipeline.train.profiling import is_out_of_memory, out_of_memory

        traceback.print_exc()
        rank, world = rank_and_world()
        said = f"rank {rank}: {type(error).__name__}: {first_line(error)}"
        if is_out_of_memory(error):
            said = out_of_memory(error, job_file.parent / "memory", rank, heart.where)
        elif is_peer_failure(error):
            closed = "by peer" in str(error)  # gloo: "Connection closed by peer", "Connection reset by peer"
            named = blame(RunPaths.ranks_of(job_file), _stamp(job_file), me=rank, world=world, closed=closed)
            said = f"{named} ({said})"
        return _failed(said, 1)
    return 0


def take_environment() -> None:
    """Set the variables that do not come with the process, or not as they were given to the launcher. Before CUDA is used.

    Raises UserError when their file cannot be read.
    """
    if VISIBLE_DEVICES in os.environ:  # DeepSpeed's launcher has counted the devices of a hostfile from 0
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ[VISIBLE_DEVICES]
    if ENVIRONMENT_FILE in os.environ:
        os.environ.update(storage.read_json(os.environ[ENVIRONMENT_FILE]))
        fsspec.config.set_conf_env(fsspec.config.conf)  # it read FSSPEC_… when it was imported, before these were there


def rank_and_world() -> tuple[int, int]:
    """This rank and how many there are, as the launcher has set them."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _failed(message: str, exit_code: int) -> int:
    say_line(f"{FAILURE}{exit_code} {message}")
    return exit_code


def _give_up(message: str) -> None:
    """End this process at once, from any thread: the main one hangs."""
    faulthandler.dump_traceback()
    os._exit(_failed(f"rank {rank_and_world()[0]}: {message}", 1))


def _stamp(job_file: Path) -> str:
    """Tells this start from others: every start writes a new job file."""
    return f"{job_file.absolute()}|{job_file.stat().st_mtime_ns}"


def run(job_file: Path, heart: Heartbeat, stop: StopRequest) -> None:
    """Read the job, open the data, train."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from pipeline.data.loading.cache import Stamps
    from pipeline.data.loading.loader import TrainLoader, evenly_spread
    from pipeline.data.loading.reader import TokenReader, open_split
    from pipeline.data.tokens.index import TokenIndex
    from pipeline.distributed import has_gpu
    from pipeline.stages.compatible import require_newest
    from pipeline.tracking.outbox import open_tracker, set_tags
    from pipeline.tracking.publish import open_publisher
    from pipeline.tracking.run import run_named
    from pipeline.train.engine import init_distributed
    from pipeline.train.state import Lineage
    from pipeline.train.telemetry import NODES_TAG, first_on_node, node_names
    from pipeline.train.trainer import train

    if not job_file.exists():
        raise UserError(
            f"{job_file}: not on host {socket.gethostname()}; run_dir has to be on a file system that every node sees"
        )
    job = storage.read_json(job_file, schema_version=1)
    config = parse_config(job["config"], where=str(job_file))
    paths = RunPaths(config.run_dir)
    if not has_gpu():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rank, world = rank_and_world()
    if signals.HEAD_FILE in os.environ:
        head = Path(os.environ[signals.HEAD_FILE])
        signals.follow(head, patience_s=config.train.timeout_s, note=stop.note, fail=_give_up)
    heart.start(RunPaths.ranks_of(job_file), _stamp(job_file), rank, timeout_s=config.train.timeout_s, fail=_give_up)
    choose_interface()
    init_distributed(config.train.timeout_s)
    lock = open(paths.logs / TRAINING_LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - held to the end of the process
    if rank == 0 and not storage.lock(lock):
        raise UserError(f"{paths.root}: process {storage.lock_holder(lock)} trains here; wait for it or stop it")
    stamps = Stamps(_stamp(job_file))  # what its ranks check together is checked once a start on each node

    start = None if job["resume_from"] is None else Path(job["resume_from"])

    def have_data_and_disk() -> tuple[TokenIndex, TokenReader, TokenReader]:
        require_newest(start, paths)
        require_disk(config, paths, rank)
        index = TokenIndex.load(tokens_folder(config))
        index.check(context_length=config.model.context_length, vocab_size=config.model.vocab_size)
        reader = open_split(index, "train", cache_gigabytes=config.data.cache_gigabytes, stamps=stamps)
        val = open_split(index, "val", cache_gigabytes=config.data.cache_gigabytes, stamps=stamps)
        if config.data.on_bad_shard == "error":  # else what cannot be read is left out
            val.read(np.arange(min(1, val.num_sequences)))
        return index, reader, val

    index, reader, val = on_every_rank(have_data_and_disk)
    skip = config.data.on_bad_shard == "skip"
    agree = agreement(config.train.timeout_s) if skip else None
    # One sequence more than are scored: it lends its G to the others.
    wanted = config.train.val_sequences + 1
    chosen = evenly_spread(val, np.arange(val.num_sequences), wanted, skip=skip, agree=agree)
    if len(chosen) <= world:
        raise UserError(f"{index.folder}: {len(chosen)} held-out sequences for {world} ranks; raise data.val_fraction")
    held_out = val.read(chosen)
    loader = TrainLoader(
        reader,
        seed=config.seed,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=rank,
        world_size=world,
        on_bad_shard=config.data.on_bad_shard,
        agree=agree,
    )
    tracker = publisher = None
    hosts: list[Any] = [None] * world
    dist.all_gather_object(hosts, (socket.gethostname(), first_on_node()))
    if rank == 0:
        tracked = run_named(config, paths, job["run_id"])
        set_tags(tracked, {NODES_TAG: node_names(hosts)})
        tracker = open_tracker(tracked, running=True)
        publisher = open_publisher(tracked, tracker)
    status, wait_s = "FAILED", STOPPED_WAIT_S
    try:
        state = train(
            config,
            loader,
            held_out,
            bytes_per_token=index.splits["val"]["text_bytes"] / index.splits["val"]["tokens_in"],
            lineage=Lineage(index.fingerprint, index.tokenizer_sha256, job["run_id"]),
            tracker=tracker,
            publisher=publisher,
            resume_from=start,
            heart=heart,
            stop=stop,
        )
        if state.step == config.train.steps:
            status, wait_s = "FINISHED", config.train.publish_wait_s
        else:
            status = "KILLED"
        dist.barrier()
        heart.close()
        dist.destroy_process_group()  # the others end here, and do not wait for rank 0's uploads
    finally:
        if publisher is not None:
            publisher.close(wait_s, stop=lambda: any(stop.flags()))
        if tracker is not None:
            tracker.close(status)


def require_disk(config: RunConfig, paths: RunPaths, rank: int) -> None:
    """This rank can write its part of a checkpoint. Raises UserError or OSError."""
    probe = paths.checkpoints / f".probe-{rank}"
    storage.publish_bytes(probe, b"")
    probe.unlink()
    share = 17 * config.model.num_parameters()["total"] // int(os.environ["WORLD_SIZE"])  # 17: pipeline/stages/train.py
    storage.require_free_space(paths.checkpoints, share, "this rank's part of a checkpoint")
    staging = staging_folder(config)
    if staging is not None:
        storage.publish_bytes(staging.parent / f".probe-{rank}", b"")
        (staging.parent / f".probe-{rank}").unlink()
        storage.require_free_space(staging, share, "train.staging: this rank's part of a checkpoint")


def _die_with_parent() -> None:
    """End this process when the launching one is gone: its end of our stdin closes. A killed run leaves no orphans."""
    while os.read(0, 4096):  # unbuffered: a thread inside sys.stdin cannot be left at interpreter shutdown
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
