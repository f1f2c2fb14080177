"""Packing the tokens of documents into rows of one length, in three ways that each account for every token.

A row has C + 1 tokens, where C is the context length: inputs are the first C, targets the last C. The first token of a row is
never a target; so that no target is lost, a continuation row begins with the last token of the row before.

    concat     one stream, cut every C tokens. No padding; documents begin and end anywhere in a row.
    best-fit   documents that fit into a row are not cut, and are combined so that rows are nearly full, then padded (Ding et
               al. 2024, "Fewer Truncations Improve Language Modeling": best-fit decreasing). Longer ones are cut, never
               cropped.
    pad        each document (or piece of a long one) in its own row, padded.

Decision: best-fit and pad cut a long document into a short first piece and full rows. So the token that two pieces share is
always the first of a row: if the short piece came last and were packed after another document, that token would be a target
twice, once from the wrong document.

Decision: a row with a single token is not stored. It has no target, and a micro batch of only such rows has no loss (a mean
over nothing). So the last token of a shard may be dropped if no other token goes with it; it is counted as dropped.

Segments, if requested, number the documents of a row from 1, and 0 is padding: `seg_i == seg_j & seg_i > 0` is the mask that
keeps documents apart. A document continued from the row before counts as a new one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Numbers = npt.NDArray[np.int64]

WINDOW = 1 << 23  # tokens that best-fit packs together; leftovers are packed with the next window
MAX_CONTEXT = 65_534  # with boundaries: a row has at most C + 1 documents, numbered in uint16


class Block(NamedTuple):
    """Rows of C + 1 tokens, and segment numbers (uint16) of the same shape if they are kept."""

    tokens: Tokens
    segments: npt.NDArray[np.uint16] | None


class Packer:
    """Takes documents (each with its eos), yields blocks of `block_sequences` rows; only the last block may be shorter."""

    def __init__(
        self, context_length: int, block_sequences: int, *, dtype: str, pad_id: int = 0, boundaries: bool = False
    ) -> None:
        assert not boundaries or context_length <= MAX_CONTEXT
        self.context_length = context_length
        self.block_sequences = block_sequences
        self.dtype = dtype
        self.pad_id = pad_id
        self.boundaries = boundaries
        self._in = self._sequences = self._dropped = self._padded = 0

    def add(self, tokens: Tokens, lengths: Numbers) -> Iterator[Block]:
        """Add documents, concatenated, each at least its eos. Yields the blocks that are full now."""
        raise NotImplementedError

    def finish(self) -> Iterator[Block]:
        """Yield the remaining rows."""
        raise NotImplementedError

    def counts(self) -> dict[str, int]:
        """After `finish`: sequences (rows), tokens (distinct, in rows), tokens_in, tokens_dropped, tokens_padded."""
        return {
            "sequences": self._sequences,
            "tokens": self._in - self._dropped,
            "tokens_in": self._in,
            "tokens_dropped": self._dropped,
            "tokens_padded": self._padded,
        }


class Concat(Packer):
    """One stream. Row k holds its tokens [k*C, k*C + C]; `keep_rest`: the last row is padded, else dropped."""

    def __init__(self, *args: Any, keep_rest: bool = False, **more: Any) -> None:
        super().__init__(*args, **more)
        self.keep_rest = keep_rest
        self._kept: list[Tokens] = []  # not yet in a block; begins with the last token of the block before, if any
        self._lengths: list[Numbers] = []  # of the documents in _kept; the first may be the end of one
        self._waiting = 0

    def add(self, tokens: Tokens, lengths: Numbers) -> Iterator[Block]:
        self._in += len(tokens)
        self._kept.append(tokens)
        self._lengths.append(lengths)
        self._waiting += len(tokens)
        stride = self.block_sequences * self.context_length
        if self._waiting <= stride:
            return
        stream, owners = self._stream()
        while len(stream) > stride:
            yield self._block(stream[: stride + 1], owners[: stride + 1])
            stream, owners = stream[stride:], owners[stride:]
        self._kept, self._waiting = [stream.copy()], len(stream)  # a view would keep all of the stream in memory
        self._lengths = [np.bincount(owners - owners[0])] if self.boundaries else []

    def finish(self) -> Iterator[Block]:
        stream, owners = self._stream()
        if len(stream) < 2:  # one token predicts nothing; after a block it is that block's last token
            self._dropped = 0 if self._sequences else len(stream)
            return
        rest = (len(stream) - 1) % self.context_length
        if rest and self.keep_rest:
            self._padded = self.context_length - rest
            stream = np.concatenate([stream, np.full(self._padded, self.pad_id, dtype=self.dtype)])
        elif rest:
            self._dropped = rest if len(stream) > rest + 1 or self._sequences else len(stream)
            stream, owners = stream[: len(stream) - rest], owners[: len(stream) - rest]
        if len(stream) > 1:
            yield self._block(stream, owners)

    def counts(self) -> dict[str, int]:
        stored = self._sequences * self.context_length + 1 if self._sequences else 0
        assert self._in - self._dropped == stored - self._padded, f"{self._in} in, {self._dropped} dropped, {stored}"
        return super().counts()

    def _stream(self) -> tuple[Tokens, Numbers]:
        """The pending tokens in one array, and with boundaries the number of each token's document."""
        stream = np.concatenate([np.empty(0, dtype=self.dtype), *self._kept])
        if not self.boundaries:
            return stream, np.empty(0, np.int64)
        lengths = np.concatenate([np.empty(0, np.int64), *self._lengths])
        return stream, np.repeat(np.arange(len(lengths)), lengths)

    def _block(self, stream: Tokens, owners: Numbers) -> Block:
        """[n * C + 1] tokens as n rows of C + 1, each beginning with the last token of the row before."""
        tokens = self._rows(stream)
        self._sequences += len(tokens)
        if not self.boundaries:
            return Block(tokens, None)
        padded = len(stream) - len(owners)
        rows = self._rows(np.concatenate([owners, np.full(padded, -1)]))
        segments = np.where(rows < 0, 0, rows - rows[:, :1] + 1)
        return Block(tokens, segments.astype(np.uint16))

    def _rows(self, stream: npt.NDArray[Any]) -> npt.NDArray[Any]:
        windows = np.lib.stride_tricks.sliding_window_view(stream, self.context_length + 1)
        return np.ascontiguousarray(windows[:: self.context_length])


