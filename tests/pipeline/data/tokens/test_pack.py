"""Packing any documents: each token once and in order, rows of one length, correct counts."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.tokens import pack
from pipeline.data.tokens.pack import BestFit, Block, Concat, Packer, Pad, best_fit

KINDS: dict[str, Any] = {"concat": Concat, "best-fit": BestFit, "pad": Pad}


def documents_of(lengths: list[int]) -> list[Any]:
    """Documents without a token in common, so that each token identifies its position; 0 is padding."""
    ends = np.cumsum([1, *lengths])
    return [np.arange(a, b, dtype=np.uint16) for a, b in itertools.pairwise(ends)]


def run(packer: Packer, documents: list[Any], at_once: int = 1) -> list[Block]:
    blocks: list[Block] = []
    for start in range(0, len(documents), at_once):
        batch = documents[start : start + at_once]
        blocks += packer.add(np.concatenate(batch), np.array([len(document) for document in batch]))
    return blocks + list(packer.finish())


@pytest.fixture(autouse=True)
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "WINDOW", 64)


@pytest.mark.parametrize("kind", KINDS)
@given(
    lengths=st.lists(st.one_of(st.just(1), st.integers(1, 40)), max_size=30),
    context=st.integers(1, 9),
    block=st.integers(1, 5),
    boundaries=st.booleans(),
    rest=st.booleans(),
    at_once=st.integers(1, 5),
)
@settings(deadline=None, max_examples=200)
def test_every_token_is_there_once_and_counted(
    kind: str, lengths: list[int], context: int, block: int, boundaries: bool, rest: bool, at_once: int
) -> None:
    documents = documents_of(lengths)
    more = {"keep_rest": rest} if kind == "concat" else {}

    def make() -> Packer:
        packer: Packer = KINDS[kind](context, block, dtype="uint16", boundaries=boundaries, **more)
        return packer

    packer = make()
    blocks = run(packer, documents, at_once)
    counts = packer.counts()
    assert all(b.tokens.shape[1] == context + 1 and b.tokens.dtype == np.uint16 for b in blocks)
    assert all(len(b.tokens) == block for b in blocks[:-1]) and all(1 <= len(b.tokens) <= block for b in blocks[-1:])
    rows = np.concatenate([b.tokens for b in blocks]) if blocks else np.empty((0, context + 1), np.uint16)
    real = rows != 0

    assert counts["sequences"] == len(rows)
    assert counts["tokens_in"] == sum(lengths) == counts["tokens"] + counts["tokens_dropped"]
    assert counts["tokens_padded"] == (~real).sum()
    assert (real[:, :-1] >= real[:, 1:]).all(), "only padding behind padding"
    assert (real.sum(1) > 1).all(), "a row without a target"

    targets = rows[:, 1:][real[:, 1:]].tolist()
    assert len(targets) == len(set(targets)), "a target predicted twice"
    stored = set(rows[real].tolist())
    assert len(stored) == counts["tokens"]
    inside = {int(token) for document in documents for token in document[1:]}
    if kind == "concat":
        kept = counts["tokens"]
        assert stored == set(range(1, kept + 1)) and set(targets) == set(range(2, kept + 1))
        assert counts["tokens_dropped"] <= (1 if rest else context)
    else:  # nothing cropped: all but the first token of a document is predicted, and from the token before it
        assert inside <= set(targets)
        allowed = 1 if kind == "best-fit" else lengths.count(1)
        assert counts["tokens_dropped"] <= allowed and (counts["tokens_dropped"] == 0 or 1 in lengths)
    previous = {int(t): int(s) for row in rows for s, t in itertools.pairwise(row) if t}
    assert all(previous[token] == token - 1 for token in inside & set(targets))

    again = run(make(), documents, at_once if kind == "best-fit" else 1)
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(blocks, again, strict=True))
    if boundaries:
        segments_tell_the_documents(blocks, documents)
    else:
        assert all(b.segments is None for b in blocks)


def segments_tell_the_documents(blocks: list[Block], documents: list[Any]) -> None:
    """Each segment is a run of one document; put together, without the overlaps, the runs are the document."""
    owner = {int(token): number for number, document in enumerate(documents) for token in document}
    found: dict[int, set[int]] = {}
    for block in blocks:
        assert block.segments is not None and block.segments.dtype == np.uint16
        for row, segments in zip(block.tokens, block.segments, strict=True):
            assert ((row == 0) == (segments == 0)).all()
            numbers = segments[segments > 0]
            assert numbers[0] == 1 and set(np.diff(numbers).tolist()) <= {0, 1}
            for number in range(1, numbers[-1] + 1):
                run_of = row[segments == number]
                assert (np.diff(run_of) == 1).all() and len({owner[int(token)] for token in run_of}) == 1
                found.setdefault(owner[int(run_of[0])], set()).update(run_of.tolist())
            owners = [owner[int(row[segments == number][0])] for number in range(1, numbers[-1] + 1)]
            assert all(a != b for a, b in itertools.pairwise(owners))
    for number, tokens in found.items():
        assert tokens <= set(documents[number].tolist())


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(0, 10))
@settings(deadline=None)
def test_best_fit_is_best_fit_decreasing(lengths: list[int], more: int) -> None:
    """As full as with the plain algorithm: longest first, each into the fullest row that has room."""
    room = max(lengths, default=1) + more
    rows = best_fit(np.array(lengths, dtype=np.int64), room)
    plain: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [number for number, left in enumerate(plain) if left >= length]
        if not fits:
            plain.append(room)
            fits = [len(plain) - 1]
        plain[min(fits, key=plain.__getitem__)] -= length
    fills: Counter[int] = Counter()
    for row, length in zip(rows.tolist(), lengths, strict=True):
        fills[row] += length
    assert sorted(fills) == list(range(len(plain)))
    assert sorted(fills.values()) == sorted(room - left for left in plain)


def test_best_fit_pads_little_and_does_not_cut_short_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    lengths = np.maximum(2, rng.lognormal(3.0, 1.0, 4000)).astype(int).tolist()
    context = 63
    monkeypatch.setattr(pack, "WINDOW", 1 << 15)
    packer = BestFit(context, 16, dtype="uint32", boundaries=True)
    documents = [np.full(n, 7, dtype=np.uint32) for n in lengths]
    blocks = run(packer, documents)
    counts = packer.counts()
    assert counts["tokens_dropped"] == 0 and counts["tokens_padded"] < 0.01 * counts["tokens"]
    pieces = sum(int(block.segments.max(1).sum()) for block in blocks if block.segments is not None)
    assert pieces == sum(max(1, -(-(n - 1) // context)) for n in lengths)


def test_neighbors_stay_near() -> None:
    """Rows come in the order of their first documents, not sorted by length: or a batch would contain only one kind."""
    pack.WINDOW = 1 << 20
    lengths = [3, 9] * 200
    packer = BestFit(8, 10, dtype="uint16")
    rows = np.concatenate([block.tokens for block in run(packer, documents_of(lengths))])
    assert (np.diff(rows[:, 0].astype(int)) > 0).all()


def test_documents_of_one_token() -> None:
    """An empty document is its eos alone: after another document it is a target, alone it would be a row without one."""
    one, two = np.array([3], np.uint16), np.array([5, 3], np.uint16)
    for kind, documents, expected, dropped in [
        ("best-fit", [one, two], [[3, 5, 3, 0]], 0),
        ("best-fit", [one], None, 1),
        ("pad", [one, two], [[5, 3, 0, 0]], 1),
        ("concat", [one, two], [[3, 5, 3, 0]], 0),
        ("concat", [one], None, 1),
    ]:
        more = {"keep_rest": True} if kind == "concat" else {}
        packer = KINDS[kind](3, 4, dtype="uint16", **more)
        blocks = run(packer, documents)
        assert [b.tokens.tolist() for b in blocks] == ([expected] if expected else [])
        assert packer.counts()["tokens_dropped"] == dropped


def test_the_rest_is_dropped_or_padded() -> None:
    documents = documents_of([4, 3])
    dropping, padding = Concat(4, 2, dtype="uint16"), Concat(4, 2, dtype="uint16", keep_rest=True, boundaries=True)
    assert [b.tokens.tolist() for b in run(dropping, documents)] == [[[1, 2, 3, 4, 5]]]
    assert dropping.counts() == {
        "sequences": 1,
        "tokens": 5,
        "tokens_in": 7,
        "tokens_dropped": 2,
        "tokens_padded": 0,
    }
    (block,) = run(padding, documents)
    assert block.tokens.tolist() == [[1, 2, 3, 4, 5], [5, 6, 7, 0, 0]]
    assert block.segments is not None and block.segments.tolist() == [[1, 1, 1, 1, 2], [1, 1, 1, 0, 0]]
