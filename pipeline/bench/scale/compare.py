"""What `pldr plan` predicts for two ranks, beside what they did.

Of times the fastest counts (a busy machine only ever adds to them), of bytes the median.
"""

from __future__ import annotations

import statistics
from typing import Any

from pipeline.config.run import RunConfig
from pipeline.config.scale.cluster import Cluster
from pipeline.config.scale.communication import collectives
from pipeline.config.scale.step_time import Compute, step_time

RANKS = 2


def link_of(found: list[dict[str, Any]], rate: str) -> Cluster:
    """Two hosts of one rank each, with the alpha and beta of the all-reduces that these ranks timed: 2 alpha for the smallest,
    2 alpha + 2 (N - 1) / N * B * beta for the largest."""
    seconds = {int(size): min(times) for size, times in found[0]["rates"][rate]["link"].items()}
    alpha = seconds[min(seconds)] / 2
    nbytes = max(seconds)
    per_second = nbytes / (seconds[nbytes] - 2 * alpha)
    return Cluster(
        devices=RANKS, gpus_per_node=1, link_gbps=per_second * 8 / 1e9, link_latency_us=alpha * 1e6, backend="gloo"
    )


def compare(config: RunConfig, alone: list[dict[str, Any]], found: list[dict[str, Any]], rate: str) -> dict[str, Any]:
    """Of one stage at one rate. alone, found: what the ranks of Ranks.alone and Ranks.together wrote."""
    compute = max(_fastest(one, "None") for one in alone)
    link = link_of(found, rate)
    micro = config.train.global_batch // (config.train.micro_batch * RANKS)
    step = step_time(config, link, Compute(compute / micro / 3, compute / micro * 2 / 3))
    measured = _fastest(found[0], rate)
    sent = statistics.median(step["payload"] for step in found[0]["rates"][rate]["steps"])
    return {
        "zero_stage": config.train.zero_stage,
        "mbit": rate,
        "link_gbps": link.link_gbps,
        "link_latency_us": link.link_latency_us,
        "compute_seconds": step.compute,
        "predicted_seconds": step.total,
        "measured_seconds": measured,
        "ratio": step.total / measured,
        "predicted_bytes": step.sent_bytes,
        "measured_bytes": sent,
        "bytes_ratio": step.sent_bytes / sent,
    }


def traffic(config: RunConfig, found: dict[str, Any]) -> dict[str, tuple[int, int, int, int]]:
    """Operation -> bytes and calls of the model, bytes and calls that torch saw, in a step; scalars are left out (64 bytes)."""
    result = {}
    model = collectives(config, RANKS)
    for operation in ("all-reduce", "all-gather", "reduce-scatter"):
        ours = [one for one in model if one.operation == operation]
        seen = [nbytes for name, nbytes in found["collectives"] if name == operation]
        if operation == "all-reduce":
            seen = [nbytes for nbytes in seen if nbytes > 64]
        result[operation] = (
            int(sum(one.nbytes * one.rounds for one in ours)),
            sum(one.calls * one.rounds for one in ours),
            sum(seen),
            len(seen),
        )
    return result


def _fastest(found: dict[str, Any], rate: str) -> float:
    return float(min(step["seconds"] for step in found["rates"][rate]["steps"]))
