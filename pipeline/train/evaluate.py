"""Validation while training: losses without a leak, and the order parameters.

Until G_LM is invariant, logits at position t see the future through it (docs/certificate.md), so a loss in block mode
cannot be trusted alone. Every validation also runs with G cached from *another* held-out prompt, which cannot leak; the
difference is the leak gap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pldr_model.config import ModelConfig
from pldr_model.loss import cross_entropy
from pldr_model.model import g_shape


@torch.no_grad()
def validate(
    engine: Any,
    config: ModelConfig,
    sequences: np.ndarray,
    *,
    batch_size: int,
    bytes_per_token: float,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Losses and order parameters on held-out sequences [n, S+1]; collective, every rank scores its share.

    Sequence 0 only lends its G (the "other prompt"), the others are scored. Losses in nats per token. Order parameters:
    RMS(X_i - X_0) / RMS(X_i) over sequences, layers, heads and entries, for X = A, A_LM, A_P, G_LM. `attention_alive`:
    what the loss gains over G = 0 and over G = identity (the smaller), from the cached loss.
    stopped: collective; when it says so, validation ends without a result.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    device = next(engine.module.parameters()).device
    ids = torch.from_numpy(sequences.astype(np.int64))
    # Every rank runs the same number of passes (ZeRO-3 gathers in each), so the remainder is dropped.
    count = (len(sequences) - 1) // world
    assert count > 0, "fewer held-out sequences than ranks"
    mine = ids[1 + rank * count : 1 + (rank + 1) * count].to(device)
    training = engine.training
    engine.eval()
    learned = config.g_source == "learned"
    dtype = next(engine.module.parameters()).dtype
    constant: dict[str, torch.Tensor] = {}
    first: list[Any] = []
    if learned:
        _, first = engine(ids[:1, :-1].to(device), padded=False, return_outputs=True)
        constant["cached"] = torch.stack([layer.G_LM[0] for layer in first])
        eye = torch.eye(config.head_dim, device=device, dtype=dtype).expand(g_shape(config))
        constant |= {"zero": torch.zeros_like(eye), "identity": eye}
    sums = torch.zeros(len(constant) + 1 + 8, dtype=torch.float64, device=device)
    for batch in torch.split(mine, batch_size):
        if stopped():
            engine.train(training)
            return {}
        inputs, targets = batch[:, :-1], batch[:, 1:]
        if learned:
            logits, outputs = engine(inputs, padded=False, return_outputs=True)
            sums[-8:] += _deviations(outputs, first)
        else:
            logits = engine(inputs, padded=False)
        sums[0] += cross_entropy(logits, targets, pad_id=config.pad_id).double() * len(batch)
        for slot, g in enumerate(constant.values(), start=1):
            logits = engine(inputs, g_lm=g, padded=False)
            sums[slot] += cross_entropy(logits, targets, pad_id=config.pad_id).double() * len(batch)
    dist.all_reduce(sums)
    engine.train(training)
    losses = (sums[: len(constant) + 1] / (count * world)).tolist()
    block = losses[0]
    named = dict(zip(constant, losses[1:], strict=True))
    cached = named.get("cached", block)
    result = {
        "val/loss_block": block,
        "val/loss_cached": cached,
        "val/leak_gap": cached - block,
        "val/bits_per_byte": cached / math.log(2) / bytes_per_token,
    }
    if learned:
        squares = sums[-8:].view(4, 2).tolist()
        for name, (difference, total) in zip(("A", "A_LM", "A_P", "G"), squares, strict=True):
            result[f"invariance/order_parameter_{name}"] = math.sqrt(difference / total) if total else math.nan
        result["invariance/attention_alive"] = min(named["zero"], named["identity"]) - cached
    return result


def _deviations(outputs: list[Any], first: list[Any]) -> torch.Tensor:
    """Sum of squares of (X - X_first) and of X for each deductive output, [8] in fp64."""
    rows = []
    for field in range(4):
        pairs = [(layer[field].double(), other[field].double()) for layer, other in zip(outputs, first, strict=True)]
        rows.append(sum(((x - y) ** 2).sum() for x, y in pairs))
        rows.append(sum((x**2).sum() for x, _ in pairs))
    return torch.stack([torch.as_tensor(row) for row in rows])
