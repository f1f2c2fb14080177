"""`data.phases`: a pure function of the position, exact shares, and every sequence is used before one is used again."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.phases import Begin, PlannedPhase, shares_of
from pipeline.data.loading.mixture import BLOCK, Mixture

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
    phases = [PlannedPhase(int(end), shares_of(draw(weights))) for end in np.cumsum(lengths)]
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
            for count, share in zip(counts, map(phase.shares.get, NAMES, (0, 0, 0)), strict=True):
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
    phases, ranges = [PlannedPhase(10_000, shares_of({"a": 1, "b": 1}))], {"a": [(0, 900)], "b": [(900, 1800)]}
    one = Mixture(phases, ranges, **same).global_batch(0, 10_000)  # type: ignore[arg-type]
    second = (one >= 900).astype(float)
    assert abs(np.corrcoef(second[:-1], second[1:])[0, 1]) < 0.05
    for change in ({"seed": 2}, {"fingerprint": "y"}):
        other = Mixture(phases, ranges, **{**same, **change}).global_batch(0, 10_000)  # type: ignore[arg-type]
        assert (one != other).mean() > 0.95


def test_the_order_is_this_one() -> None:
    """A change of the order changes the data of every run with phases: VERSION has to change with it."""
    phases = [PlannedPhase(1500, shares_of({"a": 0.7, "b": 0.3})), PlannedPhase(4000, shares_of({"b": 1}))]
    mixture = Mixture(phases, {"a": [(0, 300)], "b": [(300, 700)]}, block_sequences=16, fingerprint="x", seed=1)
    ids = mixture.global_batch(0, 4000)
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16] == "3c91f1b86c442c44"


def test_positions_after_many_epochs_cost_no_memory_and_stay_exact() -> None:
    phases = [PlannedPhase(10, shares_of({"a": 0.1, "b": 0.9}))]
    mixture = Mixture(phases, {"a": [(0, 7000)], "b": [(7000, 9000)]}, block_sequences=16, fingerprint="x", seed=1)
    far = 10**12 // BLOCK * BLOCK
    assert abs(int(mixture.drawn(far)[0]) - Fraction(1, 10) * far) <= 1


def test_weights_are_relative_and_decimal() -> None:
    assert shares_of({"a": 0.1, "b": 0.3}) == {"a": Fraction(1, 4), "b": Fraction(3, 4)}


@st.composite
def continued(draw: st.DrawFn) -> tuple[Mixture, Mixture]:
    """An order, and one with other phases that goes on from it at any position."""
    one = draw(mixtures())
    position = draw(st.integers(0, total(one) + BLOCK))
    lengths = draw(st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=3))
    phases = [PlannedPhase(int(end), shares_of(draw(weights))) for end in np.cumsum(lengths)]
    return one, goes_on(one, phases, position)


def goes_on(one: Mixture, phases: list[PlannedPhase], position: int) -> Mixture:
    recorded = one.recorded(position)["mixture"]
    ranges = {
        name: [(int(begin), int(begin + size)) for begin, size in zip(first, np.diff(ends), strict=True)]
        for name, first, ends in zip(NAMES, one._first, one._numbers, strict=True)
    }
    return Mixture(
        phases,
        ranges,
        block_sequences=one._orders[0].block_sequences,
        fingerprint="f",
        seed=one._orders[0].seed,
        begin=Begin(1, position, recorded["drawn"]),
    )


@relaxed
@given(continued(), st.data())
def test_where_a_run_goes_on_with_other_phases_they_decide_the_rest_alone(
    orders: tuple[Mixture, Mixture], data: st.DataObject
) -> None:
    one, other = orders
    begin = other.begin.position
    end = max(begin, total(other)) + BLOCK
    ids = np.concatenate([one.global_batch(0, begin), other.global_batch(begin, end - begin)])
    sources = sources_of(one, ids)
    for source, ends in enumerate(one._numbers):  # through both: every sequence is used before one is used again
        mine, size = ids[sources == source], int(ends[-1])
        for first in range(0, len(mine), size):
            assert len(np.unique(mine[first : first + size])) == len(mine[first : first + size])
    assert np.array_equal(other.drawn(end), np.bincount(sources, minlength=3))
    first = begin
    for phase in other._phases[:-1]:  # exact shares, in what is left of each phase
        rest = sources[first : max(first, phase.end)]
        for count, share in zip(np.bincount(rest, minlength=3), map(phase.shares.get, NAMES, (0, 0, 0)), strict=True):
            assert abs(Fraction(int(count)) - share * len(rest)) <= (1 if len(rest) % BLOCK == 0 else BLOCK)
        first += len(rest)
    start = data.draw(st.integers(begin, end - 1))
    assert np.array_equal(other.global_batch(start, end - start), ids[start:])


def test_what_is_recorded_is_plain_and_names_the_sources() -> None:
    phases = [PlannedPhase(1024, shares_of({"a": 3, "b": 1})), PlannedPhase(4096, shares_of({"b": 1}))]
    ranges = {"a": [(0, 300)], "b": [(300, 700)], "unused": [(700, 800)]}
    mixture = Mixture(phases, ranges, block_sequences=16, fingerprint="x", seed=1)
    assert json.loads(json.dumps(mixture.recorded(2048))) == {
        "mixture": {
            "drawn": {"a": 768, "b": 1280, "unused": 0},
            "begin": {"step": 0, "position": 0, "drawn": {}},
            "phases": [{"end": 1024, "shares": {"a": "3/4", "b": "1/4"}}, {"end": 4096, "shares": {"b": "1"}}],
        }
    }
