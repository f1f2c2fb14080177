"""The metric learner: residual units of small GLUs on rows of length K, `x <- LN(x + GLU_n(…GLU_1(x)))`.

Decision (speed): its products are small, so launching them, and reading gates and values that do not lie together, costs as
much as the products. While training, a metric learner is one autograd function with a gradient written by hand, in place of a
node for each operation. What is hidden has the rows in its columns: gates and values are each contiguous, and products are
about as wide as there are rows. The backward pass computes silu(gate) again, so that 0.56 of what the modules
keep is kept (A_dff 170, K 64). To compute the hidden numbers again, too, would take a fifth of that, and was 3 % of a step at
110M: `train.activation_checkpointing: metric_learner` is for who needs the memory. In fp64 the gradients agree with the
modules' to 1e-12 (tests/pldr_model/test_metric_learner.py). The modules run as they are without gradients, under autocast, at
ZeRO-3, whose hooks gather weights in them, without GLUs (there is nothing to fuse), and in torch.compile, which fuses more by
itself.

Shapes: R rows, K their length, F hidden size of a GLU, E = 2F (gates, then values), G GLUs, N units.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pldr_model.config import ModelConfig
from pldr_model.layers import GLU

aten = torch.ops.aten
Learn = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], float], list[Tensor]]
LearnBackward = Callable[
    [Tensor, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], float, bool], list[Tensor | None]
]


class ResidualUnit(nn.Module):
    """`LN(x + GLU_n(…GLU_1(x)))` on rows of length K; without GLUs (num_denseA 0) `LN(x)`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.glus = nn.Sequential(*(GLU(config.head_dim, config.A_dff) for _ in range(config.num_denseA)))
        self.norm = nn.LayerNorm(config.head_dim, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self.glus(x) if len(self.glus) else x)
        return out


