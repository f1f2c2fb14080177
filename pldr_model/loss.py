"""Training loss: cross-entropy, and the DAG regularizer on the deductive outputs.

Source: arXiv 2410.16703: `mean |log(tr(expm(X∘X)) / K)|` for X = A_LM, A_P, G_LM, one coefficient each; it
vanishes where X is the adjacency matrix of a directed acyclic graph.

Decision: `log tr expm` is computed without ever forming expm. A power `A_LM ** P` reaches 1e4 at
initialization, its square 1e8, and e^(1e8) overflows fp64 as well as fp32 (the reference returns inf there).
X∘X has no negative entries, so scaling and squaring with the magnitude kept apart as a logarithm loses
nothing to cancellation. The gradient is known in closed form, `d log tr expm(M) = tr(expm(M) dM) / tr
expm(M)`, so nothing of the squarings is kept.

Shapes: B batch, S sequence, V vocabulary, K head dim; N matrices of any batching.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pldr_model.config import ModelConfig
from pldr_model.layers import at_least_float32
from pldr_model.plga import DeductiveOutputs


class Losses(NamedTuple):
    """`total` = weight * cross-entropy + sum of coefficient * dag term is what training minimizes; 0-dim tensors."""

    total: Tensor
    cross_entropy: Tensor
    dag: dict[str, Tensor]


def cross_entropy(logits_BSV: Tensor, targets_BS: Tensor, *, pad_id: int = 0) -> Tensor:
    """Mean negative log-likelihood in nats over targets that are not padding, in fp32 at least; 0 without any."""
    logits = logits_BSV.to(at_least_float32(logits_BSV.dtype))
    total = F.cross_entropy(logits.flatten(0, -2), targets_BS.flatten(), ignore_index=pad_id, reduction="sum")
    return total / (targets_BS != pad_id).sum().clamp(min=1)


def total_loss(
    logits_BSV: Tensor,
    targets_BS: Tensor,
    config: ModelConfig,
    *,
    outputs: list[DeductiveOutputs] | None = None,
    weight: Tensor | None = None,
) -> Losses:
    """Cross-entropy plus the DAG terms whose coefficient is not zero; `outputs` are needed only for those.

    weight: of the cross-entropy, for one of several batches with different numbers of targets. The DAG terms are means over
    sequences, so they have none.
    """
    loss = cross_entropy(logits_BSV, targets_BS, pad_id=config.pad_id)
    total, terms = loss if weight is None else loss * weight.to(loss.dtype), {}
    for name, coefficient in zip(("A_LM", "A_P", "G_LM"), config.dag_coefficients, strict=True):
        if coefficient:
            assert outputs, "a DAG term needs the deductive outputs: call the model with return_outputs=True"
            terms[name] = dag_regularizer([getattr(layer, name) for layer in outputs], name=name)
            total = total + coefficient * terms[name].to(total.dtype)
    return Losses(total, loss, terms)


def dag_regularizer(tensors: list[Tensor], *, name: str = "X") -> Tensor:
    """`mean |log(tr(expm(X∘X)) / K)|` over layers, batch and heads, in fp64; finite for |X| < 1e150.

    Errors: FloatingPointError, naming the tensor, where X itself holds inf or NaN: no NaN leaves silently.
    """
    x_NKK = torch.stack([tensor.to(torch.float64) for tensor in tensors])
    squared_NKK = x_NKK * x_NKK
    if not squared_NKK.isfinite().all():
        raise FloatingPointError(f"DAG regularizer: {name} holds inf or NaN (or exceeds 1e150); training has diverged")
    log_trace_N: Tensor = _LogTraceExp.apply(squared_NKK)  # type: ignore[no-untyped-call]
    return (log_trace_N - math.log(x_NKK.shape[-1])).abs().mean()


class _LogTraceExp(torch.autograd.Function):
    """`log tr expm(M)` of matrices without negative entries, [..., K, K] -> [...]."""

    @staticmethod
    def forward(ctx: Any, m_NKK: Tensor) -> Tensor:
        norm_N = m_NKK.sum(dim=-1).amax(dim=-1)
        # expm(M) = expm(M / 2^s)^(2^s), s chosen per matrix so that the scaled norm is at most 1.
        num_squarings_N = norm_N.clamp_min(1.0).log2().ceil()
        e_NKK = torch.linalg.matrix_exp(m_NKK * torch.exp2(-num_squarings_N)[..., None, None])
        log_scale_N = torch.zeros_like(norm_N)
        for done in range(int(num_squarings_N.max())):
            active_N = num_squarings_N > done
            squared_NKK = e_NKK @ e_NKK
            peak_N = squared_NKK.amax(dim=(-2, -1))
            e_NKK = torch.where(active_N[..., None, None], squared_NKK / peak_N[..., None, None], e_NKK)
            log_scale_N = torch.where(active_N, 2 * log_scale_N + peak_N.log(), log_scale_N)
        trace_N = e_NKK.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        ctx.save_for_backward(e_NKK / trace_N[..., None, None])
        log_trace_N: Tensor = log_scale_N + trace_N.log()
        return log_trace_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> Tensor:
        (normalized_NKK,) = ctx.saved_tensors
        grad_NKK: Tensor = grad_N[..., None, None] * normalized_NKK.mT
        return grad_NKK
