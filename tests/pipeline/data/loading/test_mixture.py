"""`data.phases`: a pure function of the position, exact shares, and every sequence is used before one is used again."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.loading.mixture import BLOCK, Mixture, Phase, shares_of

relaxed = settings(deadline=None, max_examples=8)  # a slow machine is not a failure
NAMES = ("a", "b", "c")
weights = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 300).map(lambda n: n / 100), min_size=1)


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    """Three sources whose shards are mixed up, and one to three phases, of any length."""
    sizes = [draw(st.integers(1, 400)) for _ in range(5)]
    ends = np.cumsum(sizes)
    spans = [(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]
    ranges = {"a": [spans[0], spans[3]], "b": [spans[1]], "c": [spans[2], spans[4]]}
    lengths = draw(st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=3))
    phases = [Phase(int(end), shares_of(draw(weights), NAMES)) for end in np.cumsum(lengths)]
    return Mixture(
        phases, ranges, block_sequences=draw(st.integers(1, 70)), fingerprint="f", seed=draw(st.integers(0, 9))
    )


def total(mixture: Mixture) -> int:
    return max(mixture._phases[-1].end, 1)


def sources_of(mixture: Mixture, ids: np.ndarray) -> np.ndarray:
    """The source of each sequence number, by the ranges."""
    out = np.full(len(ids), -1)
    for source, (first, ends) in enumerate(zip(mixture._first, mixture._numbers, strict=True)):
        for begin, size in zip(first, np.diff(ends), strict=True):
            out[(ids >= begin) & (ids < begin + size)] = source
    assert (out >= 0).all()
    return out


@relaxed
@given(mixtures(), st.data())
def test_batches_depend_on_the_position_alone(mixture: Mixture, data: st.DataObject) -> None:
    ids = mixture.global_batch(0, total(mixture) + 2 * BLOCK)
    for _ in range(5):
        start = data.draw(st.integers(0, len(ids) - 1))
        size = data.draw(st.integers(1, len(ids) - start))
        assert np.array_equal(mixture.global_batch(start, size), ids[start : start + size])


@relaxed
@given(mixtures())
def test_each_phase_has_its_shares_within_a_sequence_at_each_block_and_at_its_end(mixture: Mixture) -> None:
    sources = sources_of(mixture, mixture.global_batch(0, total(mixture)))
    begin = 0
    for phase in mixture._phases:
        for n in (*range(BLOCK, phase.end - begin, BLOCK), phase.end - begin):
            counts = np.bincount(sources[begin : begin + n], minlength=3)
            limit = 1 if n % BLOCK == 0 else BLOCK  # inside a block its sequences are in any order
            for count, share in zip(counts, phase.shares, strict=True):
                assert abs(Fraction(int(count)) - share * n) <= limit
                assert share or not count
        assert np.array_equal(mixture.drawn(phase.end), np.bincount(sources[: phase.end], minlength=3))
        begin = phase.end


@relaxed
@given(mixtures())
def test_every_sequence_of_a_source_is_used_before_one_is_used_again_through_all_phases(mixture: Mixture) -> None:
    ids = mixture.global_batch(0, total(mixture) + BLOCK)
    sources = sources_of(mixture, ids)
    for source, ends in enumerate(mixture._numbers):
        mine, size = ids[sources == source], int(ends[-1])
        for begin in range(0, len(mine), size):
            epoch = mine[begin : begin + size]
            assert len(np.unique(epoch)) == len(epoch)


def test_sources_are_mixed_and_the_seed_and_the_fingerprint_change_the_order() -> None:
    same = {"block_sequences": 16, "fingerprint": "x", "seed": 1}
    phases, ranges = [Phase(10_000, (Fraction(1, 2), Fraction(1, 2)))], {"a": [(0, 900)], "b": [(900, 1800)]}
    one = Mixture(phases, ranges, **same).global_batch(0, 10_000)  # type: ignore[arg-type]
    second = (one >= 900).astype(float)
    assert abs(np.corrcoef(second[:-1], second[1:])[0, 1]) < 0.05
    for change in ({"seed": 2}, {"fingerprint": "y"}):
        other = Mixture(phases, ranges, **{**same, **change}).global_batch(0, 10_000)  # type: ignore[arg-type]
        assert (one != other).mean() > 0.95


def test_the_order_is_this_one() -> None:
    """A change of the order changes the data of every run with phases: VERSION has to change with it."""
    phases = [Phase(1500, shares_of({"a": 0.7, "b": 0.3}, ("a", "b"))), Phase(4000, shares_of({"b": 1}, ("a", "b")))]
    mixture = Mixture(phases, {"a": [(0, 300)], "b": [(300, 700)]}, block_sequences=16, fingerprint="x", seed=1)
    ids = mixture.global_batch(0, 4000)
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16] == "3c91f1b86c442c44"


def test_positions_after_many_epochs_cost_no_memory_and_stay_exact() -> None:
    phases = [Phase(10, shares_of({"a": 0.1, "b": 0.9}, ("a", "b")))]
    mixture = Mixture(phases, {"a": [(0, 7000)], "b": [(7000, 9000)]}, block_sequences=16, fingerprint="x", seed=1)
    far = 10**12 // BLOCK * BLOCK
    assert abs(int(mixture.drawn(far)[0]) - Fraction(1, 10) * far) <= 1


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "unused")])
def test_weights_are_relative_and_decimal(names: tuple[str, ...]) -> None:
    shares = shares_of({"a": 0.1, "b": 0.3}, names)
    assert shares[:2] == (Fraction(1, 4), Fraction(3, 4)) and sum(shares) == 1
