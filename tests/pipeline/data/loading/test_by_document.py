"""Which documents sequences hold is counted right for every packing, and the choice covers as many as there are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.loading.by_document import UNKNOWN, SplitDocuments, documents_of, spread
from pipeline.data.loading.order import Indices
from pipeline.data.loading.reader import BadExtent, TokenReader
from pipeline.data.tokens.pack import make_packer
from pipeline.errors import UserError

PAD, EOS, FIRST = 0, 3, 10
Shards = list[list[int]]


class Reader:
    """A split of these shards: lists of the lengths of documents, where document d holds only the token FIRST + d."""

    def __init__(self, shards: Shards, *, packing: str = "concat", context: int = 4, bad: tuple[int, ...] = ()) -> None:
        settings = {"context_length": context, "block_sequences": 3, "dtype": "uint16", "boundaries": False}
        self.index = SimpleNamespace(packing=packing, **settings, folder="tokens")
        self.split, self.is_local, self.bad, self.reads = "val", False, bad, 0
        rows, document = [], FIRST
        self.shards = []
        for lengths in shards:
            packer = make_packer({**settings, "packing": packing, "remainder": "pad"}, pad_id=PAD)
            texts = [np.append(np.full(n, document + i, np.uint16), EOS) for i, n in enumerate(lengths)]
            document += len(lengths)
            tokens, counts = np.concatenate(texts), np.array([len(text) for text in texts])
            blocks = [*packer.add(tokens.astype(np.uint16), counts), *packer.finish()]
            rows += [block.tokens for block in blocks]
            self.shards.append(SimpleNamespace(sequences=sum(len(block.tokens) for block in blocks)))
        self.tokens = np.concatenate(rows).astype(np.int64)
        self.num_sequences = len(self.tokens)

    def read(self, numbers: Indices) -> Indices:
        self.reads += len(numbers)
        if any(number in self.bad for number in numbers):
            raise BadExtent("val-000000.tar block 1: damaged")
        return self.tokens[numbers]

    def inside(self, number: int) -> set[int]:
        """The documents in the inputs of a sequence."""
        return {int(token) - FIRST for token in self.tokens[number, :-1] if token >= FIRST}


def documents(reader: Reader, **options: Any) -> SplitDocuments:
    return documents_of(cast(TokenReader, reader), pad_id=PAD, eos_id=EOS, **options)


def found_in(split: SplitDocuments, number: int) -> set[int]:
    return {document for sequence, document in split.pairs.tolist() if sequence == number} - {UNKNOWN}


lengths = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=1, max_size=3)


@settings(deadline=None, max_examples=60)
@given(shards=lengths, packing=st.sampled_from(["concat", "pad", "best-fit"]), context=st.integers(2, 9))
def test_the_documents_of_every_sequence(shards: Shards, packing: str, context: int) -> None:
    reader = Reader(shards, packing=packing, context=context)
    split = documents(reader)
    assert split.sequences.tolist() == list(range(reader.num_sequences))
    assert split.padded.tolist() == (reader.tokens == PAD).any(axis=1).tolist()
    name: dict[int, int] = {}  # our number of each document
    for number in range(reader.num_sequences):
        inside, found = sorted(reader.inside(number)), sorted(found_in(split, number))
        if packing == "best-fit":  # those that end in it
            assert len(found) <= len(inside)
        else:  # one to one, in order
            assert len(found) == len(inside)
            assert all(name.setdefault(theirs, ours) == ours for theirs, ours in zip(inside, found, strict=True))
    everything = split.sequences
    there = set().union(*(reader.inside(number) for number in everything))
    assert len(split.of(everything)) <= len(there) and (
        packing == "best-fit" or len(split.of(everything)) == len(there)
    )
    assert split.count(everything) == max(1, matched([found_in(split, number) for number in everything]))


def matched(sets: list[set[int]]) -> int:
    """How many of the sets can be given one of their elements each, all different; the textbook's recursion."""
    taken: dict[int, int] = {}

    def give(number: int, seen: set[int]) -> bool:
        for element in sets[number] - seen:
            seen.add(element)
            if element not in taken or give(taken[element], seen):
                taken[element] = number
                return True
        return False

    return sum(give(number, set()) for number in range(len(sets)))


def test_sequences_that_share_their_document_are_one_sample() -> None:
    split = documents(Reader([[1] * 40, [4000]], context=100))
    assert len(split.of(split.sequences)) == 41 and split.count(split.sequences) == 2
    assert len(split.of(split.sequences[:1])) == 40 and split.count(split.sequences[:1]) == 1


SIZES = [[400, 7, 9], [200, 8]]  # five documents; a choice by place alone sees the long ones


def test_the_choice_covers_all_documents_before_it_takes_a_second_sequence_of_any() -> None:
    split = documents(Reader(SIZES))
    evenly = split.sequences[np.linspace(0, len(split.sequences) - 1, 5).astype(int)]
    assert len(split.of(evenly)) < 5
    chosen = spread(split, split.sequences, 5)
    assert len(split.of(chosen)) == split.count(chosen) == len(set(chosen.tolist())) == 5
    assert chosen.tolist() == spread(split, split.sequences, 5).tolist()
    assert spread(split, split.sequences, 12)[:5].tolist() == chosen.tolist()
    rest = spread(split, split.sequences, 40)[10:]  # of the two long ones, in turn, and from all over them
    of_first = [number for number in rest.tolist() if found_in(split, number) == {0}]
    assert 10 <= len(of_first) <= 20 and max(of_first) - min(of_first) > 80
    assert sorted(spread(split, split.sequences, 10_000)) == split.sequences.tolist()
    assert not len(spread(split, split.sequences[:0], 3))


def test_of_more_documents_than_are_wanted_each_sequence_brings_a_new_one() -> None:
    split = documents(Reader([[6] * 60, [11] * 30]))
    chosen = spread(split, split.sequences, 20)
    seen: set[int] = set()
    for number in chosen.tolist():
        assert found_in(split, number) - seen
        seen |= found_in(split, number)
    assert split.count(chosen) == 20 <= len(seen)
    assert chosen.min() < 20 and chosen.max() > 130  # from all over the split


def test_documents_that_do_not_end_in_a_sequence_are_not_counted_with_best_fit() -> None:
    reader = Reader([[400]], packing="best-fit")
    split = documents(reader)
    middle = split.sequences[10:20]
    assert split.of(middle).tolist() == [] and split.count(middle) == 1 and split.count(middle[:0]) == 0
    assert len(spread(split, split.sequences, 7)) == 7


def test_what_cannot_be_read_is_left_out_or_an_error() -> None:
    reader = Reader([[10] * 6], bad=(4,))
    with pytest.raises(BadExtent):
        documents(reader)
    split = documents(reader, skip=True)
    assert split.sequences.tolist() == [n for n in range(reader.num_sequences) if n not in (3, 4, 5)]
    assert split.count(split.sequences) <= 6
    with pytest.raises(UserError, match="no sequence of the val split can be read; run `pldr tokenize` again"):
        documents(Reader([[10]], bad=(0,)), skip=True)


def test_a_large_split_is_read_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader([[20]] * 10)
    monkeypatch.setattr("pipeline.data.loading.by_document.SCANNED", reader.num_sequences * 5 // 3)
    split = documents(reader)
    assert reader.reads == len(split.sequences) <= reader.num_sequences // 3 + 1
    assert split.sequences.min() == 0 and split.sequences.max() == reader.num_sequences - 1
    assert split.count(split.sequences) == 3