class _Pieces(Packer):
    """Documents cut into a first piece of at most C + 1 tokens, and full rows that overlap by one token."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._kept: list[Tokens] = []  # documents not yet in rows
        self._lengths: list[Numbers] = []
        self._waiting = 0  # their tokens
        self._full: list[Block] = []  # rows of an unfinished block
        self._stored = self._overlaps = 0  # tokens in rows; those that are in two rows

    @property
    def window(self) -> int:
        """Tokens that are packed together."""
        raise NotImplementedError

    def rows_of(self, lengths: Numbers) -> Numbers:
        """The row of each piece, 0-based and without gaps."""
        raise NotImplementedError

    def add(self, tokens: Tokens, lengths: Numbers) -> Iterator[Block]:
        self._in += len(tokens)
        self._kept.append(tokens)
        self._lengths.append(lengths)
        self._waiting += len(tokens)
        if self._waiting >= self.window:
            yield from self._pack(last=False)

    def finish(self) -> Iterator[Block]:
        yield from self._pack(last=True)

    def counts(self) -> dict[str, int]:
        cells = self._sequences * (self.context_length + 1)
        assert self._stored + self._padded == cells, f"{self._stored} stored, {self._padded} padded, {cells} cells"
        assert self._in + self._overlaps == self._stored + self._dropped, "tokens lost"
        return super().counts()

    def _pack(self, *, last: bool) -> Iterator[Block]:
        """Pack pending documents. A token that would be alone in a row waits for the next window; the last window drops it."""
        stream = np.concatenate([np.empty(0, dtype=self.dtype), *self._kept])
        starts, lengths = _pieces(np.concatenate([np.empty(0, np.int64), *self._lengths]), self.context_length)
        self._overlaps += int(lengths.sum()) - len(stream)
        rows = self.rows_of(lengths)
        alone = np.bincount(rows, lengths)[rows] == 1 if len(rows) else np.zeros(0, dtype=bool)
        waiting = starts[:0] if last else starts[alone]
        self._kept, self._lengths = [stream[waiting]], [np.ones_like(waiting)]
        self._waiting = len(waiting)
        self._dropped += int(alone.sum()) - len(waiting)
        yield from self._emit(stream, *_in_order(starts[~alone], lengths[~alone], rows[~alone]), last=last)

    def _emit(self, stream: Tokens, starts: Numbers, lengths: Numbers, rows: Numbers, *, last: bool) -> Iterator[Block]:
        """Rows as blocks. Rows are numbered in order, and so are the pieces in them."""
        total = int(rows[-1]) + 1 if len(rows) else 0
        row = 0
        while row < total:
            room = self.block_sequences - sum(len(block.tokens) for block in self._full)
            end = min(row + room, total)
            of_block = slice(*np.searchsorted(rows, [row, end]))
            self._full.append(self._fill(stream, starts[of_block], lengths[of_block], rows[of_block] - row, end - row))
            if end - row == room:
                yield self._flush()
            row = end
        if last and self._full:
            yield self._flush()

    def _flush(self) -> Block:
        parts, self._full = self._full, []
        segments = [part.segments for part in parts if part.segments is not None]
        return Block(np.concatenate([p.tokens for p in parts]), np.concatenate(segments) if segments else None)

    def _fill(self, stream: Tokens, starts: Numbers, lengths: Numbers, rows: Numbers, count: int) -> Block:
        """`count` rows: pieces one after another, then padding."""
        width = self.context_length + 1
        ends = np.cumsum(lengths)
        before = ends - lengths  # tokens of the pieces before, over all rows
        first = np.searchsorted(rows, rows)  # the first piece of each piece's row
        inside = np.arange(ends[-1])
        source = np.repeat(starts - before, lengths) + inside
        target = np.repeat(rows * width - before[first], lengths) + inside
        tokens = np.full(count * width, self.pad_id, dtype=self.dtype)
        tokens[target] = stream[source]
        segments = None
        if self.boundaries:
            flat = np.zeros(count * width, dtype=np.uint16)
            flat[target] = np.repeat(np.arange(len(rows)) - first + 1, lengths)
            segments = flat.reshape(count, width)
        self._sequences += count
        self._stored += int(ends[-1])
        self._padded += count * width - int(ends[-1])
        return Block(tokens.reshape(count, width), segments)


class Pad(_Pieces):
    """Each piece in its own row."""

    def add(self, tokens: Tokens, lengths: Numbers) -> Iterator[Block]:
        several = lengths > 1  # a single token would be alone in its row
        self._in += int((~several).sum())
        self._dropped += int((~several).sum())
        yield from super().add(tokens[np.repeat(several, lengths)], lengths[several])

    @property
    def window(self) -> int:
        return self.block_sequences * self.context_length

    def rows_of(self, lengths: Numbers) -> Numbers:
        return np.arange(len(lengths))


class BestFit(_Pieces):
    """Pieces of a window combined by `best_fit`."""

    @property
    def window(self) -> int:
        return WINDOW

    def rows_of(self, lengths: Numbers) -> Numbers:
        return best_fit(lengths, self.context_length + 1)


def make_packer(settings: dict[str, Any], *, pad_id: int) -> Packer:
    """The packer for an index's settings."""
    kinds: dict[str, type[Packer]] = {"concat": Concat, "best-fit": BestFit, "pad": Pad}
    more = {"keep_rest": settings["remainder"] == "pad"} if settings["packing"] == "concat" else {}
    return kinds[settings["packing"]](
        settings["context_length"],
        settings["block_sequences"],
        dtype=settings["dtype"],
        pad_id=pad_id,
        boundaries=settings["boundaries"],
        **more,
    )


