"""What validation logs of G_LM itself, by layer: how much of it is plain attention, and how many directions it has.

Computed from one G [L,H,K,K] that the validation has anyway: the cached one of a model that learns G, else the layers'
parameters. In fp64 on the CPU: a singular value decomposition of each head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pldr_model.config import ModelConfig
from pldr_model.decode.low_rank import effective_rank
from pldr_model.rotary_part import rotary_share

ENERGY = 1e-3  # of the squared singular values, which the logged rank leaves out


@torch.no_grad()
def g_structure(g_LHKK: Tensor, config: ModelConfig) -> dict[str, float]:
    """`invariance/rotary_share/layer-N`: the share of G's squared norm that commutes with RoPE (rotary_part.py), and
    `invariance/rank_G/layer-N`: the rank that keeps all but ENERGY of it; means over heads. A layer whose G is zero or not
    finite in some head has neither."""
    found = {}
    for layer, g_HKK in enumerate(g_LHKK.double().cpu()):
        if not g_HKK.isfinite().all() or not g_HKK.square().sum((-2, -1)).all():
            continue
        found[f"invariance/rotary_share/layer-{layer}"] = float(rotary_share(g_HKK, config).mean())
        found[f"invariance/rank_G/layer-{layer}"] = float(effective_rank(g_HKK, left_out=ENERGY).double().mean())
    return found


@torch.no_grad()
def parameter_g(engine: Any) -> Tensor:
    """The G [L,H,K,K] of a model whose layers train one (g_source `constant`), composed; collective: ZeRO-3 gathers it."""
    import deepspeed

    parameters = [p for name, p in engine.module.named_parameters() if ".plga." in name]
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        g_LHKK: Tensor = engine.module.constant_g().clone()
    return g_LHKK
