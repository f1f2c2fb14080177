"""Ellipsoids that hold every value a step can have: sums, affine maps, and LayerNorm.

An ellipsoid is {c + e : v.e <= sqrt(v.S v) for every v}, with a center c and a shape S >= 0. It is kept by S and not by axes,
so that each step is a few products of matrices of balls, and no step needs a decomposition to be right: what is chosen in
floats (directions, multipliers) changes how tight a result is and never whether it holds.

LayerNorm with an epsilon is a projection onto the unit sphere of one more dimension:

    z = sqrt(K) n without its last entry,  n = y / |y|,  y = (w - mean(w), sqrt(K epsilon))

and is enclosed in three steps, each exact but the last:

1. y runs over an ellipsoid, so the rays through it are a cone. What the cone cuts out of the plane {v : d.v = 1} is an
   ellipsoid again: with D = c c' - S its center is m = D d / (d.D d) and its shape m m' - D / (d.D d), as long as d.y > 0 on
   the whole set. d is (nearly) the eigenvector of D's only positive eigenvalue, the axis of the cone: m is then d itself.
2. A point d + v of that plane (v orthogonal to d) lands on the sphere at (d + v) / sqrt(1 + |v|^2): the part across d runs
   over the ellipsoid of shape T = Y (1 + Y)^-1, and the part along d is t = sqrt(1 - |across|^2), at least sqrt(1 - |T|).
3. For any k > 0 and b >= 0 the sum of the three constraints
       across.T^-1 across <= 1,   k (t - 1)(t - t_min) <= 0,   b (|across|^2 + t^2 - 1) = 0
   is an ellipsoid around the set. Small sets have b = 0; b > 0 follows the curvature of the sphere.

For a small set step 1 multiplies by LayerNorm's Jacobian, and what steps 2 and 3 add is of second order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from flint import arb, arb_mat

from pipeline.post.every_input.balls import (
    PRECISION_BITS,
    column,
    diagonal,
    identity,
    inner,
    largest_eigenvalue,
    magnitude,
    midpoints,
    root,
    rooted_squares,
)

POLISHES = 12  # steps of the power method after the eigenvector in fp64
CURVATURES = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
FLATNESSES = tuple(float(k) for k in np.logspace(-6, 3, 28))


class Ellipsoid(NamedTuple):
    """The set {center + e : v.e <= sqrt(v.shape v) for all v}: a column and a matrix of balls."""

    center: arb_mat
    shape: arb_mat

    def half_widths(self, directions: arb_mat | None = None) -> arb_mat:
        """A column: the largest |v.e| for each row v of `directions` (or of the identity), exact upper bounds."""
        if directions is None:
            return column([root(self.shape[i, i]) for i in range(self.shape.nrows())])
        size = self.shape.nrows()
        products, rows = (directions * self.shape).entries(), directions.entries()
        squares = [sum((products[i + j] * rows[i + j] for j in range(size)), arb(0)) for i in range(0, len(rows), size)]
        return column([root(square) for square in squares])

    def mapped(self, matrix: arb_mat, offset: arb_mat | None = None) -> Ellipsoid:
        """Its image under x -> matrix x + offset."""
        center = matrix * self.center
        return Ellipsoid(center if offset is None else center + offset, matrix * self.shape * matrix.transpose())

    def widened(self, shape: arb_mat) -> Ellipsoid:
        """Around the sums of its points and those of {e} with that shape, for any weight: here the least trace."""
        own, other = self.shape.trace().upper(), shape.trace().upper()
        if not other > 0:
            return self if other <= 0 else Ellipsoid(self.center, self.shape + shape)
        if not own > 0:
            return Ellipsoid(self.center, shape) if own <= 0 else Ellipsoid(self.center, self.shape + shape)
        weight = (other / own).sqrt().mid()
        return Ellipsoid(self.center, self.shape * (1 + weight) + shape * (1 + 1 / weight))

    def with_box(self, half_widths: arb_mat) -> Ellipsoid:
        """Around the sums of its points and those of a box: the box lies in an ellipsoid of axes sqrt(h_i sum(h))."""
        widths = [magnitude(width) for width in half_widths.entries()]
        total = sum(widths, arb(0))
        return self.widened(diagonal([width * total for width in widths]))


def row_ball(size: int) -> Ellipsoid:
    """Every row after LayerNorm, before its affine: mean 0, norm <= sqrt(K)."""
    return Ellipsoid(column([0.0] * size), centering(size) * size)


def centering(size: int) -> arb_mat:
    """The projection onto mean 0."""
    return identity(size) - arb_mat(size, size, [arb(1) / size] * size**2)


def normalized(w: Ellipsoid, epsilon: float, cost: np.ndarray) -> Ellipsoid | None:
    """z of LayerNorm for all w of an ellipsoid (mean 0); None when nothing can be said.

    `cost` [*,K]: a small norm of cost z is wanted, which decides between ellipsoids that all hold.
    """
    size = w.shape.nrows()
    lift = (arb(size) * arb(epsilon)).sqrt()
    y = Ellipsoid(column([*w.center.entries(), lift]), _bordered(w.shape))
    cut = _cut(y)
    if cut is None:
        return None
    try:
        n = _on_sphere(*cut, cost)
    except ZeroDivisionError:  # balls too wide to divide by
        return None
    return Ellipsoid(column(n.center.entries()[:size]), _cropped(n.shape)).mapped(identity(size) * arb(size).sqrt())


def _bordered(shape: arb_mat) -> arb_mat:
    size = shape.nrows()
    out = arb_mat(size + 1, size + 1)
    for i in range(size):
        for j in range(size):
            out[i, j] = shape[i, j]
    return out


def _cropped(shape: arb_mat) -> arb_mat:
    size = shape.nrows() - 1
    return arb_mat([row[:size] for row in shape.tolist()[:size]])


def _cut(y: Ellipsoid) -> tuple[arb_mat, arb_mat] | None:
    """Step 1: the axis d, of norm 1, and the shape of the cut of the plane d.v = 1, around d."""
    cone = y.center * y.center.transpose() - y.shape
    spread = y.shape.trace().mid()
    scale = inner(y.center, y.center) + spread
    floats = np.array(midpoints(cone / scale.mid()))
    if not np.isfinite(floats).all():
        return None
    _, vectors = np.linalg.eigh(floats)
    axis = column([float(entry) for entry in vectors[:, -1]])
    for _ in range(POLISHES):  # any axis would do; a good one saves the widening below
        axis = cone * axis + axis * spread
        axis = axis / inner(axis, axis).sqrt()
        axis = axis.mid()
    axis = axis / inner(axis, axis).sqrt()
    if inner(axis, y.center) < 0:
        axis = -axis
    inside = inner(axis, cone * axis)
    if not (inside > 0 and inner(axis, y.center) > 0):
        return None  # the plane through the origin across the axis meets the set
    middle = cone * axis / inside
    cut = Ellipsoid(middle, middle * middle.transpose() - cone / inside)
    off = rooted_squares(middle - axis)
    return axis, cut.widened(identity(axis.nrows()) * (off * off)).shape


def _on_sphere(axis: arb_mat, cut: arb_mat, cost: np.ndarray) -> Ellipsoid:
    """Steps 2 and 3: around (d + v) / |d + v| for all v of the cut."""
    one = identity(axis.nrows())
    across = (one + cut).solve(cut)
    longest = largest_eigenvalue(across)
    least = (1 - longest).lower()
    least = least.sqrt().lower() if least > 0 else arb(0)  # the least t
    half = ((1 - least) / 2).upper() + arb(2) ** -PRECISION_BITS  # a point has a size too
    flat, curved = _multipliers(axis, across, float(longest), float(half), cost)
    k, b = arb(flat) / (half * half), arb(curved) / longest if curved else arb(0)
    if curved:
        across = (one + across * b).solve(across)
    middle = k * (1 + least) / (2 * (k + b))
    size = 1 + b + (k + b) * middle * middle - k * least
    return Ellipsoid(axis * middle, (across + axis * axis.transpose() / (k + b)) * size)


def _multipliers(axis: arb_mat, across: arb_mat, longest: float, half: float, cost: np.ndarray) -> tuple[float, float]:
    """k half^2 and b |T| of step 3, by their cost in floats."""
    axis_K = np.array(midpoints(axis))[:, 0]
    floats = np.array(midpoints(across))
    if not np.isfinite(floats).all():
        return 1.0, 0.0
    values, vectors = np.linalg.eigh(floats)
    values = values.clip(min=0.0)
    weights = ((cost @ vectors[: cost.shape[1]]) ** 2).sum(0)
    along = float(((cost @ axis_K[: cost.shape[1]]) ** 2).sum())
    base = float(values @ weights)
    if base <= 0 or along <= 0 or half <= 0 or longest <= 0:
        return 1.0, 0.0
    least = 1 - 2 * half
    best = ((half * (along / base) ** 0.5) or 1e-300, 0.0)
    lowest = (1 + best[0]) * (base + half**2 * along / best[0])
    if longest < 1e-4:
        return best
    for curved in CURVATURES:
        b = curved / longest
        bent = float((values / (1 + b * values)) @ weights)
        for flat in FLATNESSES:
            k = flat / half**2
            middle = k * (1 + least) / (2 * (k + b))
            size = 1 + b + (k + b) * middle**2 - k * least
            if 0 < (now := size * (bent + along / (k + b))) < lowest:
                best, lowest = (flat, curved), now
    return best
