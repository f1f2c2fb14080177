"""Enclosures hold every point that is drawn from what they enclose, and small sets are multiplied by LayerNorm's Jacobian."""

from __future__ import annotations

import math

import flint
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flint import arb, arb_mat
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.post.every_input import ellipsoid
from pipeline.post.every_input.balls import (
    PRECISION_BITS,
    diagonal,
    exact,
    identity,
    largest_eigenvalue,
    midpoints,
    precision,
    root,
    rounded_up,
)
from pipeline.post.every_input.ellipsoid import Ellipsoid, centering, normalized, row_ball
from pipeline.post.every_input.learner import Tangent, glu_tangent
from pldr_model.layers import GLU

SEEDS = st.integers(0, 2**31)


def drawn(seed: int, K: int, *, size: float, far: float) -> tuple[Ellipsoid, Tensor]:
    """An ellipsoid of mean 0, long and thin, and points of its surface [M,K]."""
    random = torch.Generator().manual_seed(seed)
    axes = torch.randn(K, K, generator=random).double() * torch.logspace(0, -3, K).double() * size
    axes = axes - axes.mean(0)
    center = torch.randn(K, generator=random).double()
    center = (center - center.mean()) * far
    u = torch.randn(500, K, generator=random).double()
    u = u / u.norm(dim=1, keepdim=True)
    with precision(PRECISION_BITS):
        factor = exact(axes)
        return Ellipsoid(exact(center), factor * factor.transpose()), center + u @ axes.T


def floats(matrix: arb_mat) -> Tensor:
    return torch.tensor(midpoints(matrix), dtype=torch.float64)


def assert_inside(points_MK: Tensor, ellipsoid: Ellipsoid) -> None:
    """v.(point - center) <= sqrt(v.S v) for many v; points are right to round-off."""
    shape, center = (floats(part) for part in (ellipsoid.shape, ellipsoid.center))
    vectors = np.linalg.eigh(shape.numpy())[1]
    directions = torch.cat([torch.randn(300, len(shape)).double(), torch.tensor(vectors.T)])
    reach = (directions @ shape * directions).sum(1).clamp_min(0).sqrt()
    outside = ((points_MK - center[:, 0]) @ directions.T).abs() - reach
    scale = directions.norm(dim=1) * float(points_MK.abs().max())
    assert float((outside - 1e-11 * scale).max()) <= 0


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, size=st.floats(-6, 2), far=st.floats(-2, 1), gammas=st.booleans())
def test_layer_norm_of_an_ellipsoid(seed: int, size: float, far: float, gammas: bool) -> None:
    K, eps = 6, 1e-3
    w, points = drawn(seed, K, size=10**size, far=10**far)
    cost = np.diag(np.arange(1.0, K + 1)) if gammas else np.eye(K)
    with precision(PRECISION_BITS):
        z = normalized(w, eps, cost)
        assert z is not None
        assert_inside(F.layer_norm(points, (K,), eps=eps), z)


