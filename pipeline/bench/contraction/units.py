"""How much of a difference between two inputs each residual unit of a metric learner lets through, from its weights.

A unit is `x <- gamma LN(s) + beta` with `s = x + GLUs(x)`. With n = (s - mean s) / sigma and sigma^2 = var(s) + eps,

    d LN(s) / ds = (I - 1 1^T/K - n n^T/K) / sigma

so a difference ds of no particular direction leaves the norm, as its RMS, multiplied by

    contraction = sqrt(mean_i gamma_i^2 (1 - 1/K - n_i^2/K)) / sigma

(RMS gamma / sigma, without the gammas of coordinates that n itself points along). A sigma as large as gamma contracts nothing:
iterated LayerNorms forget only where something else than `gamma n` is in s. That is beta of the unit before, the last bias of
this unit's GLUs, and a coordinate that dominates n.

The exact derivative is autograd's, of GLUs and norm, and its product over units. Differences follow it while they are small.

Shapes: R rows of the input that the others are compared with, P other inputs, K row length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from pldr_model.metric_learner import MetricLearner, ResidualUnit


@dataclass(frozen=True)
class Unit:
    """One residual unit at the rows that reach it; RMS over rows where they differ.

    input_std: of the residual input; glu_std: of what the GLUs add to it (a bias counts); contraction: by the formula above.
    """

    gamma_rms: float
    beta_std: float
    input_std: float
    glu_std: float
    contraction: float


@dataclass(frozen=True)
class Prediction:
    """Relative deviation of A, RMS(A_p - A_0) / RMS(A_0), over P inputs and all rows: by the product of the units' formulas and
    by that of the exact Jacobians, at the rows of input 0; and what it is (fp64). size: RMS(A_0)."""

    units: list[Unit]
    formula: float
    jacobian: float
    fp64: float
    size: float


@torch.no_grad()
def contraction(unit: ResidualUnit, rows_RK: Tensor) -> Unit:
    """The numbers of one unit at these inputs."""
    gamma, K = unit.norm.weight, rows_RK.shape[-1]
    added_RK = unit.glus(rows_RK) if len(unit.glus) else torch.zeros_like(rows_RK)
    sums_RK = rows_RK + added_RK
    variance_R1 = sums_RK.var(-1, correction=0, keepdim=True) + unit.norm.eps
    n_RK = (sums_RK - sums_RK.mean(-1, keepdim=True)) / variance_R1.sqrt()
    below_R1 = 2 - n_RK.square().mean(-1, keepdim=True)  # 1, were eps 0
    kept_RK = gamma**2 * (1 - 1 / K - below_R1 * n_RK**2 / K) / variance_R1
    return Unit(
        gamma_rms=_rms(gamma),
        beta_std=float(unit.norm.bias.std(correction=0)),
        input_std=_rms(rows_RK - rows_RK.mean(-1, keepdim=True)),
        glu_std=_rms(added_RK - added_RK.mean(-1, keepdim=True)),
        contraction=math.sqrt(float(kept_RK.mean())),
    )


@torch.enable_grad()
def jacobians(unit: ResidualUnit, rows_RK: Tensor) -> Tensor:
    """The unit's derivative at each row, by autograd [R,K,K]: output, then input. Rows do not depend on one another, so one
    backward pass is of one output of all rows."""
    rows_RK = rows_RK.detach().requires_grad_()
    out_KR = unit(rows_RK).t()
    one_R = torch.ones_like(out_KR[0])
    return torch.stack([torch.autograd.grad(out_R, rows_RK, one_R, retain_graph=True)[0] for out_R in out_KR], 1)


def predict(learner: MetricLearner, rows_RK: Tensor, others_PRK: Tensor) -> Prediction:
    """What the weights say of A's deviation over inputs. rows, others: density matrices (after their norm) of input 0 and of
    P others, a learner's rows one below the other. In fp64, where products of small numbers do not vanish."""
    rows_RK, others_PRK = rows_RK.double(), others_PRK.double()
    differences_PRK = others_PRK - rows_RK
    formula, units = _rms(differences_PRK), []
    for unit in cast(Iterable[ResidualUnit], learner.double()):
        units.append(contraction(unit, rows_RK))
        formula *= units[-1].contraction
        differences_PRK = torch.einsum("roi,pri->pro", jacobians(unit, rows_RK), differences_PRK)
        with torch.no_grad():
            rows_RK, others_PRK = unit(rows_RK), unit(others_PRK)
    size = _rms(rows_RK)
    return Prediction(units, formula / size, _rms(differences_PRK) / size, _rms(others_PRK - rows_RK) / size, size)


def _rms(values: Tensor) -> float:
    return float(values.detach().square().mean().sqrt())
