"""Attention of a layer whose cache holds low-rank keys (low_rank.py), a tensor for each group of heads of one rank.

Decisions. Heads are put in the order of their groups when the decoder is made (rows of W_qkv), so that a group's queries and
keys stand side by side and one product gives both of them. Keys are stored as [r,T]: then scores read memory in its order (on a
CPU up to twice as fast as [T,r]). A step, or a few tokens, makes its scores group after group, then one softmax and one product
with the values. A long piece of a prompt would need S x T scores for each head; there the keys are filled up with zeros to K,
for one layer at a time, and the fused kernel does the rest: the same numbers.

Shapes: B rows, S new tokens of a row, N = B*S, H heads (Hg of a group), K head dim, r rank, T keys, W = 3*H*K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pldr_model.decode.cache import KeyGroup, LayerMemory
from pldr_model.decode.low_rank import factor_g

if TYPE_CHECKING:
    from pldr_model.decode.decoder import Pass

FEW = 16  # new tokens a row, up to which all their scores are made at once


@dataclass(frozen=True)
class LowRankKeys:
    """How one layer attends. factors: of each group, [2*Hg,K,r]: first for its queries (1/sqrt(K) in it), then for its keys.

    heads_3H: the model's heads (queries 0…H-1, keys, values) in the order that `attend` takes them; place_H: where each head
    then stands among the values; None where the order is the model's own.
    """

    groups: tuple[KeyGroup, ...]
    factors: tuple[Tensor, ...]
    heads_3H: Tensor
    place_H: Tensor | None

    @classmethod
    def of(cls, g_HKK: Tensor, rank_H: Tensor) -> LowRankKeys | None:
        """None where all keys are full."""
        H, K, _ = g_HKK.shape
        if bool((rank_H == K).all()):
            return None
        found = factor_g(g_HKK, rank_H)
        factors = []
        for group in found:
            full = torch.eye(K, dtype=g_HKK.dtype, device=g_HKK.device).expand(len(group.heads), K, K)
            key_factor = full if group.key_factor is None else group.key_factor
            factors.append(torch.cat((group.query_factor * K**-0.5, key_factor)))
        order = [head for group in found for head in group.heads]
        pairs = [head + first for group in found for first in (0, H) for head in group.heads]
        return cls(
            tuple(KeyGroup(len(group.heads), group.rank) for group in found),
            tuple(factors),
            torch.tensor([*pairs, *(head + 2 * H for head in order)], device=g_HKK.device),
            None if order == sorted(order) else torch.tensor(order, device=g_HKK.device).argsort(),
        )

    def attend(self, qkv_NW: Tensor, memory: LayerMemory, attended: tuple[list[Tensor], Tensor], where: Pass) -> Tensor:
        """Store the new keys and values; returns the heads' values side by side, [N,H*K]. Queries and keys are rotated."""
        B, S, H, K = where.rows, where.tokens, len(self.heads_3H) // 3, memory.values.shape[-1]
        *qk_NHK, v_NHK = torch.split(
            qkv_NW.view(-1, 3 * H, K), [*(2 * group.num_heads for group in self.groups), H], dim=1
        )
        queries = []
        for group, factor, flat, own_NHK in zip(self.groups, self.factors, memory.flat, qk_NHK, strict=False):
            q_HNr, k_HNr = torch.bmm(own_NHK.transpose(0, 1), factor).chunk(2)
            flat.index_copy_(0, where.place[group.num_heads * group.width], k_HNr.transpose(0, 1).reshape(-1, 1))
            queries.append(q_HNr.view(-1, B, S, group.width).transpose(0, 1))
        memory.flat[-1].index_copy_(0, where.place[H], v_NHK.reshape(-1, K))
        keys, values = attended
        if S <= FEW and not (where.causal and S > 1):
            scores = [q @ k.mT for q, k in zip(queries, keys, strict=True)]
            scores_BHST = scores[0] if len(scores) == 1 else torch.cat(scores, dim=1)
            if where.mask is not None:
                scores_BHST.add_(where.mask)
            share_BHST = scores_BHST.softmax(-1, dtype=torch.promote_types(scores_BHST.dtype, torch.float32))
            heads_BHSK = share_BHST.to(values.dtype) @ values
        else:
            q_BHSK, k_BHTK = (
                torch.cat([F.pad(part, (0, K - part.shape[-1])) for part in parts], dim=1) for parts in (queries, keys)
            )
            heads_BHSK = F.scaled_dot_product_attention(
                q_BHSK, k_BHTK, values, attn_mask=where.mask, is_causal=where.causal, scale=1.0
            )
        heads_NHK = heads_BHSK.transpose(1, 2).reshape(-1, H, K)
        return (heads_NHK if self.place_H is None else heads_NHK.index_select(1, self.place_H)).flatten(1)
