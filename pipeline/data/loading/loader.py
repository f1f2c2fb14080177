"""From the data order to micro batches: read ahead, consistent on all ranks, without damaged data.

The content of a global batch depends only on the index, the seed, the position in the order, and which extents (reader.py) are
bad. Ranks take equal consecutive slices of it, and micro batches are consecutive slices of those.

The order is computed and its extents are opened in chunks of positions, one chunk ahead of the one being read, on FETCHERS
threads (hashing a shard, downloading a block). With `data.on_bad_shard: skip` the ranks check all extents of a chunk before any
batch is formed from it, agree which are bad for any of them, and leave their sequences out; later ones move up. The verdict is
about the extent, not the time at which it was found, so a resumed run forms the same batches as an uninterrupted one: it only
needs the position, which counts the sequences left out.
"""

from __future__ import annotations

import copy
import logging
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.data.loading.mixture import Mixture
from pipeline.data.loading.order import WINDOW_BLOCKS, Indices, Order
from pipeline.data.loading.reader import BadExtent, Extent, TokenReader
from pipeline.errors import UserError

PREFETCH = 2  # global batches read ahead
CHUNK = 4096  # positions handled together, at most a window of the order: computing 32 takes 0.9 ms, 4,096 take 2 ms
ROWS = 256  # of a rank that are read together: three times as fast as 32
AHEAD = 2  # chunks whose extents are being opened: the next one to read, and the one after it
FETCHERS = 8
CLOSE_S = 5.0
Agree = Callable[[list[bool]], list[bool]]
OnBadShard = Literal["error", "skip"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Chunk:
    """Sequences at consecutive positions of the order, and the extents they need, which are being opened."""

    start: int
    ids: Indices
    extents: list[Extent]
    opened: list[Future[None]]


class TrainLoader:
    """Global batches of a split for one rank, starting at any position of the order."""

    def __init__(
        self,
        reader: TokenReader,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        on_bad_shard: OnBadShard = "error",
        agree: Agree | None = None,
        order: Order | Mixture | None = None,
        documents: bool = False,
    ) -> None:
        """global_batch and micro_batch count sequences; micro_batch is per rank and forward pass. order: None: all sequences,
        by `seed`.

        documents: micro batches say which document each token is of; the reader was opened with `segments`.
        agree: for on_bad_shard "skip" with more than one rank: takes this rank's verdicts and returns, on every rank, their
        logical or over all ranks. Called by the thread that reads ahead, equally often on all ranks.

        Raises UserError if a global batch is not a multiple of micro_batch * world_size.
        """
        assert 0 <= rank < world_size
        assert world_size == 1 or on_bad_shard == "error" or agree is not None, "ranks must agree on what to leave out"
        self.reader = reader
        self.micro_batch = micro_batch
        self._rank, self._world_size = rank, world_size
        self._take(global_batch)
        self.num_sequences = reader.num_sequences
        self._width = reader.index.context_length + 1
        self._read = reader.read_with_documents if documents else reader.read
        # Where in a chunk this rank begins to open extents, so that the ranks of a node share the work.
        self._first_extent = rank / world_size
        self._skip = on_bad_shard == "skip"
        self._agree: Agree = agree or (lambda verdicts: verdicts)
        self._bad: set[Extent] = set()
        self._left_out: Counter[str] = Counter()
        self._order = order or Order(
            num_sequences=reader.num_sequences,
            block_sequences=reader.index.block_sequences,
            fingerprint=reader.index.fingerprint,
            seed=seed,
        )

    def of_batch(self, global_batch: int) -> TrainLoader:
        """This loader with global batches of another size: the same reader, order and list of what is bad. One iterator must be
        exhausted before the other begins. Raises as the constructor does."""
        other = copy.copy(self)
        other._take(global_batch)
        return other

    def _take(self, global_batch: int) -> None:
        """This rank's share of global batches of this size."""
        together = self.micro_batch * self._world_size
        if global_batch % together:
            raise UserError(
                f"train.global_batch {global_batch} is not a multiple of train.micro_batch {self.micro_batch} x "
                f"{self._world_size} ranks; set train.global_batch to a multiple of {together}, or train.micro_batch to a "
                "divisor"
            )
        share = global_batch // self._world_size
        self.global_batch = global_batch
        self._slice = slice(self._rank * share, (self._rank + 1) * share)

    @property
    def left_out(self) -> dict[str, object]:
        """What was bad and left out so far: {"shards": names, "sequences": number of positions that were skipped}."""
        names = sorted({self.reader.shards[shard].name for shard, _ in list(self._bad)})
        return {"shards": names, "sequences": self._left_out["sequences"]}

    def indices(self, position: int) -> Indices:
        """The sequence numbers [global_batch] of the batch that begins at a position, if nothing is left out."""
        return self._order.global_batch(position, self.global_batch)

    def recorded(self, position: int) -> dict[str, Any]:
        """What state.json keeps of the order at a position: with `data.phases`, what was drawn of each source."""
        return self._order.recorded(position) if isinstance(self._order, Mixture) else {}

    def micro_batches(self, position: int, *, limit: int | None = None) -> Iterator[tuple[list[Indices], int]]:
        """Global batches from a position of the order (0: the beginning); `limit` of them, or without end.

        Yields this rank's micro batches, each int64 [micro_batch, context_length + 1], or with `documents` [2, micro_batch,
        context_length + 1], and the position after the batch, where the next one begins. A thread reads PREFETCH batches
        ahead, and its errors are raised here: UserError naming a bad shard, or, with "skip", when no good one is left. If
        ranks have to agree, exhaust a limited iterator before closing it:
        ranks that stop at different times would wait for one another.
        """
        ready: queue.Queue[tuple[list[Indices], int] | BaseException | None] = queue.Queue(maxsize=PREFETCH)
        stop = threading.Event()

        def put(item: tuple[list[Indices], int] | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def fill() -> None:
            fetchers = _Fetchers(FETCHERS)
            try:
                for batch in islice(self._rows(position, limit, fetchers), limit):
                    if stop.is_set():
                        return
                    put(batch)
                put(None)
            except BaseException as error:
                put(error)
            finally:
                fetchers.stop()

        thread = threading.Thread(target=fill, name="token-prefetch", daemon=True)
        if limit is not None and limit < 1:
            return
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                self._left_out["sequences"] += item[1] - position - self.global_batch
                position = item[1]
                yield item
        finally:
            stop.set()
            thread.join(CLOSE_S)  # with a timeout: it may be waiting for a rank that is gone

    def _rows(self, position: int, limit: int | None, fetchers: _Fetchers) -> Iterator[tuple[list[Indices], int]]:
        """What `micro_batches` yields. Several batches are read at once, so that a block is copied from once."""
        share = self._slice.stop - self._slice.start
        together = -(-ROWS // share)
        for ids, ends in self._batches(position, limit, fetchers):
            for first in range(0, len(ids), together):
                mine = ids[first : first + together, self._slice]
                rows = self._read(mine.ravel())
                micro = rows.reshape(*rows.shape[:-2], len(mine), -1, self.micro_batch, self._width)
                for number in range(len(mine)):
                    yield list(np.moveaxis(micro[..., number, :, :, :], -3, 0)), int(ends[first + number])

    def _batches(self, position: int, limit: int | None, fetchers: _Fetchers) -> Iterator[tuple[Indices, Indices]]:
        """(sequence numbers [n, global_batch], position after each batch [n]): the complete global batches that can be formed
        after each chunk; at least `limit` in total."""
        ids = positions = np.empty(0, dtype=np.int64)
        after_good = position
        for chunk in self._chunks(position, limit, fetchers):
            good = self._good(chunk)
            ids = np.concatenate([ids, chunk.ids[good]])
            positions = np.concatenate([positions, chunk.start + np.flatnonzero(good)])
            if good.any():
                after_good = int(positions[-1]) + 1
            elif chunk.start + len(good) - after_good >= 2 * self.num_sequences:  # a full epoch, wherever it begins
                raise UserError(
                    f"{self.reader.index.folder}: every shard of the {self.reader.split} split is missing or damaged; "
                    "run `pldr tokenize` again"
                )
            complete = len(ids) // self.global_batch * self.global_batch
            yield (
                ids[:complete].reshape(-1, self.global_batch),
                positions[self.global_batch - 1 : complete : self.global_batch] + 1,
            )
            ids, positions = ids[complete:], positions[complete:]

    def _chunks(self, position: int, limit: int | None, fetchers: _Fetchers) -> Iterator[_Chunk]:
        """The order in chunks of complete global batches, with AHEAD of them being opened at any time. Their size affects
        only when extents are opened."""
        window = WINDOW_BLOCKS * self.reader.index.block_sequences
        batches = -(-min(CHUNK, window) // self.global_batch)
        size = (batches if limit is None else min(batches, limit)) * self.global_batch
        end = None if limit is None or self._skip else position + limit * self.global_batch
        planned: deque[_Chunk] = deque()
        while True:
            while len(planned) < AHEAD and (end is None or position < end):
                planned.append(self._plan(position, size if end is None else min(size, end - position), fetchers))
                position += size
            if not planned:
                return
            yield planned.popleft()

    def _plan(self, start: int, size: int, fetchers: _Fetchers) -> _Chunk:
        ids = self._order.global_batch(start, size)
        # If nothing is left out, batches are already known, and a rank opens only the extents of its own rows.
        mine = ids if self._skip else ids.reshape(-1, self.global_batch)[:, self._slice].ravel()
        extents = self.reader.extents_of(mine)
        begin = int(self._first_extent * len(extents))
        opened: list[Future[None]] = [Future() for _ in extents]
        for number in [*range(begin, len(extents)), *range(begin)]:
            fetchers.submit(self.reader, extents[number], opened[number])
        return _Chunk(start, ids, extents, opened)

    def _good(self, chunk: _Chunk) -> npt.NDArray[np.bool_]:
        """Which sequences of a chunk are used: all of them (or BadExtent is raised), unless bad extents are skipped."""
        verdicts = []
        for extent, opened in zip(chunk.extents, chunk.opened, strict=True):
            error = opened.exception()
            if error is not None and not (self._skip and isinstance(error, BadExtent)):
                raise error
            if error is not None and extent not in self._bad:
                log.warning("left out: %s", error)
            verdicts.append(error is not None)
        if not self._skip:
            return np.ones(len(chunk.ids), dtype=np.bool_)
        agreed = self._agree(verdicts)
        bad = {extent for extent, is_bad in zip(chunk.extents, agreed, strict=True) if is_bad}
        for extent in sorted(bad - self._bad - {e for e, own in zip(chunk.extents, verdicts, strict=True) if own}):
            log.warning("left out: %s, which another rank cannot read", self.reader.name(extent))
        self._bad |= bad
        return np.logical_not(self.reader.in_extents(chunk.ids, bad))


def evenly_spread(
    reader: TokenReader, candidates: Indices, count: int, *, skip: bool = False, agree: Agree | None = None
) -> Indices:
    """`count` of the candidates (sequence numbers), or all if there are fewer, evenly spaced; with `skip`, only those that
    every rank can read. Collective if ranks have to agree. Raises UserError if there are none."""
    while True:
        if not len(candidates):
            raise UserError(
                f"{reader.index.folder}: no sequence of the {reader.split} split can be read; run `pldr tokenize` again"
            )
        wanted = min(count, len(candidates))
        chosen: Indices = candidates[np.linspace(0, len(candidates) - 1, wanted).astype(int)]
        if not skip:
            return chosen
        extents = reader.extents_of(chosen)
        verdicts = _judge(reader, extents)
        bad = {extent for extent, is_bad in zip(extents, agree(verdicts) if agree else verdicts, strict=True) if is_bad}
        if not bad:
            return chosen
        candidates = candidates[np.logical_not(reader.in_extents(candidates, bad))]


def _judge(reader: TokenReader, extents: list[Extent]) -> list[bool]:
    """Which of these extents are bad."""
    fetchers = _Fetchers(FETCHERS)
    opened: list[Future[None]] = [Future() for _ in extents]
    for extent, result in zip(extents, opened, strict=True):
        fetchers.submit(reader, extent, result)
    errors = [result.exception() for result in opened]
    fetchers.stop()
    for error in errors:
        if isinstance(error, BadExtent):
            log.warning("left out: %s", error)
        elif error is not None:
            raise error
    return [error is not None for error in errors]


class _Fetchers:
    """Threads that open extents. Daemons, unlike those of ThreadPoolExecutor, so that exit does not wait for a network."""

    def __init__(self, count: int) -> None:
        self._work: queue.SimpleQueue[tuple[TokenReader, Extent, Future[None]] | None] = queue.SimpleQueue()
        self._stopped = False
        self._count = count
        self._threads: list[threading.Thread] = []

    def submit(self, reader: TokenReader, extent: Extent, opened: Future[None]) -> None:
        self._work.put((reader, extent, opened))
        if len(self._threads) < self._count:
            self._threads.append(threading.Thread(target=self._run, name="token-fetch", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        self._stopped = True
        for _ in self._threads:
            self._work.put(None)

    def _run(self) -> None:
        while (item := self._work.get()) is not None and not self._stopped:
            reader, extent, opened = item
            try:
                reader.open(extent)
                opened.set_result(None)
            except BaseException as error:
                opened.set_exception(error)