class MetricLearner(nn.Sequential):
    """The residual units one after the other: [...,K] -> [...,K].

    `fused`: as one function while training (`run_as_modules` sets it to False). With PLDR_METRIC_LEARNER=triton in the
    environment the function is Triton's on a GPU: pldr_model/triton_metric_learner.py, which has never run on one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(*(ResidualUnit(config) for _ in range(config.num_reslayerA)))
        self.fused = True
        self.eps, self.num_glus = config.layer_norm_eps, config.num_reslayerA * config.num_denseA

    def forward(self, x: Tensor) -> Tensor:
        as_modules = not self.fused or torch.compiler.is_compiling() or not torch.is_grad_enabled()
        if as_modules or not self.num_glus or torch.is_autocast_enabled(x.device.type):
            return cast(Tensor, super().forward(x))  # type: ignore[no-untyped-call]
        rows_RK = x.reshape(-1, x.shape[-1])
        out_RK: Tensor = _Learn.apply(rows_RK, self.eps, self.num_glus, *self.weights())  # type: ignore[no-untyped-call]
        return out_RK.view(x.shape)

    def weights(self) -> list[Tensor]:
        """w12, b12, w3, b3 of every GLU, then gamma, beta of every unit. (Read past nn.Module's attributes, which are slow.)"""
        units: list[Any] = [cast(Any, unit)._modules for unit in self._modules.values()]
        glus: list[Any] = [glu._modules for unit in units for glu in unit["glus"]._modules.values()]
        owners: list[Any] = [glu[name]._parameters for glu in glus for name in ("w12", "w3")]
        owners += [unit["norm"]._parameters for unit in units]
        return [owner[name] for owner in owners for name in ("weight", "bias")]


def run_as_modules(model: nn.Module) -> None:
    """Run the metric learners of a model module by module, whose hooks ZeRO-3 gathers weights in."""
    for module in model.modules():
        if isinstance(module, MetricLearner):
            module.fused = False


class _Learn(torch.autograd.Function):
    """`learn` and its gradients."""

    @staticmethod
    def forward(ctx: Any, rows_RK: Tensor, eps: float, num_glus: int, *weights: Tensor) -> Tensor:
        forward, ctx.gradients = _functions(rows_RK)
        out_RK, *kept = forward(rows_RK, weights[: 4 * num_glus], weights[4 * num_glus :], eps)
        ctx.save_for_backward(*kept, *weights)
        ctx.eps, ctx.num_glus, ctx.num_kept = eps, num_glus, len(kept)
        return out_RK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RK: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: recomputing activations allows no second read
        G, kept, weights = ctx.num_glus, saved[: ctx.num_kept], saved[ctx.num_kept :]
        with_weights = any(ctx.needs_input_grad[3:])
        grads = ctx.gradients(grad_RK, kept, weights[: 4 * G], weights[4 * G :], ctx.eps, with_weights)
        return grads[0], None, None, *grads[1:]


def _functions(rows_RK: Tensor) -> tuple[Learn, LearnBackward]:
    """The two passes on this device."""
    if rows_RK.is_cuda and os.environ.get("PLDR_METRIC_LEARNER") == "triton":
        from pldr_model import triton_metric_learner

        return triton_metric_learner.learn, triton_metric_learner.learn_backward
    return learn, learn_backward


def learn(rows_RK: Tensor, glus: Sequence[Tensor], norms: Sequence[Tensor], eps: float) -> list[Tensor]:
    """The units' result [R,K]; then what each GLU reads [K,R], what is hidden in it [E,R], and what each norm reads [R,K]."""
    N, per_unit = len(norms) // 2, len(glus) // (2 * len(norms))
    inputs, hidden, sums = [], [], []
    for unit in range(N):
        y_KR = rows_RK.t()
        for w12, b12, w3, b3 in _by_four(glus, unit * per_unit, per_unit):
            inputs.append(y_KR)
            hidden.append(torch.addmm(b12.unsqueeze(1), w12, y_KR))
            gate_FR, value_FR = hidden[-1].chunk(2)
            activated_FR = silu(gate_FR).mul_(value_FR)
            if len(inputs) < (unit + 1) * per_unit:
                y_KR = torch.addmm(b3.unsqueeze(1), w3, activated_FR)
            else:  # a norm reads rows
                sums.append(torch.addmm(b3, activated_FR.t(), w3.t()).add_(rows_RK))
        gamma, beta = norms[2 * unit : 2 * unit + 2]
        rows_RK = torch.native_layer_norm(sums[-1], gamma.shape, gamma, beta, eps)[0]
    return [rows_RK, *inputs, *hidden, *sums]


def learn_backward(
    grad_RK: Tensor,
    kept: Sequence[Tensor],
    glus: Sequence[Tensor],
    norms: Sequence[Tensor],
    eps: float,
    with_weights: bool,
) -> list[Tensor | None]:
    """Gradients of the rows, of every GLU's w12, b12, w3, b3, of every unit's gamma, beta (None if not `with_weights`)."""
    N, per_unit = len(norms) // 2, len(glus) // (2 * len(norms))
    G = N * per_unit
    inputs, hidden, sums = kept[:G], kept[G : 2 * G], kept[2 * G :]
    d_glus: list[Tensor | None] = [None] * len(glus)
    d_norms: list[Tensor | None] = [None] * len(norms)
    mask = [True, with_weights, with_weights]
    for unit in reversed(range(N)):
        gamma, beta = norms[2 * unit : 2 * unit + 2]
        mean, rstd = torch.native_layer_norm(sums[unit], gamma.shape, None, None, eps)[1:]
        grad_RK, d_norms[2 * unit], d_norms[2 * unit + 1] = aten.native_layer_norm_backward(
            grad_RK, sums[unit], gamma.shape, mean, rstd, gamma, beta, mask
        )
        d_KR = grad_RK.t()
        for glu in range((unit + 1) * per_unit - 1, unit * per_unit - 1, -1):
            w12, _, w3, _ = glus[4 * glu : 4 * glu + 4]
            gate_FR, value_FR = hidden[glu].chunk(2)
            d_hidden_ER = torch.empty_like(hidden[glu])
            d_gate_FR, d_value_FR = d_hidden_ER.chunk(2)
            silu_FR = silu(gate_FR)
            d_activated_FR = torch.mm(w3.t(), d_KR)
            torch.mul(d_activated_FR, silu_FR, out=d_value_FR)
            aten.silu_backward.grad_input(d_activated_FR.mul_(value_FR), gate_FR, grad_input=d_gate_FR)
            if with_weights:
                d_w3, d_b3 = torch.mm(d_KR, silu_FR.mul_(value_FR).t()), d_KR.sum(1)
                d_w12, d_b12 = torch.mm(d_hidden_ER, inputs[glu].t()), d_hidden_ER.sum(1)
                d_glus[4 * glu : 4 * glu + 4] = d_w12, d_b12, d_w3, d_b3
            d_KR = torch.mm(w12.t(), d_hidden_ER)
        grad_RK = grad_RK.add_(d_KR.t())
    return [grad_RK, *d_glus, *d_norms]


def silu(x: Tensor) -> Tensor:
    """In fp32 on a CPU torch's own takes twice as long as a sigmoid and a product."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return torch.sigmoid(x).mul_(x)
    return cast(Tensor, aten.silu(x))


def _by_four(weights: Sequence[Tensor], first: int, count: int) -> list[Sequence[Tensor]]:
    return [weights[4 * index : 4 * index + 4] for index in range(first, first + count)]
