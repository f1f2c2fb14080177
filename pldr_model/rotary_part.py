"""The part of G_LM that commutes with RoPE, which is plain attention: what W_q could have done itself.

A rotated query q R has q R C = q C R for a C that commutes with the rotation R of every position, so that C can be folded into
W_q: a model with such a G_LM *is* plain attention (SDPA) in another parametrization, however far that G is from the identity.
These C are a 2 x 2 block [[a, -b], [b, a]] on each rotated pair, K numbers of K². What is orthogonal to them is what G_LM can
add to attention.

Shapes: H heads (or any leading dimensions), K head dim, P = K/2 pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pldr_model.config import ModelConfig
from pldr_model.layers import rope_frequencies


def rotary_part(g_HKK: Tensor, config: ModelConfig) -> Tensor:
    """The orthogonal projection of G_LM [...,K,K] on the matrices that commute with RoPE at every position; differentiable.

    The 2 x 2 block C_ij of frequencies i and j commutes when R(i)^T C_ij R(j) = C_ij at every position. Proof: the mean of
    R(i)^T G_ij R(j) over positions is the orthogonal projection on what no position changes, and with frequencies in (0, 1]
    that mean is [[a, -b], [b, a]] where i and j are equal, with a = (G_00 + G_11) / 2 and b = (G_10 - G_01) / 2, and 0 where
    they differ (`rope_base` 1 has but one).
    """
    half = config.head_dim // 2
    pairs = torch.arange(config.head_dim, device=g_HKK.device)
    pairs = pairs.view(half, 2) if config.rope_style == "interleaved" else pairs.view(2, half).T
    order = pairs.flatten()  # frequency by frequency
    by_pair = g_HKK[..., order[:, None], order].reshape(*g_HKK.shape[:-2], half, 2, half, 2)
    blocks = by_pair.transpose(-3, -2)
    frequency_P = rope_frequencies(config, dtype=torch.float64, device=g_HKK.device)
    same = frequency_P[:, None] == frequency_P
    a = (blocks[..., 0, 0] + blocks[..., 1, 1]).where(same, 0) / 2
    b = (blocks[..., 1, 0] - blocks[..., 0, 1]).where(same, 0) / 2
    kept = torch.stack((torch.stack((a, -b), dim=-1), torch.stack((b, a), dim=-1)), dim=-2)
    flat = kept.transpose(-3, -2).reshape(g_HKK.shape)
    back = order.argsort()
    return flat[..., back[:, None], back]


def rotary_share(g_HKK: Tensor, config: ModelConfig) -> Tensor:
    """How much of each head's squared norm commutes with RoPE, 0 to 1, [...] in fp64: 1 for the identity, about 1/K for
    independent entries, NaN for 0."""
    g_HKK = g_HKK.double()
    kept: Tensor = rotary_part(g_HKK, config).square().sum((-2, -1))
    return kept / g_HKK.square().sum((-2, -1))
