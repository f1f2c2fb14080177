"""The model by its definition: every sequence deduces its G alone, and attention is written out."""

from collections.abc import Callable

import torch
from torch import Tensor

from pldr_model.model import PLDRModel
from pldr_model.plga import DeductiveOutputs

LENDER: dict[str, Callable[[int, int], int]] = {  # of sequence i of n
    "own": lambda i, n: i,
    "batch": lambda i, n: 0,
    "neighbor": lambda i, n: (i + 1) % n,
}


def logits_by_definition(model: PLDRModel, ids_BS: Tensor, g_from: str) -> tuple[Tensor, list[list[DeductiveOutputs]]]:
    """Logits [B,S,V] where sequence i uses the G of sequence LENDER[g_from](i, n); what each layer deduced of each sequence."""
    n, S = ids_BS.shape
    x, rope, _ = model._enter(ids_BS, False)
    allowed = torch.ones(S, S, dtype=torch.bool).tril() & (ids_BS != model.config.pad_id)[:, None, :]
    allowed |= torch.eye(S, dtype=torch.bool) & ~allowed.any(-1, keepdim=True)
    deduced = []
    for layer in model.layers:
        q, k, v = layer.attention.project(x, rope)
        alone = [layer.attention.plga(q[i : i + 1]) for i in range(n)]
        g = torch.cat([alone[LENDER[g_from](i, n)].G_LM for i in range(n)])
        scores = torch.einsum("bhsk,bhkl,bhtl->bhst", q, g, k) / model.config.head_dim**0.5
        heads = scores.masked_fill(~allowed[:, None], float("-inf")).softmax(-1) @ v
        h = layer.attention_norm(layer.attention.output(heads.transpose(1, 2).flatten(2)) + x)
        x = layer.feed_forward_norm(layer.feed_forward(h) + h)
        deduced.append(alone)
    return model.output(x), deduced
