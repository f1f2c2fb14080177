"""Drafts are what followed the last time, found in constant time; what tries of them may cost is bounded."""

import hypothesis.strategies as st
from hypothesis import given, settings

from pldr_model.decode.lookup import COSTS, GRAMS, INCOME, MOST, START, Drafts, Pace


def naive(tokens: list[int], count: int) -> list[int]:
    """By looking at every place in the row."""
    for size in GRAMS:
        for place in range(len(tokens) - 1, size - 1, -1):
            if tokens[place - size : place] == tokens[-size:]:
                found = list(tokens)
                for _ in range(count):
                    found.append(found[place])
                    place += 1
                return found[len(tokens) :]
    return []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 20))
def test_a_draft_is_what_followed_the_last_time(tokens: list[int], count: int) -> None:
    drafts = Drafts(tokens[:7])
    for token in tokens[7:]:
        drafts.find(count)
        drafts.append(token)
    assert drafts.find(count) == naive(tokens, count)


def test_a_period_goes_on_and_new_tokens_have_no_draft() -> None:
    assert Drafts([9, 5, 6, 7, 5, 6, 7]).find(7) == [5, 6, 7, 5, 6, 7, 5]
    assert Drafts([1, 1, 1]).find(4) == [1, 1, 1, 1]
    assert Drafts([1, 2, 3, 4]).find(4) == [] == Drafts().find(4)
    assert Drafts([7, 1, 2, 8, 9, 1, 2]).find(2) == [8, 9]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 31), st.booleans()), max_size=80))
def test_losses_are_bounded_whatever_is_kept(passes: list[tuple[int, bool]]) -> None:
    """Of any run of passes, the cost in steps is at most its tokens, INCOME of them, and what may be kept of earlier gains."""
    pace, costs, tokens = Pace(), [0.0], [0]
    for kept, found in passes:
        drafted = pace.count() if found else 0
        kept = min(kept, drafted)
        pace.passed(drafted, kept)
        costs.append(costs[-1] + (next(cost for width, cost in COSTS if drafted < width) if drafted else 1.0))
        tokens.append(tokens[-1] + kept + 1)
        for first in range(len(costs)):
            spent, got = costs[-1] - costs[first], tokens[-1] - tokens[first]
            assert spent <= got * (1 + INCOME) + (START if first == 0 else MOST) + 1e-9


def test_drafts_grow_while_they_are_kept_and_end_when_they_fail() -> None:
    pace, widths = Pace(), []
    for _ in range(4):
        widths.append(pace.count())
        pace.passed(widths[-1], widths[-1])
    assert widths == [2, 15, 31, 31]
    failed = 0
    while pace.count():
        pace.passed(pace.count(), 0)
        failed += 1
    assert failed < 8
    waits = 0
    while not pace.count():
        pace.passed(0, 0)
        waits += 1
    assert pace.count() == 2 and 0 < waits <= 0.25 / INCOME + 1
