"""Training loss: cross-entropy, z-loss, and the DAG regularizer on the deductive outputs.

`PLDRModel.forward(ids, targets=...)` returns `TokenLosses` without making logits of all tokens
(pldr_model/linear_cross_entropy.py); `losses_of_logits` is the plain path, for logits that are there anyway.

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
from pldr_model.layers import Linear, at_least_float32
from pldr_model.linear_cross_entropy import linear_cross_entropy
from pldr_model.plga import DeductiveOutputs


class Losses(NamedTuple):
    """`total` = weight * (cross-entropy + z-loss) + sum of coefficient * dag term is what training minimizes; 0-dim tensors.
    `cross_entropy` has no gradient."""

    total: Tensor
    cross_entropy: Tensor
    dag: dict[str, Tensor]


class TokenLosses(NamedTuple):
    """Of a batch: what the model returns when it is given targets, in fp32 at least.

    loss: mean over targets that are not padding of nll + z_loss * logsumexp^2, the only one with a gradient; cross_entropy:
        that of nll alone. Both are 0-dim, and 0 without any target.
    nll_BS: negative log-likelihood of each target in nats, 0 at padding.
    """

    loss: Tensor
    cross_entropy: Tensor
    nll_BS: Tensor


class OutputLayer(Linear):
    """Hidden states [...,D] -> logits [...,V]; with targets [B,S], the losses of these logits instead.

    They are made inside this module's forward pass because only there ZeRO-3 has gathered its weight.
    """

    def forward(  # type: ignore[override]
        self, x_BSD: Tensor, targets_BS: Tensor | None = None, *, pad_id: int = 0, z_loss: float = 0.0
    ) -> Tensor | TokenLosses:
        if targets_BS is None:
            return super().forward(x_BSD)
        if (
            torch.compiler.is_compiling()
        ):  # of the whole model, not of layers: a graph would unroll the loop over chunks
            logits_BSV: Tensor = super().forward(x_BSD)
            return losses_of_logits(logits_BSV, targets_BS, pad_id=pad_id, z_loss=z_loss)
        x_ND, target_N = x_BSD.flatten(0, -2), targets_BS.flatten()
        total, nll_N = linear_cross_entropy(x_ND, self.weight, self.bias, target_N, ignore=pad_id, z_loss=z_loss)
        return _token_losses(total, nll_N, targets_BS, pad_id, z_loss)


def losses_of_logits(logits_BSV: Tensor, targets_BS: Tensor, *, pad_id: int = 0, z_loss: float = 0.0) -> TokenLosses:
    """The same of logits that are there."""
    logits_BSV = logits_BSV.to(at_least_float32(logits_BSV.dtype))
    nll_N = F.cross_entropy(logits_BSV.flatten(0, -2), targets_BS.flatten(), ignore_index=pad_id, reduction="none")
    total = nll_N.sum()
    if z_loss:
        total = total + z_loss * (logits_BSV.logsumexp(dim=-1).square() * (targets_BS != pad_id)).sum()
    return _token_losses(total, nll_N.detach(), targets_BS, pad_id, z_loss)


def _token_losses(total: Tensor, nll_N: Tensor, targets_BS: Tensor, pad_id: int, z_loss: float) -> TokenLosses:
    num = (targets_BS != pad_id).sum().clamp(min=1)
    loss = total / num
    return TokenLosses(loss, nll_N.sum() / num if z_loss else loss.detach(), nll_N.view_as(targets_BS))


def cross_entropy(logits_BSV: Tensor, targets_BS: Tensor, *, pad_id: int = 0) -> Tensor:
    """Mean negative log-likelihood in nats over targets that are not padding, in fp32 at least; 0 without any."""
    return losses_of_logits(logits_BSV, targets_BS, pad_id=pad_id).loss


def total_loss(
    tokens: TokenLosses,
    config: ModelConfig,
    *,
    outputs: list[DeductiveOutputs] | None = None,
    weight: Tensor | None = None,
) -> Losses:
    """The loss of the tokens plus the DAG terms whose coefficient is not zero; `outputs` are needed only for those.

    weight: of the tokens' loss, for one of several batches with different numbers of targets. The DAG terms are means over
    sequences, so they have none.
    """
    total, terms = tokens.loss if weight is None else tokens.loss * weight.to(tokens.loss.dtype), {}
    for name, coefficient in zip(("A_LM", "A_P", "G_LM"), config.dag_coefficients, strict=True):
        if coefficient:
            assert outputs, "a DAG term needs the deductive outputs: call the model with return_outputs=True"
            terms[name] = dag_regularizer([getattr(layer, name) for layer in outputs], name=name)
            total = total + coefficient * terms[name].to(total.dtype)
    return Losses(total, tokens.cross_entropy, terms)


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
