"""Validation while training: losses without a leak, and the order parameters.

Until G_LM is invariant, logits at position t see the future through it (docs/certificate.md), so a loss in block mode
cannot be trusted alone. Every validation also runs with G cached from *another* held-out prompt, which cannot leak; the
difference is the leak gap.

Every mean is over targets without padding: sums and counts are reduced over batches and ranks, and divided at the end. So it
does not depend on `train.micro_batch` or on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.train.by_source import SourceLosses, Sources
from pipeline.train.g_structure import g_structure, parameter_g
from pipeline.train.targets import has_padding, masks, num_targets, with_documents
from pldr_model.config import ModelConfig
from pldr_model.model import g_shape


@torch.no_grad()
def validate(
    engine: Any,
    config: ModelConfig,
    sequences: np.ndarray,
    *,
    batch_size: int,
    bytes_per_token: float,
    sources: Sources | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Losses and order parameters on held-out sequences [n, S+1], or with document masks [2, n, S+1] (`with_documents`);
    collective, every rank scores its share.

    Sequence 0 only lends its G (the "other prompt"), the others are scored, each once. Losses in nats per token: means over
    their targets that are not padding. Order parameters: RMS(X_i - X_0) / RMS(X_i) over sequences, layers, heads and entries,
    for X = A, A_LM, A_P, G_LM; and their log10, for charts without a logarithmic axis (zero has none: that point is left out).
    sources: of their tokens: the cached loss is also given by source (by_source.py).
    Of a G that is learned or a parameter: how much of it is plain attention, and its rank (g_structure.py).
    `attention_alive`: what the loss gains over G = 0 and over G = identity (the smaller), from the cached loss.
    stopped: collective; when it says so, validation ends without a result.
    """
    sequences, documents = with_documents(sequences.astype(np.int64))
    assert len(sequences) > 1, "nothing to score"
    device = next(engine.module.parameters()).device
    numbers, num_mine = _share(len(sequences))
    mine = sequences[numbers]
    mine[num_mine:, 1:] = config.pad_id
    training = engine.training
    engine.eval()
    learned = config.g_source == "learned"
    dtype = next(engine.module.parameters()).dtype
    constant: dict[str, torch.Tensor] = {}
    first: list[Any] = []
    if learned:
        padded = has_padding(sequences[:1], config.pad_id)
        ids, apart = torch.from_numpy(sequences[:1, :-1]).to(device), masks(documents, device, slice(1))
        _, first = engine(ids, padded=padded, return_outputs=True, last_only=True, **apart)
        constant["cached"] = torch.stack([layer.G_LM[0] for layer in first])
        eye = torch.eye(config.head_dim, device=device, dtype=dtype).expand(g_shape(config))
        constant |= {"zero": torch.zeros_like(eye), "identity": eye}
    by_source = SourceLosses(sources, device)
    sums = torch.zeros(1 + len(constant) + 1 + 8, dtype=torch.float64, device=device)  # targets, losses, deviations
    for start in range(0, len(mine), batch_size):
        if stopped():
            engine.train(training)
            return {}
        batch, real = mine[start : start + batch_size], max(0, num_mine - start)
        padded, num = has_padding(batch[:real], config.pad_id), num_targets(batch, config.pad_id)
        here = numbers[start : start + batch_size]
        ids, apart = torch.from_numpy(batch).to(device), masks(documents, device, here)
        inputs, targets = ids[:, :-1], ids[:, 1:]
        sums[0] += num
        if learned:
            tokens, outputs = engine(inputs, targets=targets, padded=padded, return_outputs=True, **apart)
            sums[-8:] += _deviations(outputs, first, real)
        else:
            tokens = engine(inputs, targets=targets, padded=padded, **apart)
            by_source.add(tokens.nll_BS, targets, here, pad_id=config.pad_id)
        sums[1] += tokens.nll_BS.sum(dtype=torch.float64)
        for slot, (name, g) in enumerate(constant.items(), start=2):
            tokens = engine(inputs, targets=targets, g_lm=g, padded=padded, **apart)
            sums[slot] += tokens.nll_BS.sum(dtype=torch.float64)
            if name == "cached":
                by_source.add(tokens.nll_BS, targets, here, pad_id=config.pad_id)
    dist.all_reduce(sums)
    engine.train(training)
    block, *others = (sums[1:-8] / sums[0]).tolist()
    named = dict(zip(constant, others, strict=True))
    cached = named.get("cached", block)
    result = {
        "val/loss_block": block,
        "val/loss_cached": cached,
        "val/leak_gap": cached - block,
        "val/bits_per_byte": cached / math.log(2) / bytes_per_token,
        **by_source.read(),
    }
    if learned:
        result |= order_parameters(sums[-8:].view(4, 2).tolist())
        result["invariance/attention_alive"] = min(named["zero"], named["identity"]) - cached
        result |= g_structure(constant["cached"], config)
    elif config.g_source == "constant":
        result |= g_structure(parameter_g(engine), config)
    return result


def order_parameters(squares: list[list[float]]) -> dict[str, float]:
    """The metrics of A, A_LM, A_P and G_LM from the sums of squares of (X - X_0) and of X."""
    found = {}
    for name, (difference, total) in zip(("A", "A_LM", "A_P", "G"), squares, strict=True):
        order = math.sqrt(difference / total) if total else math.nan
        found[f"invariance/order_parameter_{name}"] = order
        if order > 0:
            found[f"invariance/log10_order_parameter_{name}"] = math.log10(order)
    return found


def _share(count: int) -> tuple[np.ndarray, int]:
    """The numbers of this rank's part of the sequences after the first, and how many they are. Every rank runs as many passes
    (ZeRO-3 gathers in each), so a short part is filled up with the first; the caller leaves it no target."""
    size = -(-(count - 1) // dist.get_world_size())
    begin = 1 + dist.get_rank() * size
    mine = np.arange(begin, min(begin + size, count))
    return np.concatenate([mine, np.zeros(size - len(mine), dtype=np.int64)]), len(mine)


def _deviations(outputs: list[Any], first: list[Any], count: int) -> torch.Tensor:
    """Sum of squares of (X - X_first) and of X over the first `count` sequences, for each deductive output, [8] in fp64."""
    rows = []
    for field in range(4):
        pairs = [
            (layer[field][:count].double(), other[field].double()) for layer, other in zip(outputs, first, strict=True)
        ]
        rows.append(sum(((x - y) ** 2).sum() for x, y in pairs))
        rows.append(sum((x**2).sum() for x, _ in pairs))
    return torch.stack([torch.as_tensor(row) for row in rows])
