"""`pldr plan --devices …`: the plan of a cluster as plain values."""

from __future__ import annotations

from dataclasses import asdict
from math import gcd
from typing import Any

from pipeline.config.batches import batch_sizes
from pipeline.config.run import RunConfig
from pipeline.config.scale.best import WORLD_SIZES, Way, best, judge, problem_with, stage_table, with_overlap
from pipeline.config.scale.cluster import Cluster
from pipeline.config.scale.communication import accumulation, collectives, zero_keys
from pipeline.config.scale.failures import spares
from pipeline.errors import ConfigError

GPU_MEMORY_GB = (24, 40, 80, 141)


def scale(config: RunConfig, cluster: Cluster) -> dict[str, Any]:
    """Everything of docs/scale.md for this configuration, and the table of world sizes. Raises ConfigError when the devices
    cannot share the global batch as the micro batch divides it."""
    problem = problem_with(config, cluster.devices)
    train, batch = config.train, gcd(*batch_sizes(config.train))
    if problem is None and batch % (train.micro_batch * cluster.devices):
        problem = f"micro_batch {train.micro_batch} x {cluster.devices} devices does not divide "
        problem += "each batch of batch_warmup" if train.batch_warmup else f"global_batch {train.global_batch}"
        problem += f": set train.micro_batch={_fitting_micro_batch(batch // cluster.devices, train.micro_batch)}"
    if problem is not None:
        raise ConfigError(f"plan: {problem}")
    way = judge(config, cluster)
    return {
        "cluster": {**asdict(cluster), "nodes": cluster.nodes},
        "as_configured": _way(way),
        "traffic": _traffic(way),
        "stages": [_way(one) for one in stage_table(config, cluster)],
        "with_overlap_comm": _overlapped(way),
        "fits_gpus_of_gb": [size for size in GPU_MEMORY_GB if way.memory.fits(cluster.with_memory(size))],
        "failures": _failures(way),
        "world_sizes": [_row(config, cluster.of(devices)) for devices in WORLD_SIZES],
    }


def _fitting_micro_batch(per_rank: int, configured: int) -> int:
    """The largest that divides and is not above the configuration's."""
    return max(n for n in range(1, min(per_rank, configured) + 1) if per_rank % n == 0)


def _way(way: Way) -> dict[str, Any]:
    train, every = way.config.train, way.checkpoint_every
    hours = way.hours(every)
    price = way.cluster.price_per_gpu_hour
    return {
        "devices": way.cluster.devices,
        "zero_stage": train.zero_stage,
        "micro_batch": train.micro_batch,
        "accumulation": accumulation(way.config, way.cluster.devices),
        "activation_checkpointing": train.activation_checkpointing,
        "memory_bytes": {**asdict(way.memory), "total": way.memory.total},
        "fits": way.fits,
        "step_seconds": {**asdict(way.step), "total": way.step.total},
        "efficiency": way.step.compute / way.step.total,
        "tokens_per_second": way.tokens_per_s,
        "model_flops_utilization": way.tokens_per_s
        * way.config.model.flops_per_token(training=True)
        / (way.cluster.peak_tflops * 1e12 * way.cluster.devices),
        "loader_bytes_per_second": way.files.loader_bytes_per_s,
        "checkpoint_bytes": way.files.checkpoint_bytes,
        "stall_seconds": way.files.stall_s,
        "checkpoint_every": every,
        "goodput": way.goodput(every),
        "hours": hours,
        "cost": None if price is None else price * way.cluster.devices * hours,
    }


def _traffic(way: Way) -> list[dict[str, Any]]:
    return [
        {**asdict(one), "seconds": one.seconds(way.cluster), "sent_bytes": one.sent(way.cluster)}
        for one in collectives(way.config, way.cluster.devices)
    ]


def _overlapped(way: Way) -> dict[str, Any] | None:
    """The same with overlap_comm, where that is off and would change something."""
    if way.config.train.zero_stage == 0 or zero_keys(way.config)["overlap_comm"] or way.cluster.devices == 1:
        return None
    return _way(judge(with_overlap(way.config), way.cluster))


def _failures(way: Way) -> dict[str, Any]:
    cluster, configured = way.cluster, way.config.train.checkpoint_every
    rate = 1 / cluster.job_mtbf_s
    return {
        "job_mtbf_hours": cluster.job_mtbf_s / 3600,
        "restart_seconds": way.failures.restart,
        "young_interval_seconds": way.failures.young_interval(),
        "best_interval_seconds": way.failures.best_interval(),
        "checkpoint_every": way.checkpoint_every,
        "goodput": way.goodput(way.checkpoint_every),
        "configured_checkpoint_every": configured,
        "configured_goodput": way.goodput(configured),
        "expected_failures": way.hours(way.checkpoint_every) * 3600 * rate,
        "spare_nodes": spares(rate, cluster.repair_hours * 3600),
    }


def _row(config: RunConfig, cluster: Cluster) -> dict[str, Any]:
    problem = problem_with(config, cluster.devices)
    way = None if problem is not None else best(config, cluster)
    if way is not None:
        return _way(way)
    nothing = f"nothing fits {cluster.gpu_memory_gb:g} GB: shorten model.context_length, or shard over more devices"
    return {"devices": cluster.devices, "problem": problem or nothing}
