"""Which documents the sequences of a split hold, and a choice of sequences from as many documents as possible.

Documents end with eos, which no text is encoded to; so counting eos tells them apart, whatever the index says of boundaries:

    concat, pad   sequences follow one another in the order of the text: a token belongs to the document that the number of eos
                  before it gives, counted from the beginning of its shard.
    best-fit      sequences are in another order, and pieces of one document are in several. Only a document that ends in a
                  sequence is known in it, so the number of different ones is a lower bound.

A document of which a sequence holds nothing but the eos is not in it, and neither is one whose only token there is the last,
which is a target only.

Cost: every sequence of the split is read once. Of a split above SCANNED tokens only some shards are, evenly spaced.

Shapes: n sequences of C + 1 tokens.
"""

from __future__ import annotations

import heapq
import logging
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.data.loading.order import Indices
from pipeline.data.loading.reader import BadExtent, TokenReader
from pipeline.errors import UserError

SCANNED = 1 << 26  # tokens: some 5 s on a busy core, 114 MB of memory, and 128 MB of a store
UNKNOWN = -1
GOLDEN = 0.6180339887498949  # its multiples modulo 1 fill [0, 1) evenly, however many are taken
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitDocuments:
    """The sequences of a split that can be read. sequences: their numbers, ascending; padded: which of them hold padding.
    pairs [m, 2]: (sequence, document) for each document in each sequence; UNKNOWN alone where none is known."""

    sequences: Indices
    padded: npt.NDArray[np.bool_]
    pairs: Indices

    def of(self, chosen: Indices) -> Indices:
        """The different documents in these sequences."""
        known = self.pairs[np.isin(self.pairs[:, 0], chosen) & (self.pairs[:, 1] != UNKNOWN)]
        documents: Indices = np.unique(known[:, 1])
        return documents

    def count(self, chosen: Indices) -> int:
        """From how many documents these sequences are samples: how many of them can be given a document each, all different
        (the largest matching). A page of a hundred short documents and a hundred pages of a book are two, not 101.

        At least 1 of any sequences."""
        held: dict[int, list[int]] = {number: [] for number in chosen.tolist()}
        for number, document in self.pairs[np.isin(self.pairs[:, 0], chosen)].tolist():
            if document != UNKNOWN:
                held[number].append(document)
        given: dict[int, int] = {}  # to each document its sequence
        of: dict[int, int] = {}  # and the other way round
        for first in held:
            asked, reached = [first], dict[int, int]()
            for number in asked:  # breadth first, until one has a free document; the others on the way pass theirs on
                new = [document for document in held[number] if document not in reached]
                reached |= dict.fromkeys(new, number)
                free = next((document for document in new if document not in given), None)
                if free is not None:
                    while free is not None:
                        document, taker = free, reached[free]
                        free = of.get(taker)
                        given[document], of[taker] = taker, document
                    break
                asked += [given[document] for document in new]
        return max(len(given), min(1, len(chosen)))

    def holding(self, documents: Indices) -> Indices:
        """The sequences that hold any of these documents."""
        return np.unique(self.pairs[np.isin(self.pairs[:, 1], documents), 0])


def documents_of(reader: TokenReader, *, pad_id: int, eos_id: int, skip: bool = False) -> SplitDocuments:
    """Read a split (of a large one: some shards) and tell its documents apart. `skip`: leave out what cannot be read.

    Raises like `TokenReader.read`, and UserError if nothing can be read."""
    sequences, padded, pairs = [], [], []
    starts = np.cumsum([0, *(shard.sequences for shard in reader.shards)])
    ended = 0  # documents before the next sequence
    for shard in _some_shards(reader):
        start, stop, step = int(starts[shard]), int(starts[shard + 1]), reader.index.block_sequences
        for first in range(start, stop, step):
            numbers = np.arange(first, min(first + step, stop))
            try:
                tokens = reader.read(numbers)
            except BadExtent as error:
                if not skip:
                    raise
                log.warning("left out: %s", error)
                if reader.is_local:  # the rest of the shard as well
                    break
                continue  # what a sequence after the gap begins with may be the document before it: counted as one
            sequences.append(numbers)
            padded.append((tokens == pad_id).any(axis=1))
            found, ended = _pairs(numbers, tokens, ended, packing=reader.index.packing, pad_id=pad_id, eos_id=eos_id)
            pairs.append(found)
        ended += 1  # a shard's last document may lack its end
    if not sequences:
        raise UserError(
            f"{reader.index.folder}: no sequence of the {reader.split} split can be read; run `pldr tokenize` again"
        )
    return SplitDocuments(np.concatenate(sequences), np.concatenate(padded), np.concatenate(pairs))


