"""Bytes of one device: states as ZeRO shards them, what it gathers, activations with recomputation, buckets.

States: Rajbhandari et al. 2020 (arXiv 1910.02054), section 3, with our fp32 accumulation (`state_bytes` of plan.py).
Activations: Korthikanti et al. 2022 (arXiv 2205.05198), section 4, with this model's layers (`activation_bytes` of plan.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.config.plan import activation_bytes, state_bytes
from pipeline.config.run import RunConfig
from pipeline.config.scale.cluster import Cluster
from pipeline.config.scale.communication import gradient_bytes, zero_keys
from pldr_model.config import ModelConfig

LOGITS_CHUNK_BYTES = 256 * 2**20  # of fp32 logits on a GPU (pldr_model/linear_cross_entropy.py)
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
    return Memory(state_bytes(config, train.zero_stage, ranks), gathered, buckets, recomputed_activation_bytes(config))


def recomputed_activation_bytes(config: RunConfig) -> int:
    """Bytes kept for the backward pass of one micro batch. `layer` keeps each layer's input and, while one is computed again,
    all of it; `metric_learner` likewise the input of each metric learner, [B, H, K, K]."""
    model, train = config.model, config.train
    recompute, L = train.activation_checkpointing, model.num_layers
    width, B = (2 if train.precision == "bf16" else 4), train.micro_batch
    everything = L * _layer(config) + _output(config)
    if recompute == "layer":
        return everything - (L - 1) * _layer(config) + L * B * model.context_length * model.d_model * width
    if recompute == "metric_learner" and model.g_source == "learned":
        learner = _layer(config) - _layer(_with_model(config, model.sdpa_twin()))
        return everything - (L - 1) * learner + L * B * model.num_heads * model.head_dim**2 * width
    return everything


def _output(config: RunConfig) -> int:
    """Bytes of the output layer: its logits a chunk at a time, and the fp32 gradients of hidden states and weight, which are
    made in the forward pass; or all logits, where these are smaller."""
    model = config.model
    whole = activation_bytes(config) - model.num_layers * _layer(config)
    rows = config.train.micro_batch * model.context_length
    return min(whole, 3 * LOGITS_CHUNK_BYTES + 4 * model.d_model * (rows + model.vocab_size))


def _layer(config: RunConfig) -> int:
    """Bytes of one layer's activations: what another layer adds."""
    one, two = (activation_bytes(_with_model(config, replace(config.model, num_layers=n))) for n in (1, 2))
    return two - one


def _with_model(config: RunConfig, model: ModelConfig) -> RunConfig:
    return config.model_copy(update={"model": model})
