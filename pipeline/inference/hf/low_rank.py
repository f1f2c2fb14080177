"""Low-rank keys of an export: G_LM of a head as a factor for queries and one for keys; a cache holds r numbers of a key.

All heads of a layer have one size, the largest of their ranks: transformers' caches hold one tensor a layer. What writes them
is a bundle whose ranks were measured; reading back gives the product, which is its G_LM of these ranks up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pldr_model.decode.low_rank import factor_g

G, KEYS = ".self_attn.g_lm", ".self_attn.key_factor"


def split_g(theirs: Mapping[str, Tensor], ranks: Sequence[int]) -> dict[str, Tensor]:
    """G_LM [H,K,K] of each layer -> factors [H,K,r] for queries (under its name) and keys. ranks: of each layer."""
    tensors = dict(theirs)
    for layer, rank in enumerate(ranks):
        name = f"model.layers.{layer}{G}"
        g_HKK = tensors[name]
        (group,) = factor_g(g_HKK, torch.full((len(g_HKK),), rank))
        keys_HKr = torch.eye(rank).to(g_HKK).repeat(len(g_HKK), 1, 1) if group.key_factor is None else group.key_factor
        tensors |= {name: group.query_factor, name.replace(G, KEYS): keys_HKr}
    return tensors


def join_g(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`split_g` inverted, where it was done."""
    tensors = {name: tensor for name, tensor in theirs.items() if not name.endswith(KEYS)}
    for name, keys_HKr in theirs.items():
        if name.endswith(KEYS):
            tensors[name.replace(KEYS, G)] = theirs[name.replace(KEYS, G)] @ keys_HKr.mT
    return tensors


def joined_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes after `join_g`; of factors that do not fit, as they are, for `check_shapes` to name."""
    found = dict(shapes)
    for name, shape in shapes.items():
        queries = name.replace(KEYS, G)
        if name.endswith(KEYS) and len(shape) == 3 and shapes.get(queries) == shape:
            del found[name]
            found[queries] = (*shape[:2], shape[1])
    return found


def layer_ranks(key_ranks_LH: Tensor | None, head_dim: int) -> list[int] | None:
    """The size of a key in each layer; None where all are full."""
    if key_ranks_LH is None:
        return None
    ranks: list[int] = key_ranks_LH.amax(dim=1).tolist()
    return ranks if min(ranks) < head_dim else None
