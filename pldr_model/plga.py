"""Power-law graph attention's own part: from the queries of a sequence to its energy-curvature tensor G_LM.

    density matrix Q^T Q -> LN -> metric learner -> A
    A_LM = iSwiGLU(W A + b) + 1e-9,  A_P = A_LM ** P,  G_LM = a A_P + b_a

Source: arXiv 2410.16703, 2502.13502. The density matrix sums over the *whole* sequence, without a causal mask
and with padding queries: that is the model, and the leak that invariance removes.

Decision (speed): W, P, a belong to heads and not to batch rows, so the products run batched over heads with
the batch in the columns, [H,K,K] x [H,K,B*K]; nothing is tiled over the batch. Decision (precision): the
density matrix and everything from W on run in fp32 at least, also under bf16 weights or autocast: A_LM spans
1e-9…1e2 and is raised to powers.

Shapes: B batch, H heads, S sequence, K head dim (rows and columns of every deductive tensor).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pldr_model.config import ModelConfig
from pldr_model.layers import at_least_float32
from pldr_model.metric_learner import MetricLearner

IDENTITY_START_SCALE = (
    0.1  # of `a` when g_start is `identity`; the scale that the comparison of starts was measured with
)
METRIC_FLOOR = 1e-9  # keeps A_LM positive, so that any real power of it exists


class DeductiveOutputs(NamedTuple):
    """A: the metric learner's output; A_LM: metric tensor; A_P: potential tensor; G_LM: energy-curvature tensor.

    Each [B,H,K,K]; under half-precision weights the last three are fp32.
    """

    A: Tensor
    A_LM: Tensor
    A_P: Tensor
    G_LM: Tensor


class DensityNorm(nn.LayerNorm):
    """LayerNorm over rows of the density matrix, in the input's (wide) dtype whatever the weights' dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class PLGA(nn.Module):
    """Rotated, unscaled queries [B,H,S,K] -> the deductive outputs, each [B,H,K,K]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        H, K = config.num_heads, config.head_dim
        self.recompute = False  # the metric learner in the backward pass (set_activation_checkpointing)
        self.density_norm = DensityNorm(K, eps=config.layer_norm_eps)
        self.metric_learner = MetricLearner(config)
        self.W = nn.Parameter(torch.empty(H, K, K))
        self.b = nn.Parameter(torch.zeros(H, K, K))
        self.P = nn.Parameter(torch.empty(H, K, K))
        self.a = nn.Parameter(torch.empty(H, K, K))
        self.b_a = nn.Parameter(torch.zeros(H, K, K))
        for drawn in (self.W, self.P, self.a):
            nn.init.xavier_normal_(drawn)  # torch's fan rule for 3-D tensors: fan_in K*K, fan_out H*K
        if config.g_start == "identity":  # the same draws as `paper`, so that all other weights start alike
            with torch.no_grad():
                self.a.mul_(IDENTITY_START_SCALE)
                self.b_a.copy_(torch.eye(K).expand(H, K, K))

    def forward(self, q_BHSK: Tensor) -> DeductiveOutputs:
        with torch.autocast(q_BHSK.device.type, enabled=False):
            q_wide = q_BHSK.to(at_least_float32(q_BHSK.dtype))
            density_BHKK = self.density_norm(q_wide.mT @ q_wide)
        density_BHKK = density_BHKK.to(q_BHSK.dtype)
        A_BHKK: Tensor
        if self.recompute and torch.is_grad_enabled():
            A_BHKK = checkpoint(self.metric_learner, density_BHKK, use_reentrant=False, preserve_rng_state=False)
        else:
            A_BHKK = self.metric_learner(density_BHKK)
        with torch.autocast(q_BHSK.device.type, enabled=False):
            return self.power_law(A_BHKK)

    def power_law(self, A_BHKK: Tensor) -> DeductiveOutputs:
        B, H, K, _ = A_BHKK.shape
        W, b, P, a, b_a = (p.to(at_least_float32(p.dtype)) for p in (self.W, self.b, self.P, self.a, self.b_a))
        A_HKC = A_BHKK.to(W.dtype).permute(1, 2, 0, 3).reshape(H, K, B * K)  # C = B*K: the batch is in the columns
        u_HKBK = torch.bmm(W, A_HKC).view(H, K, B, K) + b.unsqueeze(2)
        A_LM_HKBK = u_HKBK * F.silu(u_HKBK) + METRIC_FLOOR
        A_P_HKBK = A_LM_HKBK ** P.unsqueeze(2)
        G_HKBK = torch.bmm(a, A_P_HKBK.view(H, K, B * K)).view(H, K, B, K) + b_a.unsqueeze(2)
        return DeductiveOutputs(A_BHKK, *(t.permute(2, 0, 1, 3) for t in (A_LM_HKBK, A_P_HKBK, G_HKBK)))
