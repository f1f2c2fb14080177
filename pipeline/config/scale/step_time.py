"""The time of one step: computation, and what of the communication is not hidden behind it."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.run import RunConfig
from pipeline.config.scale.cluster import Cluster
from pipeline.config.scale.communication import (
    accumulation,
    collectives,
    latency_s,
    small_calls,
)
from pldr_model.config import ModelConfig


@dataclass(frozen=True)
class Compute:
    """Seconds of one rank without communication: forward and backward of one micro batch, and what ends a step."""

    forward: float
    backward: float
    update: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step. exposed: communication that training waits for; communication: all of it, hidden or not."""

    compute: float
    communication: float
    exposed: float
    sent_bytes: float
    """That one rank sends."""

    @property
    def total(self) -> float:
        return self.compute + self.exposed


def compute_of(config: RunConfig, cluster: Cluster) -> Compute:
    """From the FLOPs, at peak * mfu. Recomputation adds the forward pass of what it repeats to the backward pass (Chen et al.
    2016, arXiv 1604.06174), which MFU does not count."""
    model, train = config.model, config.train
    tokens, rate = train.micro_batch * model.context_length, cluster.peak_tflops * 1e12 * cluster.mfu
    shared = train.micro_batch if train.g_from == "batch" else 1
    forward = model.flops_per_token(training=False, sequences_per_g=shared) * tokens / rate
    again = _recomputed_flops(model, train.activation_checkpointing, shared) * tokens / rate
    return Compute(forward, 2 * forward + again)


def step_time(config: RunConfig, cluster: Cluster, compute: Compute) -> StepTime:
    """Of micro batches, one after another, and an update.

    What can be hidden behind a pass is exposed as far as it is longer than the pass, and at least its last message, which is
    only there when the pass has ended (for the forward pass: the first one). Stage 1 reduces in the last backward pass only.
    """
    micro = accumulation(config, cluster.devices)
    window = {"forward": compute.forward, "backward": compute.backward}
    traffic = collectives(config, cluster.devices)
    exposed = communication = small_calls(config, cluster) * latency_s(cluster)
    for behind in (None, "forward", "backward"):
        own = [one for one in traffic if one.behind == behind]
        communication += sum(one.rounds * one.seconds(cluster) for one in own)
        if behind is None or cluster.backend == "gloo":
            exposed += sum(one.rounds * one.seconds(cluster) for one in own)
        elif own:
            together = sum(one.seconds(cluster) for one in own)
            last = max(one.seconds(cluster) / one.calls for one in own)
            exposed += max(one.rounds for one in own) * max(together - window[behind], last)
    busy = micro * (compute.forward + compute.backward) + compute.update
    return StepTime(busy, communication, exposed, sum(one.sent(cluster) for one in traffic))


def _recomputed_flops(model: ModelConfig, recompute: str, shared: int) -> float:
    """Forward FLOPs a token that the backward pass repeats."""
    if recompute == "none":
        return 0.0
    output = 2.0 * model.d_model * model.vocab_size
    layers = model.flops_per_token(training=False, sequences_per_g=shared) - output
    if recompute == "layer":
        return layers
    return layers - (model.sdpa_twin().flops_per_token(training=False) - output)
