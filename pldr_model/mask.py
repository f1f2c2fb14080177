"""Which query attends to which key: up to its own position, within its document, and never to padding.

A packed sequence holds several documents one after another. With `documents` a query attends within its own document only, and
positions restart at 0 in each.
Decision: positions restart. Scores of scaled dot-product attention depend on differences of positions alone, but those of PLGA
do not: G_LM stands between the rotated query and the rotated key, `q R_i G R_j^T k`, and does not commute with rotations. So a
document would read otherwise at another place in its sequence, and never as it does alone.

Decision: one boolean mask [B,1,S,S] a pass, for PyTorch's fused kernels, everywhere. Exact and faster would be kernels for
sequences of variable length (`torch.nn.attention.varlen`: half precision on some GPUs only, since torch 2.10) and
`flex_attention` (slow unless compiled, and its block mask is made anew for each batch).

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_starts(documents_BS: Tensor) -> Tensor:
    """Where each token's document begins in its sequence [B,S]; a document is a run of equal numbers."""
    places_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    is_first_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    is_first_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    return torch.where(is_first_BS, places_S, 0).cummax(dim=1).values


def attention_mask(padding_BS: Tensor | None, starts_BS: Tensor | None = None) -> Tensor:
    """True = attend, [B,1,S,S]: keys up to the query's own position that are not padding, from where its document begins
    (`document_starts`). At least one of the two is given.

    A query with nothing but padding before it attends to itself, so that its softmax is finite (the reference
    averages over the whole sequence there, future included; such a query is padding itself and reaches no
    loss).
    """
    given = padding_BS if starts_BS is None else starts_BS
    assert given is not None, "causal attention needs no mask"
    S = given.shape[1]
    allowed_BSS = torch.ones(S, S, dtype=torch.bool, device=given.device).tril().unsqueeze(0)
    if starts_BS is not None:
        allowed_BSS = allowed_BSS & (torch.arange(S, device=given.device) >= starts_BS[:, :, None])
    if padding_BS is not None:
        allowed_BSS = allowed_BSS & ~padding_BS[:, None, :]
        own_SS = torch.eye(S, dtype=torch.bool, device=given.device)
        allowed_BSS = allowed_BSS | (own_SS & ~allowed_BSS.any(dim=-1, keepdim=True))
    return allowed_BSS.unsqueeze(1)
