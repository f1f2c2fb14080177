"""How large numbers can become in a model, whatever the input: what may overflow fp32 is named, though no prompt had it.

Background: two ids whose query and key are each finite may give an infinite score where they meet, and NaN after it. Prompts
hold every id, but not every pair. What enters a layer's products are outputs of a LayerNorm, `gamma z + beta` with
|z| <= sqrt(D), so all of them are bounded by the weights alone. So are the residual units of a metric learner: what one of them
adds for a few rows, the units after it forget in exact arithmetic, but not when it has become NaN in fp32.

Decision: norms in fp64, without outward rounding: the limits are powers of ten away from what a trained model reaches. The
power law is not looked at here; proof.py bounds it.

Shapes: D model width, H heads, K head dim, R outputs of a linear map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from pldr_model.layers import GLU, rope_magnitude
from pldr_model.metric_learner import ResidualUnit
from pldr_model.model import DecoderLayer, PLDRModel
from pldr_model.plga import PLGA

LARGEST = 1e37  # of a product: fp32 (and bf16) end at 3.4e38
LARGEST_SQUARED = 1e18  # of what a LayerNorm squares


@torch.no_grad()
def may_overflow(model: PLDRModel, g_LHKK: Tensor) -> list[str]:
    """What some input may make larger than fp32 can hold: "layer 0, head 1, scores of some input (up to 3e+40)"."""
    found: list[str] = []

    def look(name: str, value: Tensor, limit: float) -> None:
        if not float(value) <= limit:
            found.append(f"{name} of some input (up to {float(value):.0e})")

    entering = model.embedding_norm
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        attention, forward = layer.attention, layer.feed_forward
        if isinstance(attention.plga, PLGA):
            for unit, size in enumerate(_units(attention.plga)):
                look(f"layer {index}, unit {unit} of the metric learner", size, LARGEST_SQUARED)
        q_HK, k_HK, v_HK = _outputs(attention.qkv, entering).view(3, attention.num_heads, attention.head_dim)
        q_HK, k_HK = q_HK * rope_magnitude(model.config), k_HK * rope_magnitude(model.config)
        for head, (q_K, k_K, g_KK) in enumerate(zip(q_HK, k_HK, g_LHKK[index].double().cpu(), strict=True)):
            where = f"layer {index}, head {head}"
            look(f"{where}, density matrix", model.config.context_length * q_K.norm() ** 2, LARGEST_SQUARED)
            look(f"{where}, scores", q_K.norm() * g_KK.norm() * k_K.norm(), LARGEST)
        look(f"layer {index}, attention", _mixed(attention.output, v_HK.flatten()).max(), LARGEST_SQUARED)
        look(f"layer {index}, feed-forward", _glu(forward, layer.attention_norm).max(), LARGEST_SQUARED)
        entering = layer.feed_forward_norm
    look("logits", _outputs(model.output, entering).max(), LARGEST)
    return found


def _units(plga: PLGA) -> Iterator[Tensor]:
    """The largest norm of anything inside each residual unit, up to what its LayerNorm squares."""
    norm: nn.LayerNorm = plga.density_norm
    for module in plga.metric_learner:
        unit = cast(ResidualUnit, module)
        gamma_K, beta_K = norm.weight.double().cpu(), norm.bias.double().cpu()
        entering = x = gamma_K.abs().max() * math.sqrt(len(gamma_K)) + beta_K.norm()
        largest = entering
        for glu in unit.glus:
            w12, w3 = cast(GLU, glu).w12, cast(GLU, glu).w3
            (gate_FK, value_FK), (gate_F, value_F) = (p.double().cpu().chunk(2) for p in (w12.weight, w12.bias))
            gate = (gate_FK.norm(dim=1) * x + gate_F.abs()).max()
            value = torch.linalg.matrix_norm(value_FK, 2) * x + value_F.norm()
            x = torch.linalg.matrix_norm(w3.weight.double().cpu(), 2) * gate * value + w3.bias.double().cpu().norm()
            largest = torch.stack((largest, gate, value, gate * value, x)).max()
        yield torch.maximum(largest, entering + x) if len(unit.glus) else entering
        norm = unit.norm


def _outputs(linear: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """The largest |W x + b| [R] over the outputs x = gamma z + beta of a LayerNorm."""
    W_RD, b_R, gamma_D, beta_D = (p.double().cpu() for p in (linear.weight, linear.bias, norm.weight, norm.bias))
    largest_R: Tensor = (W_RD * gamma_D).norm(dim=1) * math.sqrt(len(gamma_D)) + (W_RD @ beta_D + b_R).abs()
    return largest_R


def _mixed(linear: nn.Linear, largest: Tensor) -> Tensor:
    """The largest |W x + b| [R] for inputs whose entries are no larger than these."""
    found_R: Tensor = linear.weight.double().cpu().abs() @ largest + linear.bias.double().cpu().abs()
    return found_R


def _glu(glu: GLU, norm: nn.LayerNorm) -> Tensor:
    """The same for a gated unit on the outputs of a LayerNorm: |silu(x)| <= |x|."""
    gate, value = _outputs(glu.w12, norm).chunk(2)
    return _mixed(glu.w3, gate * value)
