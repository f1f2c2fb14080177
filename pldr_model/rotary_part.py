"""The part of G_LM that commutes with RoPE: attention that W_q could have made itself.

RoPE turns each pair of dimensions by an angle of its own, R_t. A matrix C that commutes with every R_t passes through the
rotation: (q R_t) C = (q C) R_t. So a G_LM that commutes can be absorbed by W_q, and the model is plain attention (SDPA) in
another parametrization. Rotations by different angles have nothing in common but rotations and scalings of each pair alone:
the matrices that commute with all of them are a 2x2 block [[a, -b], [b, a]] on each pair, K numbers of K². (Pairs of one
frequency would let more commute; base^(-2i/K) has none for a base other than 1.) Blocks of the other kind, [[c, d], [d, -c]],
and everything between two pairs, are orthogonal to them, and are what G_LM adds to attention.

Shapes: H heads (any leading dimensions), K head dim, P = K/2 pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pldr_model.config import RopeStyle


def rotary_part(G_HKK: Tensor, rope_style: RopeStyle) -> Tensor:
    """The orthogonal projection of G [...,K,K] onto the matrices that commute with every RoPE rotation; differentiable."""
    x, y = _pairs(G_HKK.shape[-1], rope_style, G_HKK.device)
    a_HP = (G_HKK[..., x, x] + G_HKK[..., y, y]) / 2
    b_HP = (G_HKK[..., y, x] - G_HKK[..., x, y]) / 2
    part_HKK = torch.zeros_like(G_HKK)
    part_HKK[..., x, x] = part_HKK[..., y, y] = a_HP
    part_HKK[..., y, x] = b_HP
    part_HKK[..., x, y] = -b_HP
    return part_HKK


def rotary_share(G_HKK: Tensor, rope_style: RopeStyle) -> Tensor:
    """How much of each head's squared norm commutes with RoPE, 0 to 1, [...] in fp64; NaN for G = 0. 1 for the identity, and
    about 1/K for a matrix of independent entries."""
    G_HKK = G_HKK.double()
    part: Tensor = rotary_part(G_HKK, rope_style).square().sum((-2, -1))
    return part / G_HKK.square().sum((-2, -1))


def _pairs(head_dim: int, rope_style: RopeStyle, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two dimensions of each pair that RoPE turns (apply_rope), [P] each."""
    if rope_style == "interleaved":
        x = torch.arange(0, head_dim, 2, device=device)
        return x, x + 1
    x = torch.arange(head_dim // 2, device=device)
    return x, x + head_dim // 2
