"""Rows of A: every row that a layer's metric learner can give, as one ellipsoid.

A unit is LN(x + GLU_n(…GLU_1(x))), or LN(x) where it has no GLUs. Its GLUs are enclosed by their tangent at the set's center
and what is left:

    GLU(c + e) = value + slope e + r,  |r_i| <= rest_i,

with |silu''| <= 1/2 and |silu'| <= 11/8 everywhere, so that a gate that opens anywhere on the set is in `rest`. The slope is
added to the identity of the residual connection, before LayerNorm: where a GLU cancels it, it is so here.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
from flint import arb, arb_mat
from torch import nn

from pipeline.post.every_input.balls import (
    column,
    diagonal,
    each,
    exact,
    identity,
    inner,
    magnitude,
    product,
    root,
    rounded_up,
    scale_rows,
)
from pipeline.post.every_input.ellipsoid import Ellipsoid, centering, normalized, row_ball
from pldr_model.layers import GLU
from pldr_model.metric_learner import ResidualUnit
from pldr_model.plga import PLGA

SILU_SLOPE = arb(11) / 8  # sigma + x sigma' <= 1 + 1/e
SILU_BEND = arb(1) / 2  # sigma' (2 - x tanh(x/2)) is within -1/4 … 1/2


class Reach(NamedTuple):
    """The rows of A, and how wide the set was after each unit, relative to what the next LayerNorm divides by (None: all
    rows that a LayerNorm can give)."""

    rows: Ellipsoid
    by_unit: list[float | None]


class Tangent(NamedTuple):
    """A function on an ellipsoid {c + e}: within `value + slope e ± rest`. Columns [n,1], and slope [n,K]."""

    value: arb_mat
    slope: arb_mat
    rest: arb_mat

    def linear(self, weight: arb_mat, bias: arb_mat) -> Tangent:
        rest = each(magnitude, weight) * self.rest
        return Tangent(weight * self.value + bias, weight * self.slope, rest)


def learned_rows(plga: PLGA) -> Reach:
    """Push the ball of all normalized density rows through the metric learner."""
    norm: nn.LayerNorm = plga.density_norm
    z = row_ball(norm.normalized_shape[0])
    by_unit: list[float | None] = []
    for module in plga.metric_learner:
        unit = cast(ResidualUnit, module)
        z, bounded = _through_unit(unit, z.mapped(diagonal(exact(norm.weight).entries()), exact(norm.bias)))
        norm = unit.norm
        by_unit.append(_relative_radius(z, norm) if bounded else None)
    return Reach(z.mapped(diagonal(exact(norm.weight).entries()), exact(norm.bias)), by_unit)


def _through_unit(unit: ResidualUnit, x: Ellipsoid) -> tuple[Ellipsoid, bool]:
    """z of the unit's LayerNorm, before its affine; and whether that is less than every z there is."""
    size = x.shape.nrows()
    w = (_through_glus(unit, x) if len(unit.glus) else x).mapped(centering(size))
    gamma = unit.norm.weight.detach().double().numpy()
    z = normalized(w, unit.norm.eps, np.diag(gamma) - gamma / size)
    everything = row_ball(size)
    if z is None or not z.shape.trace() < everything.shape.trace():
        return everything, False
    return z, True


def _through_glus(unit: ResidualUnit, x: Ellipsoid) -> Ellipsoid:
    """x + GLU_n(…GLU_1(x))."""
    one = identity(x.shape.nrows())
    glus = Tangent(x.center, one, column([0.0] * x.shape.nrows()))
    for module in unit.glus:
        glus = glu_tangent(cast(GLU, module), glus, x)
    w = x.mapped(one + glus.slope, glus.value - glus.slope * x.center)
    return w.with_box(glus.rest)


def glu_tangent(glu: GLU, x: Tangent, domain: Ellipsoid) -> Tangent:
    w12, b12 = glu.w12.weight.chunk(2), glu.w12.bias.chunk(2)
    gate, value = (x.linear(exact(w), exact(b)) for w, b in zip(w12, b12, strict=True))
    gate_span, value_span = (domain.half_widths(part.slope) for part in (gate, value))
    gate_reach, value_reach = gate_span + gate.rest, value_span + value.rest
    opened, steepness = each(_silu, gate.value), each(_silu_slope, gate.value)
    opened_rest = each(_silu_rest, steepness, gate_reach, gate.rest)
    opened_reach = each(_times_magnitude, gate_span, steepness) + opened_rest
    rest = (
        each(_times_magnitude, value.rest, opened)
        + each(_times_magnitude, opened_rest, value.value)
        + each(product, opened_reach, value_reach)
    )
    slope = scale_rows(opened, value.slope) + scale_rows(each(product, value.value, steepness), gate.slope)
    gated = Tangent(each(product, opened, value.value), slope, rest)
    return gated.linear(exact(glu.w3.weight), exact(glu.w3.bias))


def _silu(x: arb) -> arb:
    return x * sigmoid(x)


def _silu_slope(x: arb) -> arb:
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


def _silu_rest(slope: arb, reach: arb, rest: arb) -> arb:
    """How far silu(g + slope-part + rest-part) is from its tangent along the slope part: bend or steepness, and the rest."""
    bend, steep = reach * reach * SILU_BEND / 2, (SILU_SLOPE + magnitude(slope)) * reach
    return magnitude(bend if bend < steep else steep) + magnitude(slope) * rest


def sigmoid(x: arb) -> arb:
    return 1 / (1 + (-x).exp())


def _times_magnitude(x: arb, y: arb) -> arb:
    return x * magnitude(y)


def _relative_radius(z: Ellipsoid, norm: nn.LayerNorm) -> float:
    size = z.shape.nrows()
    x = z.mapped(centering(size) * diagonal(exact(norm.weight).entries()), centering(size) * exact(norm.bias))
    return rounded_up(root(x.shape.trace()) / (inner(x.center, x.center) + arb(size) * arb(norm.eps)).sqrt())
