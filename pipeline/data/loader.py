"""Token tars to micro batches: random access by memory map, exact order, checked bytes.

A read costs one row copy out of the page cache, wherever it lies, so the order (order.py) is free. Every shard's sha256 is
checked once per process, when it is first touched: damage stops the run with the shard's name instead of training on noise.

What a global batch holds depends on the index, the seed and `sequences_consumed` only. Ranks take equal consecutive slices
of it, micro batches are consecutive slices of those.
"""

from __future__ import annotations

import bisect
import mmap
import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from pipeline.data.index import TokenIndex, TokenShard, check_shard
from pipeline.data.order import Indices, Order
from pipeline.errors import UserError
from pipeline.storage import is_local

PREFETCH = 2  # global batches read ahead


class TokenReader:
    """Random access to the sequences of one split, numbered through its shards in index order. Thread-safe."""

    def __init__(self, index: TokenIndex, split: str) -> None:
        """Raises UserError when the split has no sequences, or the folder is not on this machine."""
        if not is_local(index.folder):
            raise UserError(f"{index.folder}: tokens are read from a local disk; copy the folder to one on this node")
        self.index = index
        self.split = split
        self.shards = index.of_split(split)
        self.num_sequences = index.num_sequences(split)
        if not self.num_sequences:
            raise UserError(
                f"{index.folder}: the {split} split has no sequences; add text and run `pldr tokenize` again"
            )
        self._ends = np.cumsum([shard.sequences for shard in self.shards]).tolist()
        self._blocks: list[list[npt.NDArray[np.unsignedinteger]] | None] = [None] * len(self.shards)
        self._lock = threading.Lock()

    def read(self, indices: Sequence[int] | Indices) -> Indices:
        """Sequences by number: int64 [n, context_length + 1].

        Raises IndexError for a number outside [0, num_sequences), UserError naming a shard that is missing or damaged.
        """
        out = np.empty((len(indices), self.index.context_length + 1), dtype=np.int64)
        size = self.index.block_sequences
        for row, number in enumerate(np.asarray(indices, dtype=np.int64).tolist()):
            if not 0 <= number < self.num_sequences:
                raise IndexError(f"sequence {number} of {self.num_sequences} in the {self.split} split")
            position = bisect.bisect_right(self._ends, number)
            start = self._ends[position - 1] if position else 0
            block, offset = divmod(number - start, size)
            out[row] = self._open(position)[block][offset]
        return out

    def _open(self, position: int) -> list[npt.NDArray[np.unsignedinteger]]:
        """The blocks of a shard, as views into its memory map; checked and mapped on first use."""
        blocks = self._blocks[position]
        if blocks is None:
            with self._lock:
                blocks = self._blocks[position] or self._map(self.shards[position])
                self._blocks[position] = blocks
        return blocks

    def _map(self, shard: TokenShard) -> list[npt.NDArray[np.unsignedinteger]]:
        path = check_shard(self.index.folder, shard)
        with open(path, "rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        width, size = self.index.context_length + 1, self.index.block_sequences
        dtype = np.dtype(self.index.dtype).newbyteorder("<")
        rows = [min(size, shard.sequences - block * size) for block in range(len(shard.offsets))]
        return [
            np.frombuffer(data, dtype=dtype, count=count * width, offset=offset).reshape(count, width)
            for offset, count in zip(shard.offsets, rows, strict=True)
        ]


class TrainLoader:
    """Global batches of a split for one rank, from any number of consumed sequences on."""

    def __init__(
        self, reader: TokenReader, *, seed: int, global_batch: int, micro_batch: int, rank: int, world_size: int
    ) -> None:
        """global_batch and micro_batch count sequences; micro_batch is per rank and forward pass.

        Raises UserError when world_size ranks cannot share a global batch in whole micro batches.
        """
        if global_batch % (micro_batch * world_size):
            raise UserError(
                f"train.global_batch {global_batch} is no multiple of train.micro_batch {micro_batch} x {world_size} ranks; "
                f"set train.global_batch to a multiple of {micro_batch * world_size}, or train.micro_batch to a divisor"
            )
        assert 0 <= rank < world_size
        self.reader = reader
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        share = global_batch // world_size
        self._slice = slice(rank * share, (rank + 1) * share)
        self.num_sequences = reader.num_sequences
        self._order = Order(
            num_sequences=reader.num_sequences,
            block_sequences=reader.index.block_sequences,
            fingerprint=reader.index.fingerprint,
            seed=seed,
        )

    def indices(self, sequences_consumed: int) -> Indices:
        """The sequence numbers [global_batch] that come after so many consumed ones; the same on every rank."""
        return self._order.global_batch(sequences_consumed, self.global_batch)

    def micro_batches(self, sequences_consumed: int) -> Iterator[list[Indices]]:
        """Without end, global batch after global batch: this rank's micro batches, each int64 [micro_batch,
        context_length + 1]. Read PREFETCH global batches ahead on a thread, whose errors are raised here."""
        ready: queue.Queue[list[Indices] | BaseException] = queue.Queue(maxsize=PREFETCH)
        stop = threading.Event()

        def put(item: list[Indices] | BaseException) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def fill() -> None:
            consumed = sequences_consumed
            try:
                while not stop.is_set():
                    put(self._read(consumed))
                    consumed += self.global_batch
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=fill, name="token-prefetch", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _read(self, sequences_consumed: int) -> list[Indices]:
        rows = self.reader.read(self.indices(sequences_consumed)[self._slice])
        return [rows[i : i + self.micro_batch] for i in range(0, len(rows), self.micro_batch)]
