"""Cross-entropy of an output layer's logits, some rows at a time, so that the logits never exist whole.

The losses of a chunk of rows need the logits of that chunk only, and so do their gradients: `dL/dlogits = softmax - onehot`. So
the forward pass computes a chunk's logits, its losses, and, where a gradient is wanted, right away what it adds to the
gradients of hidden states, weight and bias; the backward pass multiplies these by the gradient of the sum, one number. Three
products of matrices, as many as with whole logits. What is kept is one chunk of logits and the gradients themselves.

Decision: an own loop, and not `torch.nn.functional.linear_cross_entropy` (torch 2.13, the same algorithm, which the tests
compare with) nor Liger's kernel. torch's returns the loss in the dtype of its inputs (in bf16 that is 3 digits of the sum over
a batch), sums a bf16 weight's gradient over chunks in bf16, has no z-loss, gives no loss of each target beside a sum with a
gradient, needs torch 2.13 where the model runs with 2.6, and is two to three times as slow at small sizes on a CPU. Liger's is
for GPUs only, and none was at hand to try it. Nothing is chosen by shape: a batch that fits one chunk is nearly the plain path,
which was 7 % faster in one case of 256 tokens (docs/speed.md).

Shapes: N rows (tokens), D model width, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pldr_model.config import CHUNK_ROWS
from pldr_model.layers import at_least_float32


class RowLosses(NamedTuple):
    """total: sum over rows of nll + z_loss * logsumexp^2, 0-dim, with a gradient; nll_N: of each row, in nats, without one."""

    total: Tensor
    nll_N: Tensor


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    target_N: Tensor,
    *,
    ignore: int,
    z_loss: float = 0.0,
    rows: int | None = None,
) -> RowLosses:
    """The losses of logits `x W^T + b`, in fp32 at least; rows whose target is `ignore` have none. rows: of a chunk.

    Gradients can be asked for once: the backward pass uses them up.
    """
    rows = rows or CHUNK_ROWS["cpu" if x_ND.device.type == "cpu" else "cuda"]
    if torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad or bias_V.requires_grad):
        total, nll_N = _LinearCrossEntropy.apply(x_ND, weight_VD, bias_V, target_N, ignore, z_loss, rows)  # type: ignore[no-untyped-call]
        return RowLosses(total, nll_N)
    return _Chunks(x_ND.detach(), weight_VD.detach(), bias_V.detach(), target_N, ignore, z_loss, rows).run()


class _Chunks:
    """The loop over chunks, and the gradients of the sum it adds up: of x [N,D], weight [V,D] and bias [V]."""

    def __init__(
        self,
        x_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        target_N: Tensor,
        ignore: int,
        z_loss: float,
        rows: int,
        *,
        gradients: bool = False,
    ) -> None:
        self.x_ND, self.weight_VD, self.bias_V, self.target_N = x_ND, weight_VD, bias_V, target_N
        self.ignore, self.z_loss, self.rows, self.gradients = ignore, z_loss, rows, gradients
        self.wide = at_least_float32(x_ND.dtype)
        self.x_grad_ND: Tensor | None = None
        self.weight_grad_VD: Tensor | None = None
        self.bias_grad_V: Tensor | None = None

    def run(self) -> RowLosses:
        """The losses of all rows; with `gradients` also those."""
        num_rows = len(self.x_ND)
        nll_N = self.x_ND.new_zeros(num_rows, dtype=self.wide)
        total = self.x_ND.new_zeros((), dtype=self.wide)
        if self.gradients:
            self.x_grad_ND = torch.empty_like(self.x_ND)
            # Summed over chunks in fp32 at least; a single chunk needs no sum.
            dtype = self.wide if num_rows > self.rows else self.weight_VD.dtype
            self.weight_grad_VD = torch.zeros_like(self.weight_VD, dtype=dtype)
            self.bias_grad_V = torch.zeros_like(self.bias_V, dtype=self.wide)
        for begin in range(0, num_rows, self.rows):
            self._chunk(slice(begin, begin + self.rows), nll_N, total)
        return RowLosses(total, nll_N)

    def _chunk(self, here: slice, nll_N: Tensor, total: Tensor) -> None:
        """Add one chunk's losses and gradients."""
        x_RD, target_R1 = self.x_ND[here], self.target_N[here].unsqueeze(1)
        logits_RV = torch.addmm(self.bias_V, x_RD, self.weight_VD.T).to(self.wide)
        real_R1 = target_R1 != self.ignore
        at_target_R1 = logits_RV.gather(1, target_R1)
        best_R1 = logits_RV.amax(dim=1, keepdim=True)
        exp_RV = logits_RV.sub_(best_R1).exp_()
        sum_R1 = exp_RV.sum(dim=1, keepdim=True)
        logsumexp_R1 = best_R1 + sum_R1.log()
        nll_R1 = torch.where(real_R1, logsumexp_R1 - at_target_R1, 0.0)
        nll_N[here] = nll_R1.squeeze(1)
        total += nll_R1.sum()
        if self.z_loss:
            total += self.z_loss * torch.where(real_R1, logsumexp_R1.square(), 0.0).sum()
        if not self.gradients:
            return
        assert self.x_grad_ND is not None and self.weight_grad_VD is not None and self.bias_grad_V is not None
        factor_R1 = (1 + 2 * self.z_loss * logsumexp_R1) / sum_R1
        exp_RV.mul_(torch.where(real_R1, factor_R1, 0.0))
        grad_RV = exp_RV.scatter_add_(1, target_R1, -real_R1.to(self.wide))
        self.bias_grad_V += grad_RV.sum(dim=0)
        narrow_RV = grad_RV.to(self.x_ND.dtype)
        torch.mm(narrow_RV, self.weight_VD, out=self.x_grad_ND[here])
        if self.weight_grad_VD.dtype == narrow_RV.dtype:
            self.weight_grad_VD.addmm_(narrow_RV.T, x_RD)
        else:
            self.weight_grad_VD += narrow_RV.T @ x_RD


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward pass has the gradients of the sum already; the backward pass multiplies them by the gradient it gets."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        target_N: Tensor,
        ignore: int,
        z_loss: float,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(x_ND.device.type, enabled=False):
            chunks = _Chunks(x_ND, weight_VD, bias_V, target_N, ignore, z_loss, rows, gradients=True)
            total, nll_N = chunks.run()
        ctx.gradients = (chunks.x_grad_ND, chunks.weight_grad_VD, chunks.bias_grad_V)
        ctx.dtypes = (x_ND.dtype, weight_VD.dtype, bias_V.dtype)
        ctx.mark_non_differentiable(nll_N)
        return total, nll_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_cross_entropy: its gradients were used up by the first backward pass")
        x, weight, bias = (
            each.mul_(grad).to(dtype) if needed else None
            for each, dtype, needed in zip(gradients, ctx.dtypes, ctx.needs_input_grad, strict=False)
        )
        return x, weight, bias, None, None, None, None
