"""The worst of a stream: whatever the batches and the ranks, and however small its share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeline.post.measure.worst import Moment, QueryRatio, RowSets, Top, Worst

REFERENCE = torch.ones(2, 3, 4, 4)


def deviating(count: int, at: dict[int, float]) -> torch.Tensor:
    """G_LM of `count` prompts, equal to the reference but in head (1, 2) of some of them."""
    x = REFERENCE.double().repeat(count, 1, 1, 1, 1)
    for prompt, size in at.items():
        x[prompt, 1, 2] += size
    return x


def test_one_prompt_of_32_counts_as_much_as_all() -> None:
    worst = Worst(REFERENCE, keep=4, above=1e-5)
    worst.update(deviating(32, {20: 3e-5}), start=0)
    assert worst.max_LH[1, 2] == pytest.approx(3e-5) and worst.max_LH.sum() == worst.max_LH[1, 2]
    assert worst.prompts.beside is not None and worst.prompts.beside[0] == 20 and worst.num_above == 1


@pytest.mark.parametrize("parts", [[40], [1] * 40, [7, 13, 20]])
def test_the_worst_prompts_are_the_same_however_they_are_split_over_ranks(parts: list[int]) -> None:
    at = {3: 1e-4, 11: 5e-4, 12: 5e-4, 25: 2e-4, 39: 1e-6}
    x, total, start = deviating(40, at), Worst(REFERENCE, keep=5, above=1e-5), 0
    for count in parts:  # a rank each
        mine = Worst(REFERENCE, keep=5, above=1e-5)
        mine.update(x[start : start + count], start=start)
        total.merge(mine)
        start += count
    assert total.prompts.beside is not None and total.prompts.beside.tolist() == [
        11,
        12,
        25,
        3,
        39,
    ]  # the first of equal ones
    assert total.num_above == 4 and float(total.max_LH.max()) == pytest.approx(5e-4)


def test_what_is_not_a_number_is_the_worst_and_does_not_pass() -> None:
    worst = Worst(REFERENCE, keep=2, above=1e-5)
    worst.update(deviating(8, {2: 1e-3, 5: math.nan}), start=0)
    assert math.isnan(worst.max_LH[1, 2]) and worst.num_above == 2
    assert worst.prompts.beside is not None and worst.prompts.beside.tolist() == [5, 2]


def test_a_head_that_is_zero_and_stays_zero_does_not_deviate() -> None:
    worst = Worst(torch.zeros(1, 1, 2, 2), keep=1, above=1e-5)
    worst.update(torch.zeros(3, 1, 1, 2, 2), start=0)
    assert worst.max_LH.tolist() == [[0.0]]
    worst.update(torch.full((3, 1, 1, 2, 2), 1e-30), start=3)
    assert worst.max_LH.tolist() == [[math.inf]]


def test_the_query_ratio_is_of_the_worst_prompt_over_all_tokens() -> None:
    ratio, other = QueryRatio(), QueryRatio()
    one = torch.ones(2, 1, 1, dtype=torch.float64)
    ratio.update(one * torch.tensor([4.0, 64.0]).view(2, 1, 1), 8 * one, tokens=4)  # per token: 1 and 16; 2
    other.update(one[:1] * 9, 40 * one[:1], tokens=1)  # per token: 9; 40
    ratio.merge(other)
    assert ratio.per_head().item() == pytest.approx(math.sqrt(16 / ((8 + 8 + 40) / 9)))


def test_row_sets_keep_each_heads_worst_prompt() -> None:
    generator = torch.Generator().manual_seed(0)
    deviation, rows = torch.rand(9, 2, 3, generator=generator), torch.rand(9, 2, 3, 4, 4, generator=generator)
    total = RowSets()
    for part in (slice(0, 2), slice(2, 9)):
        mine = RowSets()
        mine.update(deviation[part], rows[part])
        total.merge(mine)
    for layer in range(2):
        for head in range(3):
            assert torch.equal(total.rows_LHKK[layer, head], rows[deviation[:, layer, head].argmax(), layer, head])


def held(value: Any) -> int:
    """How many numbers an accumulator keeps."""
    if isinstance(value, torch.Tensor):
        return value.numel()
    return sum(held(inner) for inner in vars(value).values()) if hasattr(value, "__dict__") else 1


def test_nothing_is_kept_of_a_prompt_but_the_worst() -> None:
    sizes = []
    for count in (8, 800):
        worst, top, ratio, sets, moment = Worst(REFERENCE, keep=4, above=0.0), Top(4), QueryRatio(), RowSets(), Moment()
        for start in range(0, count, 8):
            per_head = torch.rand(8, 2, 3)
            worst.update(torch.rand(8, 2, 3, 4, 4), start=start)
            top.update(torch.rand(8), torch.rand(8, 4))
            ratio.update(per_head, per_head, tokens=5)
            sets.update(per_head, torch.rand(8, 2, 3, 4, 4))
            moment.update(torch.rand(2, 3, 4, 4), count=5)
        sizes.append([held(each) for each in (worst, top, ratio, sets, moment)])
    assert sizes[0] == sizes[1]
