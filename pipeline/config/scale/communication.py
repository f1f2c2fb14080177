"""What ranks send in a step under each ZeRO stage, how long it takes, and what of it stays hidden behind the computation.

The list of collectives is what DeepSpeed 0.19.8 was seen to do (`python -m pipeline.bench.scale` counts them again), not what
the ZeRO paper says (Rajbhandari et al. 2020, arXiv 1910.02054, section 7): stages 1 and 2 reduce by an all-reduce
(`use_multi_rank_bucket_allreduce`), so that they send half as much again as stage 0, where the paper has the same; stage 3
gathers small weights one by one after the step, and
keeps weights gathered from the forward to the backward pass if they are needed again within `stage3_max_reuse_distance`.

P: parameters. N, m, n: ranks, nodes, ranks of a node. B: bytes of a collective's whole tensor. alpha, beta: seconds of a
message and of a byte (the alpha-beta model: Hockney 1994; for collectives Thakur, Rabenseifner, Gropp 2005).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

from pipeline.config.run import RunConfig
from pipeline.config.scale.cluster import Cluster
from pipeline.config.scale.shapes import parameter_sizes

Operation = Literal["all-reduce", "reduce-scatter", "all-gather"]
STAGE_0_BUCKET = 500_000_000  # elements: DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE
ZERO_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}


@dataclass(frozen=True)
class Collective:
    """One kind of traffic of a step. nbytes: of all its tensors together, in one round; calls: messages that they are sent in;
    rounds: how often in a step; behind: the pass that it can be hidden behind, or None: then training waits for all of it."""

    operation: Operation
    what: str
    nbytes: float
    calls: int
    rounds: int
    behind: Literal["forward", "backward"] | None = None

    def sent(self, cluster: Cluster) -> float:
        """Bytes that one rank sends in a step: (N - 1) / N * B, twice that for an all-reduce (any ring)."""
        N = cluster.devices
        return _passes(self.operation, cluster) * (N - 1) / N * self.nbytes * self.rounds

    def seconds(self, cluster: Cluster) -> float:
        """Of one round. Hierarchical rings, within the nodes and between them, pipelined, so that the slower one decides:
        passes * (max(B (N-1)/N / nvlink, B (m-1)/m / link) + calls * ((n-1) alpha_nvlink + (m-1) alpha_link))."""
        N, n, m = cluster.devices, cluster.per_node, cluster.nodes
        inside = self.nbytes * (N - 1) / N / (cluster.nvlink_gbps * 1e9 / 8) if n > 1 else 0.0
        between = self.nbytes * (m - 1) / m / (cluster.link_gbps * 1e9 / 8)
        alpha = ((n - 1) * cluster.nvlink_latency_us + (m - 1) * cluster.link_latency_us) * 1e-6
        return _passes(self.operation, cluster) * (max(inside, between) + self.calls * alpha)


def _passes(operation: Operation, cluster: Cluster) -> int:
    """How often a tensor goes around: an all-reduce is a reduce-scatter and an all-gather. gloo has no reduce-scatter."""
    twice = operation == "all-reduce" or (operation == "reduce-scatter" and cluster.backend == "gloo")
    return 2 if twice else 1


def accumulation(config: RunConfig, ranks: int) -> int:
    """Micro batches of a rank in a step; they divide (best.py only asks for such)."""
    return config.train.global_batch // (config.train.micro_batch * ranks)


def gradient_bytes(config: RunConfig, ranks: int) -> int:
    """Bytes of a gradient element on the wire: fp32 where micro batches are accumulated in bf16 (docs/compatibility.md)."""
    keys, train = _keys(config), config.train
    if train.precision == "fp32":
        usual = 4
    else:
        own_dtype = keys.get("data_types", {}).get("grad_accum_dtype")
        usual = 4 if train.zero_stage > 0 and accumulation(config, ranks) > 1 and own_dtype is None else 2
    named = {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}
    return named.get(str(keys.get("communication_data_type")), usual)


def collectives(config: RunConfig, ranks: int) -> list[Collective]:
    """The traffic of one step; nothing on one rank. Only what grows with the model: the handful of scalars (loss, norm,
    overflow) is `small_calls`."""
    if ranks == 1:
        return []
    train, zero = config.train, zero_keys(config)
    sizes = parameter_sizes(config.model)
    P, micro = sum(sizes), accumulation(config, ranks)
    weight, gradient = (2 if train.precision == "bf16" else 4), gradient_bytes(config, ranks)
    stage, overlaps = train.zero_stage, bool(zero["overlap_comm"])
    behind: Literal["backward"] | None = "backward" if overlaps and stage > 0 else None
    if stage == 0:
        return [Collective("all-reduce", "gradients", P * gradient, ceil(P / STAGE_0_BUCKET), 1)]
    buckets = ceil(P / zero["reduce_bucket_size"])
    if stage in (1, 2):
        rounds = 1 if stage == 1 else micro
        return [
            Collective("all-reduce", "gradients", P * gradient, buckets, rounds, behind),
            # One call for each group of parameters: the metric learner has a weight decay of its own.
            Collective("all-gather", "weights", P * weight, 2 if config.model.g_source == "learned" else 1, 1),
        ]
    small = [size for size in sizes if size <= zero["stage3_param_persistence_threshold"]]
    rest, fetch = P - sum(small), ceil(P / zero["stage3_prefetch_bucket_size"])
    again = max(0, rest - zero["stage3_max_reuse_distance"] // 2)
    traffic = [
        Collective("all-gather", "weights, forward", rest * weight, fetch, micro, "forward" if overlaps else None)
    ]
    if again:
        traffic.append(Collective("all-gather", "weights, backward", again * weight, fetch, micro, behind))
    traffic.append(Collective("reduce-scatter", "gradients", P * gradient, buckets, micro, behind))
    if small:  # one by one, after the step
        traffic.append(Collective("all-gather", "small weights", sum(small) * weight, len(small), 1))
    return traffic


def small_calls(config: RunConfig, cluster: Cluster) -> int:
    """All-reduces of a few bytes in a step: targets, loss and flags; from stage 1 on the overflow and the norm."""
    return 0 if cluster.devices == 1 else 2 if config.train.zero_stage == 0 else 4


def latency_s(cluster: Cluster) -> float:
    """Seconds of an all-reduce of a few bytes."""
    return Collective("all-reduce", "", 0.0, 1, 1).seconds(cluster)


def zero_keys(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's keys of ZeRO as this configuration sets them, or their defaults in 0.19.8."""
    own = dict(_keys(config).get("zero_optimization", {}))
    own = {key: value for key, value in own.items() if value is not None}
    return {**ZERO_DEFAULTS, "overlap_comm": config.train.zero_stage == 3, **own}


def _keys(config: RunConfig) -> dict[str, Any]:
    assert not isinstance(config.train.deepspeed, str), "load_config puts the keys in place of their file's name"
    return dict(config.train.deepspeed or {})
