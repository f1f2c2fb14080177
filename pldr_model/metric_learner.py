"""The metric learner: residual units of small GLUs on rows of length K, `x <- LN(x + GLU_n(…GLU_1(x)))`.

Decision (speed): at small sizes launching these products costs more than computing them. While training, a metric learner is
one autograd function instead of a node for each operation. Its forward pass is the modules', bit for bit, and keeps only what
the GLUs and the norms read. Its backward pass computes the slopes of the gates of several units at once, runs three operations
for each GLU, and multiplies out the weights' gradients together. In fp64 they agree with the modules' to 1e-12
(tests/pldr_model/test_metric_learner.py). Without gradients and under autocast the modules run as they are.

Shapes: R rows, K their length, F hidden size of a GLU, E = 2F, G GLUs, N units. What is hidden has the rows in its columns, so that
gates and values are contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pldr_model.config import ModelConfig
from pldr_model.layers import GLU

aten = torch.ops.aten
AT_ONCE = 2**18  # numbers of gates and values whose gradients are computed together: what fits a core's cache


class ResidualUnit(nn.Module):
    """`LN(x + GLU_n(…GLU_1(x)))` on rows of length K."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.glus = nn.Sequential(*(GLU(config.head_dim, config.A_dff) for _ in range(config.num_denseA)))
        self.norm = nn.LayerNorm(config.head_dim, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self.glus(x))
        return out


class MetricLearner(nn.Sequential):
    """The residual units one after the other: [...,K] -> [...,K]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(*(ResidualUnit(config) for _ in range(config.num_reslayerA)))
        self.eps, self.num_glus = config.layer_norm_eps, config.num_reslayerA * config.num_denseA

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return cast(Tensor, super().forward(x))
        rows_RK = x.reshape(-1, x.shape[-1])
        out_RK: Tensor = _Learn.apply(rows_RK, self.eps, self.num_glus, *self.weights())  # type: ignore[no-untyped-call]
        return out_RK.view(x.shape)

    def weights(self) -> list[Tensor]:
        """w12, b12, w3, b3 of every GLU, then gamma, beta of every unit. (Read past nn.Module's attributes, which are slow.)"""
        units = [unit._modules for unit in self._modules.values()]
        glus = [glu._modules for unit in units for glu in unit["glus"]._modules.values()]
        owners = [glu[name]._parameters for glu in glus for name in ("w12", "w3")]
        owners += [unit["norm"]._parameters for unit in units]
        return [owner[name] for owner in owners for name in ("weight", "bias")]


class _Learn(torch.autograd.Function):
    """Saves the weights, never views of them: ZeRO-3 takes their data away between the passes."""

    @staticmethod
    def forward(ctx: Any, rows_RK: Tensor, eps: float, num_glus: int, *weights: Tensor) -> Tensor:
        out_RK, *kept = learn(rows_RK, weights[: 4 * num_glus], weights[4 * num_glus :], eps)
        ctx.save_for_backward(*kept, *weights)
        ctx.eps, ctx.num_glus = eps, num_glus
        return out_RK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RK: Tensor) -> tuple[Tensor | None, ...]:
        G, saved = ctx.num_glus, ctx.saved_tensors
        N = (len(saved) - 6 * G) // 3
        inputs, hidden, sums, weights = saved[:G], saved[G : 2 * G], saved[2 * G : 2 * G + N], saved[2 * G + N :]
        with_weights = any(ctx.needs_input_grad[3:])
        glus, norms = weights[: 4 * G], weights[4 * G :]
        grads = learn_backward(grad_RK, inputs, hidden, sums, glus, norms, ctx.eps, with_weights)
        return grads[0], None, None, *grads[1:]


