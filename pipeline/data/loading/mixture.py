"""`data.phases`: which source each position of the training order is of, and which of its sequences. A pure function of
(fingerprint, seed, phases, where they begin, position), like order.py, which it uses for the order of one source's sequences.

A phase is a range of positions with a share for each source. It is cut into blocks of BLOCK positions:

1. How many sequences of source k come before block b of a phase is `T_k(b) - T_{k-1}(b)`, where T_k(b) is the sum of the
   first k shares times the positions before the block, rounded. So at every block's beginning each source is within one
   sequence of its share, however long the phase.
2. Inside a block the sources' places are a keyed permutation.
3. The n-th place of a source, counted from the beginning of training through all phases, takes the n-th sequence of that
   source's own order: every sequence is used before one is used again, also across phases.

Where a run goes on with other phases (`Begin`, pipeline/config/phases.py), they begin at that position, in the middle of one or
not, and the places before it are those that the checkpoint has counted.

Shares are exact fractions, so no machine rounds them otherwise. Memory does not grow with the corpus or with the run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config.data import MIXTURE_BLOCK as BLOCK
from pipeline.config.phases import RECORDED, Begin, PlannedPhase, begin_of, planned_phases
from pipeline.config.run import RunConfig
from pipeline.data.loading.order import Indices, Order, permute
from pipeline.data.tokens.index import TokenIndex
from pipeline.errors import UserError

VERSION = "pldr-mixture-1"  # any change below changes the data order of runs with phases: change this version with it


class Mixture:
    """The order of training with phases. `ranges`: by source, the sequence numbers [first, after the last) of its shards;
    `begin`: where the phases begin. Positions before it are not this order's."""

    def __init__(
        self,
        phases: Sequence[PlannedPhase],
        ranges: Mapping[str, Sequence[tuple[int, int]]],
        *,
        block_sequences: int,
        fingerprint: str,
        seed: int,
        begin: Begin | None = None,
    ) -> None:
        self._phases, self._names = phases, list(ranges)
        self.begin = begin = begin or Begin()
        self._numbers = [
            np.concatenate([[0], np.cumsum([end - begin for begin, end in own])]) for own in ranges.values()
        ]
        self._first = [np.array([begin for begin, _ in own]) for own in ranges.values()]
        self._orders = [
            Order(
                num_sequences=int(ends[-1]),
                block_sequences=block_sequences,
                fingerprint=f"{fingerprint}|{source}",
                seed=seed,
            )
            for source, ends in zip(ranges, self._numbers, strict=True)
        ]
        of_begin = f"|{begin.position}" if begin.position else ""
        digest = hashlib.sha256(f"{VERSION}|{fingerprint}|{seed}{of_begin}".encode()).digest()
        self._key = int.from_bytes(digest[:8], "little")
        self._block = lru_cache(maxsize=64)(self._sources_of_block)
        self._begins = [begin.position]
        self._used = [np.array([begin.drawn.get(source, 0) for source in self._names], dtype=np.int64)]
        for number, phase in enumerate(phases[:-1]):
            end = max(begin.position, phase.end)
            self._used.append(self._used[-1] + self._before(number, end - self._begins[-1]))
            self._begins.append(end)

    def global_batch(self, start: int, size: int) -> Indices:
        """Sequence numbers [size] at the positions from `start` on."""
        assert start >= self.begin.position, "an order of its own, which other phases decided"
        sources, numbers = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
        done = 0
        while done < size:
            phase = int(np.searchsorted(self._begins, start + done, side="right")) - 1
            block, offset = divmod(start + done - self._begins[phase], BLOCK)
            ends = self._begins[phase + 1] if phase + 1 < len(self._begins) else None
            count = min(BLOCK - offset, size - done, *([] if ends is None else [ends - start - done]))
            of_block = self._block(phase, block)
            here = slice(done, done + count)
            sources[here] = of_block[offset : offset + count]
            before = self._used[phase] + self._before(phase, block * BLOCK + offset)
            for source in np.unique(sources[here]):
                mine = sources[here] == source
                numbers[here][mine] = before[source] + np.arange(int(mine.sum()))
            done += count
        out = np.empty(size, dtype=np.int64)
        for source in np.unique(sources):
            mine = sources == source
            out[mine] = self._sequences(int(source), numbers[mine])
        return out

    def drawn(self, position: int) -> Indices:
        """How many sequences of each source come before a position."""
        phase = int(np.searchsorted(self._begins, position, side="right")) - 1
        return self._used[phase] + self._before(phase, position - self._begins[phase])

    def recorded(self, position: int) -> dict[str, Any]:
        """What state.json keeps of this order at a position, for a run that goes on from there (`begin_of`)."""
        drawn = zip(self._names, self.drawn(position).tolist(), strict=True)
        phases = [phase.recorded() for phase in self._phases]
        return {RECORDED: {"drawn": dict(drawn), "begin": asdict(self.begin), "phases": phases}}

    def _sequences(self, source: int, numbers: Indices) -> Indices:
        """Sequence numbers at places of a source's own order, epoch after epoch."""
        order, ends = self._orders[source], self._numbers[source]
        epochs, places = np.divmod(numbers, order.num_sequences)
        local = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            local[epochs == epoch] = order.sequences(int(epoch), places[epochs == epoch])
        shard = np.searchsorted(ends, local, side="right") - 1
        found: Indices = self._first[source][shard] + local - ends[shard]
        return found

    def _before(self, phase: int, count: int) -> Indices:
        """How many of the first `count` positions of a phase each source has."""
        block, rest = divmod(count, BLOCK)
        before: Indices = np.diff(self._cumulative(phase, block))
        return before + np.bincount(self._block(phase, block)[:rest], minlength=len(self._orders)) if rest else before

    def _cumulative(self, phase: int, block: int) -> Indices:
        """T_0 ... T_n at the beginning of a block: the rounded sums of shares."""
        sums = [Fraction(0)]
        shares = self._phases[phase].shares
        for source in self._names:
            sums.append(sums[-1] + shares.get(source, 0))
        return np.array([(2 * s * block * BLOCK + 1) // 2 for s in sums], dtype=np.int64)

    def _sources_of_block(self, phase: int, block: int) -> npt.NDArray[np.int64]:
        """The source of each position of a block."""
        counts = np.diff(self._cumulative(phase, block + 1)) - np.diff(self._cumulative(phase, block))
        assert counts.min() >= 0 and counts.sum() == BLOCK, counts
        digest = hashlib.sha256(f"{self._key}|{phase}|{block}".encode()).digest()
        keys = np.full(BLOCK, int.from_bytes(digest[:8], "little"), dtype=np.uint64)
        slots = permute(np.arange(BLOCK), BLOCK, keys)
        return np.searchsorted(np.cumsum(counts), slots, side="right").astype(np.int64)


def mixture_of(index: TokenIndex, config: RunConfig, state: Mapping[str, Any]) -> Mixture | None:
    """The order of the train split with `data.phases`; None without them. state: state.json of the checkpoint that training
    goes on from; empty at step 0.

    Raises UserError when the shards are not of one source each, or a source that is drawn has no sequence.
    """
    if config.data.phases is None:
        return None
    ranges: dict[str, list[tuple[int, int]]] = {}
    begin = 0
    for shard in index.of_split("train"):
        if not shard.source:
            raise UserError(
                f"{index.folder}: its shards mix sources, and data.phases needs one source a shard; set "
                "data.separate_sources=true and run `pldr shard` again"
            )
        ranges.setdefault(shard.source, []).append((begin, begin + shard.sequences))
        begin += shard.sequences
    for phase in config.data.phases:
        if missing := phase.weights.keys() - ranges.keys():
            raise UserError(
                f"data.phases: {index.folder} has no training sequence of a source {min(missing)!r}; its sources: "
                f"{', '.join(sorted(ranges))}"
            )
    begins = begin_of(config, state)
    return Mixture(
        planned_phases(config, begins),
        ranges,
        block_sequences=index.block_sequences,
        fingerprint=index.fingerprint,
        seed=config.seed,
        begin=begins,
    )
