"""Bytes of one device: states as ZeRO shards them, what it gathers, activations with recomputation, buckets.

States: Rajbhandari et al. 2020 (arXiv 1910.02054), section 3, with our fp32 accumulation. Activations: Korthikanti et al. 2022
(arXiv 2205.05198), section 4, with this model's layers. Both: pipeline/config/rank_memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.rank_memory import Device, layer_bytes, output_bytes, state_bytes
from pipeline.config.run import RunConfig
from pipeline.config.scale.cluster import Cluster
from pipeline.config.scale.communication import gradient_bytes, zero_keys

RESERVED = 0.08  # of a device: CUDA context, NCCL's buffers, fragmentation


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    states: float
    gathered: float
    """Stage 3: weights that are gathered at one time."""
    buckets: float
    activations: float

    @property
    def total(self) -> float:
        return self.states + self.gathered + self.buckets + self.activations

    def fits(self, cluster: Cluster) -> bool:
        """Whether a device holds it, with a reserve."""
        return self.total <= cluster.gpu_memory_gb * 1e9 * (1 - RESERVED)


def memory(config: RunConfig, cluster: Cluster) -> Memory:
    """What training needs on one device."""
    train, zero, ranks = config.train, zero_keys(config), cluster.devices
    P = config.model.num_parameters()["total"]
    weight, gradient = (2 if train.precision == "bf16" else 4), gradient_bytes(config, ranks)
    gathered = weight * min(P, zero["stage3_max_reuse_distance"]) if train.zero_stage == 3 else 0
    copies = 2 if zero["overlap_comm"] else 1  # one bucket is filled while another is reduced
    buckets = copies * gradient * min(P, zero["reduce_bucket_size"]) if ranks > 1 and train.zero_stage > 0 else 0
    activations = recomputed_activation_bytes(config, "cpu" if cluster.backend == "gloo" else "cuda")
    return Memory(state_bytes(config, train.zero_stage, ranks), gathered, buckets, activations)


def recomputed_activation_bytes(config: RunConfig, device: Device) -> int:
    """Bytes kept for the backward pass of one micro batch. `layer` keeps each layer's input and, while one is computed again,
    all of it; `metric_learner` likewise the input of each metric learner, [B, H, K, K]."""
    model, train = config.model, config.train
    recompute, L = train.activation_checkpointing, model.num_layers
    width, B = (2 if train.precision == "bf16" else 4), train.micro_batch
    layer = layer_bytes(config)
    everything = L * layer + output_bytes(config, device)
    if recompute == "layer":
        return everything - (L - 1) * layer + L * B * model.context_length * model.d_model * width
    if recompute == "metric_learner" and model.g_source == "learned":
        learner = layer - layer_bytes(config.model_copy(update={"model": model.sdpa_twin()}))
        return everything - (L - 1) * learner + L * B * model.num_heads * model.head_dim**2 * width
    return everything
