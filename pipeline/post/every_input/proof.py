"""An upper bound for every input: how far G_LM of any head can be from the cached one, whatever the tokens and their number.

All inputs of any length give the metric learner rows of one ball (rows.py says why), and `learned_rows` encloses
what it makes of them. The rest of the way to G, A -> u = W A + b -> p = (u silu(u) + 1e-9)^P -> a p + b_a, is enclosed
entry by entry around the set's center. The K rows of A are free of one another here.

Every number is a ball of Arb, rounded outward, from the exact fp32 weights. So the bound holds in exact arithmetic; what
fp32 rounds off is measured elsewhere. The cached G is fp32 and part of the bound: it contains how well G was rounded.

Errors: none. A set that does not close gives a bound that is infinite, or large.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Context
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from flint import arb, arb_mat
from torch import Tensor, nn

from pipeline.post.every_input.balls import (
    PRECISION_BITS,
    column,
    each,
    exact,
    inner,
    largest_eigenvalue,
    magnitude,
    midpoints,
    precision,
    product,
    root,
    rooted_squares,
    rounded_up,
    scale_rows,
)
from pipeline.post.every_input.ellipsoid import Ellipsoid
from pipeline.post.every_input.learner import learned_rows, sigmoid
from pldr_model.layers import rope_magnitude
from pldr_model.model import Attention, DecoderLayer, PLDRModel
from pldr_model.plga import METRIC_FLOOR, PLGA

WRITTEN = Context(prec=9, rounding=ROUND_CEILING)


class Head(NamedTuple):
    """The weights of one head's power law, [K,K] each, exact."""

    W: arb_mat
    b: arb_mat
    P: arb_mat
    a: arb_mat
    b_a: arb_mat


def prove(model: PLDRModel, g_LHKK: Tensor) -> dict[str, Any]:
    """The certificate's `proof` of a model with a learned G, against the cached one; {} if G is a constant by construction."""
    if model.config.g_source != "learned":
        return {}
    if not all(bool(weight.isfinite().all()) for weight in [*model.parameters(), g_LHKK]):
        return _not_closed(model, "a weight or the cached G is not finite")
    per_head: list[list[float]] = []
    by_unit: list[list[float | None]] = []
    scores: list[float] = []
    with precision(PRECISION_BITS), torch.no_grad():
        entering: nn.LayerNorm = model.embedding_norm
        for layer, g_HKK in zip(model.layers, g_LHKK, strict=True):
            layer = cast(DecoderLayer, layer)
            rows, radii = learned_rows(cast(PLGA, layer.attention.plga))
            deviations = [_deviation(head, rows, g_KK) for head, g_KK in zip(_heads(layer), g_HKK, strict=True)]
            per_head.append([_relative(far, g_KK) for far, g_KK in zip(deviations, g_HKK, strict=True)])
            by_unit.append([None if radius is None else _number(radius) for radius in radii])
            scores.append(_score_bound(layer.attention, entering, deviations, magnitude=rope_magnitude(model.config)))
            entering = layer.feed_forward_norm
    worst = max(max(heads) for heads in per_head)
    return {
        "bound": _number(worst),
        "per_head": [[_number(head) for head in heads] for heads in per_head],
        "closed": math.isfinite(worst),
        "by_unit": by_unit,
        "score_bound": [_number(score) for score in scores],
        "precision_bits": PRECISION_BITS,
        "reason": None if math.isfinite(worst) else _reason(per_head, by_unit),
    }


def _not_closed(model: PLDRModel, reason: str) -> dict[str, Any]:
    config = model.config
    return {
        "bound": None,
        "per_head": [[None] * config.num_heads] * config.num_layers,
        "closed": False,
        "by_unit": [[None] * config.num_reslayerA] * config.num_layers,
        "score_bound": [None] * config.num_layers,
        "precision_bits": PRECISION_BITS,
        "reason": reason,
    }


def _heads(layer: DecoderLayer) -> list[Head]:
    plga = cast(PLGA, layer.attention.plga)
    stacks = (plga.W, plga.b, plga.P, plga.a, plga.b_a)
    return [Head(*map(exact, weights)) for weights in zip(*stacks, strict=True)]


def _deviation(head: Head, rows: Ellipsoid, g_KK: Tensor) -> arb:
    """An upper bound of |G - cached G| (Frobenius) over all K rows of A in the ellipsoid, the smaller of two.

    p(u) - p(u_0) = p'(u_0) du + r with du = W dA, and |r| <= |p' - p'(u_0)| |du| over the range of u.
    Entry by entry: |dG_ij| <= sum_k |a_ik| |dp_kj|, and |dp_kj| <= |p'_kj| |du_kj| or the range of p, whichever is less.
    Or the linear part as a whole (`_linear_part`), and r entry by entry.
    """
    ones = column([1.0] * g_KK.shape[0])
    u = head.W * ones * rows.center.transpose() + head.b
    du = each(magnitude, head.W) * ones * rows.half_widths().transpose()
    u_all = each(_spread, u, du)
    p = each(_metric_power, u, head.P)
    slope, slope_all = each(_potential_slope, u, head.P), each(_potential_slope, u_all, head.P)
    a = each(magnitude, head.a)
    dp = each(_least, each(_reach, slope_all, du), each(magnitude, each(_metric_power, u_all, head.P) - p))
    as_a_whole = _linear_part(head, slope, rows.shape) + rooted_squares(a * each(_reach, slope_all - slope, du))
    center = rooted_squares(head.a * p + head.b_a - exact(g_KK))
    return magnitude(center + _least(as_a_whole, rooted_squares(a * dp)))


