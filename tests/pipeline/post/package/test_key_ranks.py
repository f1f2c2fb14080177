"""The choice of ranks: by energy, as given, and by what they are measured to cost."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch

from pipeline.config.post import KeyRankConfig
from pipeline.post.extract import extract_g
from pipeline.post.package.key_ranks import choose_ranks, few_ranks, hull
from pipeline.post.package.measured_keys import measure_outputs
from pldr_model.decode.low_rank import truncate_g
from pldr_model.model import PLDRModel

Weak = tuple[PLDRModel, torch.Tensor]
TOKENS = 16 * 31


@pytest.fixture(scope="module")
def weak(invariant: PLDRModel, text: torch.Tensor) -> Weak:
    """The invariant model with a G_LM whose head 0 of layer 1 is close to zero: its rank costs nothing."""
    g_LHKK = extract_g(invariant, text[:, :-1], "mean").g_lm.clone()
    g_LHKK[1, 0] = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) * 1e-4
    return invariant, g_LHKK


def chosen(weak: Weak, text: torch.Tensor, **asked: Any) -> list[list[int]]:
    ranks: list[list[int]] = choose_ranks(*weak, text, KeyRankConfig(**asked), judged_tokens=TOKENS).tolist()
    return ranks


def test_given_ranks_are_taken_as_they_are(weak: Weak, text: torch.Tensor) -> None:
    assert chosen(weak, text, ranks=[[1, 7], [3, 8]]) == [[1, 7], [3, 8]]
    assert chosen(weak, text, ranks=5) == [[5, 5], [5, 5]]


def test_energy_is_rounded_up_for_kernels(weak: Weak, text: torch.Tensor) -> None:
    exact = chosen(weak, text, energy=0.05, multiple=1)
    rounded = chosen(weak, text, energy=0.05, multiple=4)
    assert rounded == [[-(-rank // 4) * 4 for rank in row] for row in exact] and exact != rounded
    assert [len(set(row)) for row in chosen(weak, text, energy=0.05, multiple=1, groups=1)] == [1, 1]


def test_numbers_are_saved_where_they_cost_least_and_the_loss_is_kept(weak: Weak, text: torch.Tensor) -> None:
    ranks = chosen(weak, text[:16], max_loss=0.02, multiple=1, groups=8)
    assert ranks[1][0] == 1  # and its energies are spread like those of any other head
    assert any(rank > 1 for row in ranks for rank in row)
    cost = measure_outputs(*weak, truncate_g(weak[1], torch.tensor(ranks)), text[:16])
    by_chance = 2 * math.sqrt(2 * cost["kl"] / TOKENS)
    assert max(abs(cost["loss_difference"]), cost["kl"]) + by_chance <= 0.02
    assert ranks == chosen(weak, text[:16], max_loss=0.02, multiple=1, groups=8)
    less = chosen(weak, text[:16], max_loss=1e-9, multiple=1, groups=8)
    assert sum(map(sum, less)) > sum(map(sum, ranks))


def test_the_hull_leaves_out_ranks_that_are_no_bargain() -> None:
    costs = [(1, 9.0), (2, 1.0), (4, 0.9), (6, 0.1), (7, math.nan)]
    assert hull(costs, 8) == [(6, 0.05), (2, pytest.approx(0.225)), (1, pytest.approx(8.0))]
    assert hull([(4, 0.0), (6, 0.0)], 8) == [(4, 0.0)]
    assert hull([], 8) == []


@pytest.mark.parametrize("most", [1, 2, 3])
def test_few_ranks_raise_as_little_as_possible(most: int) -> None:
    ranks = [4, 20, 8, 8, 40, 36, 4]
    raised = few_ranks(ranks, most)
    kept = [sorted(set(choice)) for choice in product(set(ranks), repeat=most) if 40 in choice]
    best = min(sum(min(value for value in values if value >= rank) for rank in ranks) for values in kept)
    assert sum(raised) == best and len(set(raised)) <= most and all(a >= b for a, b in zip(raised, ranks, strict=True))
    assert few_ranks(ranks, 9) == ranks
