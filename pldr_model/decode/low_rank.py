"""Low-rank keys: a constant G_LM of rank r per head lets the cache hold r numbers of a key in place of K.

    G = U S V^T      q G k^T = (q U_r S_r) (V_r^T k)^T + what the dropped singular values add

RoPE stands before G, so it is not touched: queries and keys are rotated first. `q U_r S_r` costs what `q G` costs, or less.
Decisions. The SVD runs in fp64, on the CPU: factors are made anew wherever a bundle is loaded, from G_LM and integer ranks, and
must be the same there up to rounding. A head of rank K keeps G_LM itself and its keys as they are, so full rank is exact.
Heads of one rank form a group, which is one tensor of keys.

Shapes: L layers, H heads (Hg of a group), K head dim, r rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RankGroup(NamedTuple):
    """Heads of one layer whose keys have the same size r: scores = (q query_factor) (k key_factor)^T."""

    heads: tuple[int, ...]  # ascending
    query_factor: Tensor  # U_r S_r [Hg,K,r]; G_LM itself at full rank
    key_factor: Tensor | None  # V_r [Hg,K,r]; None at full rank: keys as they are

    @property
    def rank(self) -> int:
        """Numbers of a key that the cache holds per token and head."""
        return int(self.query_factor.shape[-1])


def factor_g(g_HKK: Tensor, rank_H: Tensor) -> list[RankGroup]:
    """The groups of a layer, by rank, in G_LM's dtype and device. rank_H: integers 1…K."""
    groups = []
    U_HKK, S_HK, Vh_HKK = _svd(g_HKK)
    for rank in sorted(set(rank_H.tolist())):
        heads = [head for head, other in enumerate(rank_H.tolist()) if other == rank]
        if rank == g_HKK.shape[-1]:
            groups.append(RankGroup(tuple(heads), g_HKK[heads], None))
            continue
        query_factor = (U_HKK[heads] * S_HK[heads, None])[..., :rank]
        key_factor = Vh_HKK[heads, :rank].mT
        groups.append(RankGroup(tuple(heads), *(t.to(g_HKK).contiguous() for t in (query_factor, key_factor))))
    return groups


def truncate_g(g_LHKK: Tensor, rank_LH: Tensor) -> Tensor:
    """G_LM of these ranks at full size, [L,H,K,K]: what the factors multiply to. For measuring without a cache."""
    U_LHKK, S_LHK, Vh_LHKK = _svd(g_LHKK)
    full = g_LHKK.shape[-1]
    kept_LHK = torch.arange(full) < rank_LH.cpu()[..., None]
    truncated = ((U_LHKK * (S_LHK * kept_LHK)[..., None, :]) @ Vh_LHKK).to(g_LHKK)
    return torch.where((rank_LH.to(g_LHKK.device) == full)[..., None, None], g_LHKK, truncated)


def ranks_by_energy(g_LHKK: Tensor, energy: float) -> Tensor:
    """The smallest ranks [L,H], int64, that drop no more than this share of a head's squared singular values; at least 1."""
    _, S_LHK, _ = _svd(g_LHKK)
    squared_LHK = S_LHK.square()
    # dropped_LHK[r]: what rank r drops; summed from the smallest, so that small values are not lost in large ones.
    dropped_LHK = squared_LHK.flip(-1).cumsum(-1).flip(-1)
    too_much_LHK = dropped_LHK > energy * dropped_LHK[..., :1]
    return too_much_LHK.sum(-1).clamp(min=1)


def effective_rank(G: Tensor, *, left_out: float) -> Tensor:
    """Smallest rank that keeps all but `left_out` of the energy (sum of squared singular values), [...,K,K] -> [...]."""
    energy: Tensor = torch.linalg.svdvals(G.double()).square()
    tail = energy.flip(-1).cumsum(-1).flip(-1)  # energy lost by stopping before each value
    return (tail > left_out * energy.sum(dim=-1, keepdim=True)).sum(dim=-1)


def round_ranks(rank_LH: Tensor, head_dim: int, *, multiple: int) -> Tensor:
    """Ranks rounded up to a multiple, at most the full K."""
    return (-(-rank_LH // multiple) * multiple).clamp(max=head_dim)


def _svd(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(g.detach().double().cpu())
    return U, S, Vh
