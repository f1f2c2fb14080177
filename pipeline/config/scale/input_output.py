"""Bytes that come in and go out: tokens, and checkpoints, with how long training stops for one."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.rank_memory import optimizer_bytes
from pipeline.config.run import RunConfig
from pipeline.config.scale.cluster import Cluster


@dataclass(frozen=True)
class InputOutput:
    """Of a run on a cluster."""

    loader_bytes_per_s: float
    """Token ids that all ranks read together."""
    checkpoint_bytes: int
    stall_s: float
    """Training stops for a save."""
    commit_s: float
    """After the stall, until the checkpoint counts (train.staging: the copy to the run directory)."""
    read_s: float
    """Reading it again at a restart."""


def input_output(config: RunConfig, cluster: Cluster, step_s: float) -> InputOutput:
    """step_s: seconds of a step. Sizes as DeepSpeed writes them (tests/pipeline/config/scale/ weighs a real checkpoint)."""
    train = config.train
    size = checkpoint_bytes(config)
    tokens_per_s = train.global_batch * (config.model.context_length + 1) / step_s
    token_bytes = 2 if config.model.vocab_size <= 65536 else 4
    # Ranks write their shards at once, but at stage 0 rank 0 writes everything.
    link = cluster.link_gbps / 8 * 1e9 * (cluster.nodes if train.zero_stage > 0 else 1)
    shared = size / min(cluster.storage_gb_per_s * 1e9, link)
    own_disk = size / (cluster.disk_gb_per_s * 1e9 * (cluster.nodes if train.zero_stage > 0 else 1))
    stall, commit = (shared, 0.0) if train.staging is None else (own_disk, shared)
    return InputOutput(tokens_per_s * token_bytes, size, stall, commit, shared)


def checkpoint_bytes(config: RunConfig) -> int:
    """Weights in their precision, the optimizer's moments and fp32 masters."""
    weight = 2 if config.train.precision == "bf16" else 4
    return config.model.num_parameters()["total"] * weight + optimizer_bytes(config, config.train.zero_stage)