def _linear_part(head: Head, slope: arb_mat, shape: arb_mat) -> arb:
    """An upper bound of |a (p' * W dA)| (* entry by entry) for K rows of dA of one ellipsoid.

    Of its longest axis l the rows take multiples x_m l, |x| <= sqrt(K): |a (p' * W x l')|^2 = x' N x with
    N = W' (a'a * p' diag(l^2) p'') W. The rest has the shape S - l l' >= 0 for l = S v / sqrt(v.S v), any v. There column j
    of dG is a diag(p'_j) W dA_j, at most t_j |dA_j| with the Frobenius norm t_j, and all columns together are at most K times
    the largest eigenvalue of the shape with its entries times t_i t_j.
    """
    size = shape.nrows()
    gram_a, gram_W = head.a.transpose() * head.a, head.W * head.W.transpose()
    squares = slope.transpose() * each(product, gram_a, gram_W) * slope
    stretch = column([root(squares[j, j]) for j in range(size)])
    axis = _longest_axis(shape, stretch)
    weighted = scale_rows(each(product, axis, axis), slope.transpose())
    form = head.W.transpose() * each(product, gram_a, slope * weighted) * head.W
    rest = scale_rows(stretch, scale_rows(stretch, shape - axis * axis.transpose()).transpose())
    return magnitude(root(largest_eigenvalue(form) * size) + root(largest_eigenvalue(rest) * size))


def _longest_axis(shape: arb_mat, stretch: arb_mat) -> arb_mat:
    """S v / sqrt(v.S v), v near the top eigenvector of the stretched shape; 0 where that is not to be had."""
    stretched = scale_rows(stretch, scale_rows(stretch, shape).transpose())
    floats = np.array(midpoints(stretched / stretched.trace().mid()))
    if np.isfinite(floats).all():
        v = scale_rows(stretch, column(np.linalg.eigh(floats)[1][:, -1].tolist()))
        length = inner(v, shape * v)
        if length > 0:
            return shape * v / length.sqrt()
    return column([0.0] * shape.nrows())


def _spread(center: arb, radius: arb) -> arb:
    return (center - radius).union(center + radius)


def _reach(slope: arb, radius: arb) -> arb:
    return magnitude(slope) * radius


def _least(x: arb, y: arb) -> arb:
    """The smaller one, of those that are numbers."""
    return x if x < y or not y.is_finite() else y


def _sigmoid(x: arb) -> arb:
    """On a wide ball too: sigma rises."""
    return sigmoid(x) if x.is_exact() else sigmoid(x.lower()).union(sigmoid(x.upper()))


def _metric_power(u: arb, exponent: arb) -> arb:
    """A_LM of u to a power; A_LM is at least METRIC_FLOOR, also where the ball of u crosses zero."""
    value, floor = u * u * _sigmoid(u) + METRIC_FLOOR, arb(METRIC_FLOOR)
    low, high = value.lower(), value.upper()
    low = low if low > floor else floor
    return low**exponent if low == high else (low**exponent).union(high**exponent)


def _potential_slope(u: arb, P: arb) -> arb:
    s = _sigmoid(u)
    return P * _metric_power(u, P - 1) * u * s * (2 + u * (1 - s))


def _relative(deviation: arb, g_KK: Tensor) -> float:
    """As the certificate measures it: RMS of the deviation over RMS of the head's cached G."""
    size = exact(g_KK)
    norm = sum((entry * entry for entry in size.entries()), arb(0)).sqrt()
    return rounded_up(deviation / norm) if norm > 0 else math.inf


def _score_bound(attention: Attention, entering: nn.LayerNorm, deviations: list[arb], *, magnitude: float) -> float:
    """How far an attention score of the layer can be from the one with the cached G, for the same input of the layer.

    The input is a LayerNorm's output, |dG|_2 <= |dG|_F, and RoPE multiplies norms by `magnitude` (1 but for yarn):
    |q dG k| / sqrt(K) <= |q| |dG|_F |k| / sqrt(K).
    """
    H, K = attention.num_heads, attention.head_dim
    queries, keys, _ = attention.qkv.weight.view(3, H, K, -1)
    query_biases, key_biases, _ = attention.qkv.bias.view(3, H, K)
    scores = []
    for h, deviation in enumerate(deviations):
        longest_q = _longest(exact(queries[h]), exact(query_biases[h]), entering)
        longest_k = _longest(exact(keys[h]), exact(key_biases[h]), entering)
        scores.append(rounded_up(longest_q * longest_k * arb(magnitude) ** 2 * deviation / arb(K).sqrt()))
    return max(scores)


def _longest(weight_KD: arb_mat, bias_K: arb_mat, norm: nn.LayerNorm) -> arb:
    """An upper bound of |W x + b| over the outputs x = gamma z + beta of a LayerNorm, |z| <= sqrt(D)."""
    gamma, beta = exact(norm.weight), exact(norm.bias)
    middle = weight_KD * beta + bias_K
    scaled = scale_rows(gamma, weight_KD.transpose())
    spread = largest_eigenvalue(scaled.transpose() * scaled) * gamma.nrows()
    return magnitude(root(inner(middle, middle)) + root(spread))


def _number(value: float) -> float | None:
    """As a certificate writes it, with nine digits, but rounded up; None for infinity."""
    return float(WRITTEN.create_decimal_from_float(value)) if math.isfinite(value) else None


def _reason(per_head: list[list[float]], by_unit: list[list[float | None]]) -> str:
    layer, heads = next((i, heads) for i, heads in enumerate(per_head) if not all(map(math.isfinite, heads)))
    unbounded = sum(radius is None for radius in by_unit[layer])
    head = next(h for h, bound in enumerate(heads) if not math.isfinite(bound))
    return (
        f"layer {layer}, head {head}: no bound (its cached G is zero, or the power law overflows); "
        f"{unbounded} of {len(by_unit[layer])} residual units still give every row"
    )
