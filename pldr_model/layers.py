"""The blocks every layer is made of: Linear, GLU, rotary positions.

Background: the papers draw linear weights Xavier-uniform with zero biases. Decision: matrices that read the
same input are stored fused (one product instead of three or two), but each is drawn with its own fan, so
fusing never changes the distribution. Each module draws its weights in its own constructor, because
DeepSpeed's `zero.Init` partitions a module's parameters the moment its constructor returns.

Shapes: B batch, S sequence, N heads of any kind, K head dim.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pldr_model.config import ModelConfig, RopeStyle
from pldr_model.rope_scaling import RopeScaling

# Elements from which a gated product is made by `_SiluProduct`. Its time beside autograd's (CPU seconds of one thread,
# 2026-11-29): 0.6 to 1.06 above, 1.1 to 1.4 below.
LEAN_FROM = 2**19


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype for what half precision cannot hold: positions, powers, long sums."""
    return torch.promote_types(dtype, torch.float32)


class Linear(nn.Linear):
    """`num_fused` linear maps of one input, outputs side by side: [..., in] -> [..., num_fused * out]."""

    def __init__(self, in_features: int, out_features: int, *, num_fused: int = 1) -> None:
        self.num_fused = num_fused  # nn.Linear's constructor calls reset_parameters, which needs it
        super().__init__(in_features, num_fused * out_features)

    def reset_parameters(self) -> None:
        for part in self.weight.detach().chunk(self.num_fused):
            nn.init.xavier_uniform_(part)
        nn.init.zeros_(self.bias)


class GLU(nn.Module):
    """Gated linear unit `W3(silu(W1 x) * W2 x)`, all biased: [..., size] -> [..., size] (2410.16703)."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.w12 = Linear(size, hidden, num_fused=2)
        self.w3 = GatedLinear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w3(self.w12(x))
        return out


class GatedLinear(Linear):
    """`W (silu(gate) * value) + b` of the two halves of the last dimension, gate and value.

    Eager autograd would keep silu(gate) and the product for the backward pass, each half as large as the input, and join the
    halves' gradients in one copy more; `_GatedLinear` computes them again and writes the gradients where they belong, with the
    same operators: the same bits. A compiler does that by itself, and small tensors would be slower.
    """

    def forward(self, gate_value: Tensor) -> Tensor:
        large = gate_value.numel() >= LEAN_FROM and not torch.compiler.is_compiling()
        if large and torch.is_grad_enabled() and not torch.is_autocast_enabled(gate_value.device.type):
            out: Tensor = _GatedLinear.apply(gate_value, self.weight, self.bias)  # type: ignore[no-untyped-call]
            return out
        gate, value = gate_value.chunk(2, dim=-1)
        return F.linear(F.silu(gate) * value, self.weight, self.bias)


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(gate_value, weight)
        gate, value = gate_value.chunk(2, dim=-1)
        return F.linear(F.silu(gate).mul_(value), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate_value, weight = ctx.saved_tensors
        gate, value = gate_value.chunk(2, dim=-1)
        wanted, weight_wanted, bias_wanted = ctx.needs_input_grad
        rows_grad = grad.reshape(-1, grad.shape[-1])
        d_product = grad @ weight
        d_bias = rows_grad.sum(0) if bias_wanted else None
        if torch.is_grad_enabled():  # this gradient is differentiated again
            sigmoid = gate.sigmoid()
            silu, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
            d_gate_value = torch.cat((d_product * value * slope, d_product * silu), dim=-1)
            product = silu * value
        else:
            silu = F.silu(gate)
            d_gate_value = torch.empty_like(gate_value)
            d_gate, d_value = d_gate_value.chunk(2, dim=-1)
            torch.mul(d_product, silu, out=d_value)
            torch.ops.aten.silu_backward.grad_input(d_product.mul_(value), gate, grad_input=d_gate)
            product = silu.mul_(value)
        d_weight = rows_grad.mT @ product.reshape(len(rows_grad), -1) if weight_wanted else None
        return d_gate_value if wanted else None, d_weight, d_bias


class RopeTables(NamedTuple):
    """Cosines and sines of the rotary angles, each [S, K/2] (or [B, S, 1, K/2] once gathered per row)."""

    cos: Tensor
    sin: Tensor


def rope_tables(config: ModelConfig, num_positions: int, *, dtype: torch.dtype, device: torch.device) -> RopeTables:
    """Angles `position * frequency` for positions 0…S-1.

    Computed in the model's own dtype (fp32 for bf16, which cannot count beyond 256). They are made anew for
    each pass (a few microseconds) and never stored in the module: a buffer made in fp32 and later cast would
    be silently wrong.
    """
    dtype = at_least_float32(dtype)
    positions = torch.arange(num_positions, dtype=dtype, device=device)
    angles = torch.outer(positions, rope_frequencies(config, dtype=dtype, device=device))
    magnitude = rope_magnitude(config)
    return RopeTables(angles.cos() * magnitude, angles.sin() * magnitude)


def rope_frequencies(config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Radians per position of each rotated pair, [K/2]: `base^(-2i/K)`, scaled as `rope_scaling` says."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=dtype, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_base**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.type == "linear":
        return frequencies / scaling.factor
    kept = _kept_llama3(frequencies, scaling) if scaling.type == "llama3" else _kept_yarn(frequencies, scaling, config)
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept


def rope_magnitude(config: ModelConfig) -> float:
    """What rotating multiplies the norms of queries and keys by."""
    return 1.0 if config.rope_scaling is None else config.rope_scaling.magnitude


def _kept_llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """How much of each frequency stays, 0 to 1, by how many of its waves fit into the original context."""
    assert scaling.original_context_length and scaling.low_freq_factor and scaling.high_freq_factor
    waves = frequencies * (scaling.original_context_length / (2 * math.pi))
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((waves - low) / (high - low)).clamp(0, 1)


def _kept_yarn(frequencies: Tensor, scaling: RopeScaling, config: ModelConfig) -> Tensor:
    """How much of each frequency stays, 0 to 1: a ramp between the pairs that turn `beta_fast` and `beta_slow` times in the
    original context (rounded outwards to pairs)."""
    assert scaling.original_context_length

    def pair_that_turns(times: float) -> float:
        return math.log(length / (times * 2 * math.pi)) * config.head_dim / (2 * math.log(config.rope_base))

    length = scaling.original_context_length
    first = max(math.floor(pair_that_turns(scaling.beta_fast or 32)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow or 1)), config.head_dim - 1)
    pairs = torch.arange(len(frequencies), dtype=frequencies.dtype, device=frequencies.device)
    return 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)


def apply_rope(x_BSNK: Tensor, tables: RopeTables, *, style: RopeStyle) -> Tensor:
    """Rotate pairs of every head; `tables` broadcast against [B, S, N, K/2]. Shape and dtype stay."""
    cos, sin = tables
    if style == "interleaved":
        even, odd = x_BSNK.reshape(*x_BSNK.shape[:-1], -1, 2).unbind(-1)
        rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    else:
        first, second = x_BSNK.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_BSNK.dtype)