def best_fit(lengths: Numbers, room: int) -> Numbers:
    """Best-fit decreasing: the row of each piece, with rows of `room` tokens. Longest pieces first, each into the row where it
    leaves the least free room.

    Pieces of equal length are placed together: a row that took one is still the best fit for the next one of that length while
    it has room. So the number of steps grows with the number of different lengths, not of pieces.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    bounds = np.flatnonzero(np.diff(lengths[order], prepend=-1, append=-1))
    free: dict[int, list[int]] = {}  # room left -> rows with exactly that much
    rooms: list[int] = []  # the keys of `free`, sorted
    opened = 0

    def put_back(left: int, given: list[int]) -> None:
        if left and given:
            if left not in free:
                insort(rooms, left)
                free[left] = []
            free[left] += given

    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        length = int(lengths[order[begin]])
        while begin < end:
            at = bisect_left(rooms, length)
            left = rooms[at] if at < len(rooms) else room
            each = left // length  # pieces that such a row takes
            wanted = -(-(end - begin) // each)
            if at < len(rooms):
                taken, free[left] = free[left][:wanted], free[left][wanted:]
                if not free[left]:
                    del free[left], rooms[at]
            else:
                taken = list(range(opened, opened + wanted))
                opened += wanted
            count = min(len(taken) * each, end - begin)
            rows[order[begin : begin + count]] = np.repeat(taken, each)[:count]
            in_last = count - (len(taken) - 1) * each
            put_back(left - each * length, taken[:-1])
            put_back(left - in_last * length, taken[-1:])
            begin += count
    return rows


def _pieces(documents: Numbers, context: int) -> tuple[Numbers, Numbers]:
    """(start in the stream, length) of each piece of documents of these lengths, in order."""
    more = np.maximum(0, -(-(documents - 1 - context) // context))  # full rows after the first piece
    first = documents - more * context  # its length: at least two, or the entire document
    number = np.arange(len(documents) + more.sum()) - np.repeat(
        np.cumsum(more + 1) - more - 1, more + 1
    )  # in its document
    begins = np.cumsum(documents) - documents
    starts = np.repeat(begins, more + 1) + np.where(number, np.repeat(first - 1, more + 1) + (number - 1) * context, 0)
    return starts, np.where(number, context + 1, np.repeat(first, more + 1))


def _in_order(starts: Numbers, lengths: Numbers, rows: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Pieces sorted by row and position in the stream, rows renumbered by their first piece: neighbors in the corpus stay
    neighbors, and long and short documents stay mixed."""
    _, first, number = np.unique(rows, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    rows = rank[number]
    order = np.argsort(rows, kind="stable")
    return starts[order], lengths[order], rows[order]