def _some_shards(reader: TokenReader) -> list[int]:
    """All shards, or evenly spaced ones that hold about SCANNED tokens, at least one."""
    tokens, shards = reader.num_sequences * (reader.index.context_length + 1), len(reader.shards)
    wanted = max(1, int(shards * min(1.0, SCANNED / tokens)))
    return [int(shard) for shard in np.unique(np.linspace(0, shards - 1, wanted).astype(int))]


def _pairs(
    numbers_n: Indices, tokens_nC: Indices, ended: int, *, packing: str, pad_id: int, eos_id: int
) -> tuple[Indices, int]:
    """(sequence, document) for each document in each of these sequences, and how many documents have ended after them; `ended`:
    before them."""
    inputs_nC = tokens_nC[:, :-1]
    # With concat a sequence's last token is the first of the next, and counted there.
    ends_n = ((inputs_nC if packing == "concat" else tokens_nC) == eos_id).sum(axis=1)
    before_n = ended + np.cumsum(ends_n) - ends_n
    is_end_nC = inputs_nC == eos_id
    inside_nC = np.cumsum(is_end_nC, axis=1) - is_end_nC
    known_nC = ~is_end_nC & (inputs_nC != pad_id)
    if packing == "best-fit":
        known_nC &= inside_nC < ends_n[:, None]
    rows, places = np.nonzero(known_nC)
    pairs = np.stack((numbers_n[rows], before_n[rows] + inside_nC[rows, places]), axis=1)
    changes = np.ones(len(pairs), dtype=np.bool_)
    changes[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    nothing = numbers_n[~known_nC.any(axis=1)]
    unknown = np.stack((nothing, np.full_like(nothing, UNKNOWN)), axis=1)
    return np.concatenate((pairs[changes], unknown)), ended + int(ends_n.sum())


def spread(split: SplitDocuments, candidates: Indices, count: int) -> Indices:
    """`count` of the candidates (numbers of sequences), or all if there are fewer: each in turn from a document of which the
    fewest are chosen, so that as many documents as possible are among the first. Where several would do, evenly spaced."""
    order = candidates[np.argsort(np.arange(len(candidates)) * GOLDEN % 1, kind="stable")]
    held: dict[int, list[int]] = {number: [] for number in order.tolist()}
    for number, document in split.pairs[np.isin(split.pairs[:, 0], candidates)].tolist():
        held[number].append(document)
    waiting: dict[int, deque[int]] = {}  # the sequences of each document
    for number, documents in held.items():
        for document in documents:
            waiting.setdefault(document, deque()).append(number)
    taken = dict.fromkeys(waiting, 0)
    turns = [(0, place, document) for place, document in enumerate(waiting)]
    chosen: dict[int, None] = {}
    while turns and len(chosen) < count:
        times, place, document = heapq.heappop(turns)
        while waiting[document] and waiting[document][0] in chosen:
            waiting[document].popleft()
        if not waiting[document]:
            continue
        if times == taken[document]:  # else others' sequences held it: its turn comes later
            number = waiting[document].popleft()
            chosen[number] = None
            for other in held[number]:
                taken[other] += 1
        heapq.heappush(turns, (taken[document], place, document))
    return np.array(list(chosen), dtype=np.int64)
