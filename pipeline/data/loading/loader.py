"""The order's sequences to micro batches: read ahead, the same on every rank, and nothing that is damaged.

What a global batch holds depends on the index, the seed, the position in the order and which units (reader.py) are bad; on
nothing else. Ranks take equal consecutive slices of it, micro batches are consecutive slices of those.

The order is computed and its units opened in chunks of positions, one chunk ahead of the one being read, on FETCHERS threads
(a shard's sha256, a block's download). With `data.on_bad_shard: skip` the ranks look at all units of a chunk before any
batch is formed from it, agree which are bad for any of them, and leave those sequences out; what follows moves up. That
verdict belongs to the unit, not to the moment it was found, so a run that resumes forms the same batches as one that was
never interrupted: it only has to know the position, which counts what was left out.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.data.loading.order import WINDOW_BLOCKS, Indices, Order
from pipeline.data.loading.reader import BadUnit, TokenReader, Unit
from pipeline.errors import UserError

PREFETCH = 2  # global batches read ahead
CHUNK = 4096  # positions looked at together, or a window of the order where that is less: computing 32 costs 0.9 ms, 4,096 2 ms
ROWS = 256  # of a rank, read together: three times as fast as 32
AHEAD = 2  # chunks whose units are being opened: the one that is read next, and the one behind it
FETCHERS = 8
CLOSE_S = 5.0
Agree = Callable[[list[bool]], list[bool]]
OnBadShard = Literal["error", "skip"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Chunk:
    """Sequences at consecutive positions of the order, and the units they need, which are being opened."""

    start: int
    ids: Indices
    units: list[Unit]
    opened: list[Future[None]]


class TrainLoader:
    """Global batches of a split for one rank, from any position of the order on."""

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
    ) -> None:
        """global_batch and micro_batch count sequences; micro_batch is per rank and forward pass.

        agree: with on_bad_shard "skip" and more than one rank: takes this rank's verdicts and gives back, on every rank,
        which of them any rank has. Called by the thread that reads ahead, equally often on all ranks.

        Raises UserError when world_size ranks cannot share a global batch in whole micro batches.
        """
        if global_batch % (micro_batch * world_size):
            raise UserError(
                f"train.global_batch {global_batch} is no multiple of train.micro_batch {micro_batch} x {world_size} ranks; "
                f"set train.global_batch to a multiple of {micro_batch * world_size}, or train.micro_batch to a divisor"
            )
        assert 0 <= rank < world_size
        assert world_size == 1 or on_bad_shard == "error" or agree is not None, "ranks must agree on what to leave out"
        self.reader = reader
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.num_sequences = reader.num_sequences
        self._width = reader.index.context_length + 1
        share = global_batch // world_size
        self._slice = slice(rank * share, (rank + 1) * share)
        self._turn = (
            rank / world_size
        )  # where in a chunk this rank begins to open units: ranks of a node share the work
        self._skip = on_bad_shard == "skip"
        self._agree: Agree = agree or (lambda verdicts: verdicts)
        self._bad: set[Unit] = set()
        self._left_out = 0
        self._order = Order(
            num_sequences=reader.num_sequences,
            block_sequences=reader.index.block_sequences,
            fingerprint=reader.index.fingerprint,
            seed=seed,
        )

    @property
    def left_out(self) -> dict[str, object]:
        """What was bad so far and so is in no batch: {"shards": names, "sequences": how many positions were passed over}."""
        names = sorted({self.reader.shards[shard].name for shard, _ in list(self._bad)})
        return {"shards": names, "sequences": self._left_out}

    def indices(self, position: int) -> Indices:
        """The sequence numbers [global_batch] of the batch that begins at a position, where nothing is left out."""
        return self._order.global_batch(position, self.global_batch)

    def micro_batches(self, position: int, *, limit: int | None = None) -> Iterator[tuple[list[Indices], int]]:
        """Global batch after global batch from a position of the order (0: the beginning) on; `limit` of them, or no end.

        Yields this rank's micro batches, each int64 [micro_batch, context_length + 1], and the position behind the batch,
        where the next one begins. Read PREFETCH batches ahead on a thread, whose errors are raised here: UserError naming a
        shard that is bad, or, with "skip", when no good one is left. With ranks that agree, close a limited iterator only
        at its end: ranks that stop at different times wait for one another.
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
                self._left_out += item[1] - position - self.global_batch
                position = item[1]
                yield item
        finally:
            stop.set()
            thread.join(CLOSE_S)  # not for ever: it may wait for a rank that is gone

    def _rows(self, position: int, limit: int | None, fetchers: _Fetchers) -> Iterator[tuple[list[Indices], int]]:
        """What `micro_batches` yields. Several batches are read at once: what they need of a block is one copy."""
        share = self._slice.stop - self._slice.start
        together = -(-ROWS // share)
        for ids, behind in self._batches(position, limit, fetchers):
            for first in range(0, len(ids), together):
                mine = ids[first : first + together, self._slice]
                micro = self.reader.read(mine.ravel()).reshape(len(mine), -1, self.micro_batch, self._width)
                for number, rows in enumerate(micro, first):
                    yield list(rows), int(behind[number])

    def _batches(self, position: int, limit: int | None, fetchers: _Fetchers) -> Iterator[tuple[Indices, Indices]]:
        """(sequence numbers [n, global_batch], position behind each batch [n]): the whole global batches that can be formed
        after each chunk; at least `limit` in all."""
        ids = positions = np.empty(0, dtype=np.int64)
        behind_good = position
        for chunk in self._chunks(position, limit, fetchers):
            good = self._good(chunk)
            ids = np.concatenate([ids, chunk.ids[good]])
            positions = np.concatenate([positions, chunk.start + np.flatnonzero(good)])
            if good.any():
                behind_good = int(positions[-1]) + 1
            elif chunk.start + len(good) - behind_good >= 2 * self.num_sequences:  # a whole epoch, wherever that begins
                raise UserError(
                    f"{self.reader.index.folder}: every shard of the {self.reader.split} split is missing or damaged; "
                    "run `pldr tokenize` again"
                )
            whole = len(ids) // self.global_batch * self.global_batch
            yield (
                ids[:whole].reshape(-1, self.global_batch),
                positions[self.global_batch - 1 : whole : self.global_batch] + 1,
            )
            ids, positions = ids[whole:], positions[whole:]

    def _chunks(self, position: int, limit: int | None, fetchers: _Fetchers) -> Iterator[_Chunk]:
        """The order in chunks of whole global batches, AHEAD of them being opened at any time. How they are cut decides
        nothing but when units are opened."""
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
        # Where nothing is left out batches are known already, and a rank only has to open what its own rows need.
        mine = ids if self._skip else ids.reshape(-1, self.global_batch)[:, self._slice].ravel()
        units = self.reader.units_of(mine)
        begin = int(self._turn * len(units))
        opened: list[Future[None]] = [Future() for _ in units]
        for number in [*range(begin, len(units)), *range(begin)]:
            fetchers.submit(self.reader, units[number], opened[number])
        return _Chunk(start, ids, units, opened)

    def _good(self, chunk: _Chunk) -> npt.NDArray[np.bool_]:
        """Which sequences of a chunk are used; all of them, or BadUnit, unless bad units are skipped."""
        verdicts = []
        for unit, opened in zip(chunk.units, chunk.opened, strict=True):
            error = opened.exception()
            if error is not None and not (self._skip and isinstance(error, BadUnit)):
                raise error
            if error is not None and unit not in self._bad:
                log.warning("left out: %s", error)
            verdicts.append(error is not None)
        if not self._skip:
            return np.ones(len(chunk.ids), dtype=np.bool_)
        agreed = self._agree(verdicts)
        bad = {unit for unit, is_bad in zip(chunk.units, agreed, strict=True) if is_bad}
        for unit in sorted(bad - self._bad - {u for u, own in zip(chunk.units, verdicts, strict=True) if own}):
            log.warning("left out: %s, which another rank cannot read", self.reader.name(unit))
        self._bad |= bad
        return np.logical_not(self.reader.in_units(chunk.ids, bad))


def evenly_spread(
    reader: TokenReader, candidates: Indices, count: int, *, skip: bool = False, agree: Agree | None = None
) -> Indices:
    """`count` of the candidates (sequence numbers), or all if they are fewer, evenly spread; with `skip`, of those that every
    rank can read. Collective where ranks agree. Raises UserError when there is none."""
    while True:
        if not len(candidates):
            raise UserError(
                f"{reader.index.folder}: no sequence of the {reader.split} split can be read; run `pldr tokenize` again"
            )
        wanted = min(count, len(candidates))
        chosen: Indices = candidates[np.linspace(0, len(candidates) - 1, wanted).astype(int)]
        if not skip:
            return chosen
        units = reader.units_of(chosen)
        verdicts = _judge(reader, units)
        bad = {unit for unit, is_bad in zip(units, agree(verdicts) if agree else verdicts, strict=True) if is_bad}
        if not bad:
            return chosen
        candidates = candidates[np.logical_not(reader.in_units(candidates, bad))]


def _judge(reader: TokenReader, units: list[Unit]) -> list[bool]:
    """Which of these units are bad."""
    fetchers = _Fetchers(FETCHERS)
    opened: list[Future[None]] = [Future() for _ in units]
    for unit, result in zip(units, opened, strict=True):
        fetchers.submit(reader, unit, result)
    errors = [result.exception() for result in opened]
    fetchers.stop()
    for error in errors:
        if isinstance(error, BadUnit):
            log.warning("left out: %s", error)
        elif error is not None:
            raise error
    return [error is not None for error in errors]


class _Fetchers:
    """Threads that open units. Daemons, unlike a ThreadPoolExecutor's: a process that ends does not wait for a network."""

    def __init__(self, count: int) -> None:
        self._work: queue.SimpleQueue[tuple[TokenReader, Unit, Future[None]] | None] = queue.SimpleQueue()
        self._stopped = False
        self._count = count
        self._threads: list[threading.Thread] = []

    def submit(self, reader: TokenReader, unit: Unit, opened: Future[None]) -> None:
        self._work.put((reader, unit, opened))
        if len(self._threads) < self._count:
            self._threads.append(threading.Thread(target=self._run, name="token-fetch", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        self._stopped = True
        for _ in self._threads:
            self._work.put(None)

    def _run(self) -> None:
        while (item := self._work.get()) is not None and not self._stopped:
            reader, unit, opened = item
            try:
                reader.open(unit)
                opened.set_result(None)
            except BaseException as error:
                opened.set_exception(error)
