"""Bytes that training needs on one rank: model states as ZeRO shards them, and activations of one micro batch.

States are parameters, gradients, the optimizer's moments and, under bf16 and from stage 1 on, fp32 masters. Activations are
what the layers keep for the backward pass, without recomputation (an upper estimate: a CPU keeps 0.7 of it), and the output
layer's loop over chunks of rows (pldr_model/linear_cross_entropy.py): logits never exist whole. `train.compile` compiles layers
and changes nothing of that; only a PLDRModel that is compiled as a whole has all logits at once.
"""

from __future__ import annotations

from typing import Literal

from pipeline.config.run import RunConfig
from pipeline.config.train import TrainConfig
from pldr_model.config import CHUNK_ROWS, LEAN_FROM, ModelConfig

Device = Literal["cpu", "cuda"]


def stages_of(train: TrainConfig) -> tuple[Literal[0, 1, 2, 3], ...]:
    """The ZeRO stages that the optimizer can have."""
    return (0,) if train.optimizer == "muon" else (0, 1, 2, 3)


def state_bytes(config: RunConfig, stage: int, world: int) -> int:
    """Bytes of parameters, gradients and optimizer on one rank under a ZeRO stage."""
    train, count = config.train, config.model.num_parameters()["total"]
    width = _width(config)
    gradient = width
    if stage > 0 and train.global_batch > train.micro_batch * world:
        gradient = 4  # accumulated in fp32 (pipeline/train/deepspeed_config.py)
    shards = [world if stage >= s else 1 for s in (3, 2, 1)]
    sizes = (count * width, count * gradient, optimizer_bytes(config, stage))
    return sum(size // n for size, n in zip(sizes, shards, strict=True))


def optimizer_bytes(config: RunConfig, stage: int) -> int:
    """Bytes of moments and fp32 masters on all ranks together. AdamW has two moments of each parameter, Muon one of each matrix
    that it trains (pipeline/train/optim.py)."""
    count = config.model.num_parameters()["total"]
    moments = 2 * count - (muon_parameters(config.model) if config.train.optimizer == "muon" else 0)
    # Masters: under bf16, and in ZeRO 1-3, which keeps a flat copy of the weights in fp32 too.
    masters = count if config.train.precision == "bf16" or stage > 0 else 0
    return 4 * (moments + masters)


def muon_parameters(model: ModelConfig) -> int:
    """Parameters in the matrices of attention and feed-forward, without their biases."""
    return model.num_layers * (4 * model.d_model**2 + 3 * model.d_model * model.feed_forward_size)


def activation_bytes(config: RunConfig, device: Device) -> int:
    """Estimated bytes of one micro batch: layers, metric learners, output layer."""
    return config.model.num_layers * layer_bytes(config) + output_bytes(config, device)


def layer_bytes(config: RunConfig) -> int:
    """What one layer keeps for the backward pass."""
    model, B = config.model, config.train.micro_batch
    tokens, K, F = B * model.context_length, model.head_dim, model.feed_forward_size
    kept = tokens * (10 * model.d_model + (2 if tokens * 2 * F >= LEAN_FROM else 4) * F)
    if model.g_source == "learned":
        rows = (1 if config.train.g_from == "batch" else B) * model.num_heads * K
        of_norm = 3 * K if model.num_denseA else K  # without GLUs there is no sum, and a unit keeps what it reads
        kept += rows * model.num_reslayerA * (model.num_denseA * (4 * model.A_dff + K) + of_norm)
    return kept * _width(config)


def output_bytes(config: RunConfig, device: Device) -> int:
    """A chunk of logits in fp32, and under bf16 once more in bf16; and the gradients that the loop over chunks makes in the
    forward pass: of the hidden states, and of weight and bias, whose sum over chunks is in fp32 beside that of one chunk."""
    model, width = config.model, _width(config)
    rows = config.train.micro_batch * model.context_length
    chunk, D, V = min(rows, CHUNK_ROWS[device]), model.d_model, model.vocab_size
    if width == 4:
        return 4 * (chunk * V + rows * D + V * D + V)
    of_weight = 4 + width if rows > chunk else width
    return (4 + width) * chunk * V + width * rows * D + of_weight * V * D + 4 * V


def _width(config: RunConfig) -> int:
    """Bytes of a number in the forward and backward passes."""
    return 2 if config.train.precision == "bf16" else 4