def learn(rows_RK: Tensor, glus: Sequence[Tensor], norms: Sequence[Tensor], eps: float) -> list[Tensor]:
    """The units' result [R,K]; then what each GLU reads [R,K], its gates above its values [E,R], and what each norm reads [R,K]."""
    N, per_unit = len(norms) // 2, len(glus) // (2 * len(norms))
    inputs, hidden, sums = [], [], []
    x_RK, index = rows_RK, 0
    for unit in range(N):
        y_RK = x_RK
        for _ in range(per_unit):
            w12, b12, w3, b3 = glus[index : index + 4]
            inputs.append(y_RK)
            hidden.append(torch.addmm(b12.unsqueeze(1), w12, y_RK.t()))
            gate_FR, value_FR = hidden[-1].chunk(2)
            y_RK = torch.addmm(b3, aten.silu(gate_FR).mul_(value_FR).t(), w3.t())
            index += 4
        sums.append(y_RK.add_(x_RK))
        x_RK = torch.native_layer_norm(y_RK, [y_RK.shape[1]], norms[2 * unit], norms[2 * unit + 1], eps)[0]
    return [x_RK, *inputs, *hidden, *sums]


def learn_backward(
    grad_RK: Tensor,
    inputs: Sequence[Tensor],
    hidden: Sequence[Tensor],
    sums: Sequence[Tensor],
    glus: Sequence[Tensor],
    norms: Sequence[Tensor],
    eps: float,
    with_weights: bool,
) -> list[Tensor | None]:
    """Gradients of the rows, then of w12, b12, w3, b3 of every GLU and gamma, beta of every unit (None unless `with_weights`)."""
    N, per_unit = len(sums), len(hidden) // len(sums)
    at_once = max(1, min(N, AT_ONCE // (per_unit * hidden[0].numel())))
    d_glus: list[Tensor | None] = [None] * len(glus)
    d_norms: list[Tensor | None] = [None] * len(norms)
    mask = [True, with_weights, with_weights]
    for end in range(N, 0, -at_once):
        units = range(max(0, end - at_once), end)
        start, stop = units[0] * per_unit, end * per_unit
        slopes_G2FR, activated_GFR = _slopes(torch.stack(list(hidden[start:stop])), with_weights)
        slopes = slopes_G2FR.unbind()
        d_out: list[Tensor] = []
        for unit in reversed(units):
            gamma, beta = norms[2 * unit : 2 * unit + 2]
            mean, rstd = torch.native_layer_norm(sums[unit], gamma.shape, None, None, eps)[1:]
            d_sum_RK, d_norms[2 * unit], d_norms[2 * unit + 1] = aten.native_layer_norm_backward(
                grad_RK, sums[unit], gamma.shape, mean, rstd, gamma, beta, mask
            )
            grad_RK = d_sum_RK
            for glu in range((unit + 1) * per_unit - 1, unit * per_unit - 1, -1):
                w12, _, w3, _ = glus[4 * glu : 4 * glu + 4]
                d_out.append(grad_RK)
                d_hidden_RE = slopes[glu - start].mul_(torch.mm(w3.t(), grad_RK.t())).flatten(0, 1).t()
                through_residual = glu == unit * per_unit
                grad_RK = torch.addmm(d_sum_RK, d_hidden_RE, w12) if through_residual else torch.mm(d_hidden_RE, w12)
        if activated_GFR is not None:
            d_hidden_GER, d_out_GRK = slopes_G2FR.flatten(1, 2), torch.stack(d_out[::-1])
            d_w12 = torch.bmm(d_hidden_GER, torch.stack(list(inputs[start:stop])))
            d_w3 = torch.bmm(d_out_GRK.mT, activated_GFR.mT)
            each = zip(d_w12.unbind(), d_hidden_GER.sum(2).unbind(), d_w3.unbind(), d_out_GRK.sum(1).unbind(), strict=True)
            d_glus[4 * start : 4 * stop] = [d for ds in each for d in ds]
    return [grad_RK, *d_glus, *d_norms]


def _slopes(hidden_GER: Tensor, with_activated: bool) -> tuple[Tensor, Tensor | None]:
    """Of silu(gate) * value: by gate and by value [G,2,F,R], and itself [G,F,R]."""
    gate_GFR, value_GFR = hidden_GER.chunk(2, dim=1)
    slopes_G2FR = torch.empty_like(hidden_GER).unflatten(1, (2, -1))
    by_gate, by_value = slopes_G2FR.unbind(1)
    aten.silu.out(gate_GFR, out=by_value)
    aten.silu_backward.grad_input(value_GFR, gate_GFR, grad_input=by_gate)
    return slopes_G2FR, by_value * value_GFR if with_activated else None
