"""Arithmetic that rounds outward: matrices and vectors of Arb's balls (python-flint).

A ball is a number and a radius, and holds the true value. Comparisons are true only if they hold for every value of the balls.
A vector is a matrix of one column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import flint
from flint import arb, arb_mat
from torch import Tensor

PRECISION_BITS = 256  # sets shrink to 1e-30 of the numbers beside them, squares to 1e-60


@contextmanager
def precision(bits: int) -> Iterator[None]:
    """Arb's working precision, which is the interpreter's, put back afterwards."""
    before, flint.ctx.prec = flint.ctx.prec, bits
    try:
        yield
    finally:
        flint.ctx.prec = before


def exact(values: Tensor) -> arb_mat:
    """A matrix, or a vector as a column, without rounding."""
    rows = values.detach().double().cpu()
    return arb_mat((rows.unsqueeze(1) if rows.ndim == 1 else rows).tolist())


def column(values: Sequence[arb | float]) -> arb_mat:
    return arb_mat(len(values), 1, values)


def diagonal(values: Sequence[arb | float]) -> arb_mat:
    size = len(values)
    out = arb_mat(size, size)
    for i, value in enumerate(values):
        out[i, i] = value
    return out


def identity(size: int) -> arb_mat:
    return diagonal([1.0] * size)


def each(function: Callable[..., arb], *matrices: arb_mat) -> arb_mat:
    """A function of the entries of matrices of one shape."""
    first = matrices[0]
    return arb_mat(first.nrows(), first.ncols(), list(map(function, *(m.entries() for m in matrices))))


def scale_rows(values: arb_mat, matrix: arb_mat) -> arb_mat:
    """diag(values) matrix."""
    columns = matrix.ncols()
    factors = [value for value in values.entries() for _ in range(columns)]
    return arb_mat(matrix.nrows(), columns, [f * entry for f, entry in zip(factors, matrix.entries(), strict=True)])


def magnitude(value: arb) -> arb:
    """The largest |value|, exact."""
    return value.abs_upper()


def product(first: arb, second: arb) -> arb:
    return first * second


def root(value: arb) -> arb:
    """An upper bound of the square root of a number that is known to be >= 0, whatever its ball says; exact."""
    top = value.upper()
    return top.sqrt().upper() if top > 0 else (arb(0) if top <= 0 else top)


def rooted_squares(values: arb_mat) -> arb:
    """An upper bound of the norm (Frobenius) of a matrix, exact."""
    return root(sum((value * value for value in values.entries()), arb(0)))


def inner(first: arb_mat, second: arb_mat) -> arb:
    """The scalar product of two columns."""
    return (first.transpose() * second)[0, 0]


def largest_eigenvalue(shape: arb_mat, squarings: int = 6) -> arb:
    """An upper bound for a positive semidefinite matrix: the n-th root of the trace of its n-th power; exact."""
    total = shape.trace().upper()
    if not total > 0:
        return magnitude(total)
    power = shape / total
    for _ in range(squarings):
        power = power * power
    ratio = power.trace().upper()
    for _ in range(squarings):
        ratio = root(ratio)
    bound = (total * ratio).upper()
    return bound if bound < total else total


def rounded_up(value: arb) -> float:
    """The next float above a bound; infinity when there is none."""
    top = float(value.upper())
    return math.nextafter(top, math.inf) if math.isfinite(top) else math.inf


def midpoints(matrix: arb_mat) -> list[list[float]]:
    """Floats near a matrix, for choices that need not be exact."""
    return [[float(entry.mid()) for entry in row] for row in matrix.tolist()]