@pytest.mark.parametrize("multipliers", [(1e-3, 0.0), (3.0, 0.0), (0.5, 2.0), (1e3, 100.0)])
@pytest.mark.parametrize("size", [1e-3, 0.1, 10.0])
def test_choices_in_floats_do_not_matter_for_being_right(
    size: float, multipliers: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    K, eps = 6, 1e-3
    w, points = drawn(3, K, size=size, far=0.3)
    y = np.append(floats(w.center)[:, 0].numpy(), (K * eps) ** 0.5)
    monkeypatch.setattr(ellipsoid, "POLISHES", 0)
    monkeypatch.setattr(ellipsoid, "_top_eigenvector", lambda _: y / np.linalg.norm(y) + 0.1 * np.cos(np.arange(K + 1)))
    monkeypatch.setattr(ellipsoid, "_multipliers", lambda *_: multipliers)
    with precision(PRECISION_BITS):
        z = normalized(w, eps, np.eye(K))
        assert z is not None or size == 10, "the axis need not see the whole of a large set"
        if z is not None:
            assert_inside(F.layer_norm(points, (K,), eps=eps), z)


def test_a_small_set_is_multiplied_by_the_jacobian() -> None:
    K, eps = 6, 1e-3
    with precision(PRECISION_BITS):
        w, _ = drawn(1, K, size=1e-9, far=0.1)
        z = normalized(w, eps, np.eye(K))
        assert z is not None
        center = floats(w.center)[:, 0]
        J = exact(torch.func.jacrev(lambda x: F.layer_norm(x, (K,), eps=eps))(center))
        image = w.mapped(J)
        assert float(image.shape.trace()) <= float(z.shape.trace()) <= 1.001 * float(image.shape.trace())


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, size=st.floats(-4, 2), steep=st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_tangent_of_two_glus(seed: int, size: float, steep: float) -> None:
    K = 6
    torch.manual_seed(seed)
    x, points = drawn(seed, K, size=10**size, far=1.0)
    first, second = GLU(K, 5), GLU(K, 5)
    with precision(PRECISION_BITS), torch.no_grad():
        first.w12.weight.mul_(steep)
        first.w12.bias.copy_(torch.randn(10) * steep)
        tangent = Tangent(x.center, identity(K), exact(torch.zeros(K)))
        for glu in (first, second):
            tangent = glu_tangent(glu, tangent, x)
        value, slope, rest = (floats(part) for part in tangent)
        center = floats(x.center)[:, 0]
        out = second.double()(first.double()(points))
        off = (out - value[:, 0] - (points - center) @ slope.T).abs()
        assert float((off - rest[:, 0] * (1 + 1e-9) - 1e-11 * out.abs().max()).max()) <= 0


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, size=st.floats(-4, 2))
def test_sums_and_maps(seed: int, size: float) -> None:
    K = 6
    x, points = drawn(seed, K, size=10**size, far=1.0)
    M = torch.randn(K, K).double()
    corners = torch.randint(0, 2, (500, K)).double() * 2 - 1
    widths = torch.rand(K).double()
    with precision(PRECISION_BITS):
        assert_inside(points @ M.T + 1, x.mapped(exact(M), exact(torch.ones(K))))
        assert_inside(points + corners * widths, x.with_box(exact(widths)))
        reached = ((points - floats(x.center)[:, 0]) @ M.T).abs().amax(0)
        widest = floats(x.half_widths(exact(M)))[:, 0]
        assert bool((reached <= widest * (1 + 1e-12)).all())


def test_every_row_is_in_the_ball() -> None:
    with precision(PRECISION_BITS):
        assert_inside(F.layer_norm(torch.randn(100, 6).double() * 100, (6,)), row_ball(6))
        assert float(centering(6).trace()) == pytest.approx(5)


def test_bounds_are_rounded_up_and_exact() -> None:
    with precision(PRECISION_BITS):
        third = arb(1) / 3
        assert arb(rounded_up(third)) > third
        assert root(third) ** 2 >= third
        assert root(third).is_exact()
        assert 1 <= root(arb(-1, 2)) < 1.001, "what is known to be >= 0 may have a ball that is not"
        assert math.isinf(rounded_up(arb("nan")))
        values = torch.randn(7, 7).double()
        gram = exact(values) * exact(values).transpose()
        largest = float(np.linalg.eigvalsh((values @ values.T).numpy())[-1])
        assert largest * (1 - 1e-12) <= float(largest_eigenvalue(gram)) <= 1.1 * largest
        assert largest_eigenvalue(arb_mat(3, 3)) == 0
        assert rounded_up(exact(torch.tensor([0.1]))[0, 0]) >= float(torch.tensor(0.1))
        assert diagonal([1.0, 2.0])[1, 1] == 2
    assert flint.ctx.prec == 53, "the precision is put back"
