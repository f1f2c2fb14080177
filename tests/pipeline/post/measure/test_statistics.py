"""The measures on tensors whose answers are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.post.measure.statistics import (
    Pair,
    Scalars,
    Spread,
    log_abs_det,
    numerical_rank,
    relative_deviation,
    row_variance_ratio,
)
from pldr_model.decode.low_rank import effective_rank

REAL_G = Path("/work/shared/reference/PLDRv51-110M-1.G_LM.safetensors")


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    offset=st.sampled_from([0.0, 1e3, -1e6]),
    seed=st.integers(0, 1000),
)
def test_streaming_equals_all_at_once_however_it_is_split(sizes: list[int], offset: float, seed: int) -> None:
    x = torch.randn(sum(sizes), 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + offset
    spread, halves = Spread(), [Spread(), Spread()]
    for i, part in enumerate(x.split(sizes)):
        spread.update(part)
        halves[i % 2].update(part)
    halves[0].merge(halves[1])
    reference = torch.full((2, 3, 4, 4), offset + 0.5, dtype=torch.float64)
    for s in (spread, halves[0]):
        assert s.count == len(x)
        torch.testing.assert_close(s.mean_LHKK, x.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(s.std(), x.std(0, correction=0), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(s.rms(), x.square().mean((0, 3, 4)).sqrt(), rtol=1e-12, atol=0)
        difference = x - reference
        torch.testing.assert_close(
            s.rms_from(reference), difference.square().mean((0, 3, 4)).sqrt(), rtol=1e-7, atol=1e-7
        )
        torch.testing.assert_close(s.max_from(reference), difference.abs().amax((0, 3, 4)), rtol=1e-12, atol=1e-12)


def test_relative_deviation_is_per_head_and_zero_for_an_exact_zero() -> None:
    x = torch.zeros(4, 1, 3, 2, 2)
    x[:, 0, 0] = 5.0
    x[:, 0, 1] = torch.tensor([1.0, 1.0, 3.0, 3.0])[:, None, None]
    spread = Spread()
    spread.update(x)
    got = relative_deviation(spread, spread.mean_LHKK, scale_LH=spread.rms())
    assert got[0].tolist() == pytest.approx([0.0, 1 / math.sqrt(5), 0.0])


def test_memory_does_not_grow_with_prompts() -> None:
    spread = Spread()
    for _ in range(5):
        spread.update(torch.randn(100, 1, 1, 2, 2))
    assert sum(v.numel() for v in vars(spread).values() if isinstance(v, torch.Tensor)) == 4 * 4


def test_scalars_leave_out_what_is_not_finite_head_by_head() -> None:
    scalars, together = Scalars(1, 3), Scalars(1, 3)
    x = torch.tensor([[[1.0, 2.0, math.inf]], [[3.0, -math.inf, math.nan]], [[5.0, 4.0, math.inf]]])
    scalars.update(x[:2])
    other = Scalars(1, 3)
    other.update(x[2:])
    scalars.merge(other)
    together.update(x)
    for seen in (scalars, together):
        values = seen.as_dict()
        assert seen.not_finite_LH.tolist() == [[0, 1, 3]]
        assert values["mean"][0][:2] == [3.0, 3.0] and values["std"][0][:2] == pytest.approx([math.sqrt(8 / 3), 1.0])
        assert values["low"][0][:2] == [1.0, 2.0] and values["high"][0][:2] == [5.0, 4.0]
        assert all(math.isnan(values[name][0][2]) for name in values)


def pair_of(first: torch.Tensor, second: torch.Tensor, *, parts: int = 1) -> dict[str, Any]:
    pair = Pair()
    for a, b in zip(first.chunk(parts), second.chunk(parts), strict=True):
        other = Pair()
        other.update(a, b)
        pair.merge(other)
    return pair.as_dict()


def test_order_parameter_by_rms_stays_bounded_where_the_mean_vanishes() -> None:
    first = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1)
    assert pair_of(first, first)["by_mean"] == pair_of(first, first)["by_rms"] == 0.0
    found = pair_of(first, -first)
    assert found["by_mean"] == math.inf and found["by_rms"] == pytest.approx(2.0)
    for parts in (1, 2):
        found = pair_of(first + 3, first + 4, parts=parts)
        assert found["by_mean"] == pytest.approx(1 / 3.5)
        assert found["by_rms"] == pytest.approx(1 / math.sqrt((10 + 17) / 2))


def test_order_parameter_names_the_head_that_moves() -> None:
    first = torch.ones(4, 1, 3, 2, 2)
    second = first.clone()
    second[:, :, 1] += 0.5
    found = pair_of(first, second, parts=2)
    assert found["by_rms_per_head"][0][0] == found["by_rms_per_head"][0][2] == 0.0
    assert found["by_rms_per_head"][0][1] == pytest.approx(0.5 / math.sqrt((1 + 1.5**2) / 2))
    assert found["by_mean_per_head"][0][1] == pytest.approx(0.5 / 1.25)


def test_row_variance_ratio_is_zero_for_equal_rows_and_one_for_constant_rows() -> None:
    row = torch.randn(6)
    assert row_variance_ratio(row.expand(6, 6)) == 0
    assert row_variance_ratio(row.unsqueeze(1).expand(6, 6)) == pytest.approx(1.0)
    noise = row_variance_ratio(torch.randn(50, 64, 64)).mean()
    assert noise == pytest.approx(1 - 1 / 64, abs=0.01)


def test_log_det_where_the_determinant_underflows() -> None:
    G = torch.eye(64, dtype=torch.float64) * 1e-8
    assert torch.linalg.det(G) == 0.0
    assert log_abs_det(G).item() == pytest.approx(64 * math.log(1e-8))
    assert log_abs_det(torch.zeros(3, 3)).item() == -math.inf


def test_ranks() -> None:
    U, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    values = torch.tensor([1.0, 1e-2, 1e-5, 0, 0, 0, 0, 0], dtype=torch.float64)
    G = U @ torch.diag(values) @ U.T
    assert numerical_rank(G) == 3
    assert effective_rank(G, left_out=1e-6) == 2  # 1e-5 squared is below 1e-6 of the energy
    assert effective_rank(torch.eye(8), left_out=1e-6) == 8


@pytest.mark.skipif(not REAL_G.exists(), reason="the published G_LM is not on this machine")
def test_effective_rank_of_the_published_G_LM_is_what_was_measured_before() -> None:
    (G,) = load_file(REAL_G).values()
    per_layer = effective_rank(G, left_out=1e-6).double().mean(-1).tolist()
    assert per_layer == pytest.approx([5.5, 4.8, 11.9, 20.6, 45.8], abs=0.06)
    assert log_abs_det(G).isfinite().all()  # where most determinants are 0 to fp64
    assert int((torch.linalg.det(G.double()).abs() < 1e-15).sum()) == 61
