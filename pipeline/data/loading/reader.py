"""Sequences by number, out of token tars on a local disk or at a URL. What comes out was checked.

A local shard is checked whole (size, sha256) when it is first used and then mapped: a read is a copy out of the page cache.
Of a shard at a URL only blocks are read, by their byte range, each compared with its own sha256; they are kept on the node's
disk (cache.py). So what is opened, and can be bad, is a shard there and a block here: a *unit*.

Decision: a unit is bad when it is missing, of another size, or of another sha256. A store that cannot be reached is not a
bad unit but an error, also with `data.on_bad_shard: skip`: a network that fails must not decide what a model is trained on.

Nothing is kept open across a fork: a child opens its own files, and fsspec its own connections.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from io import BufferedReader
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.loading.cache import Buffer, NodeCache, Stamps
from pipeline.data.loading.order import Indices
from pipeline.data.tokens.index import TokenIndex, TokenShard, missing, wrong_sha256, wrong_size
from pipeline.errors import UserError
from pipeline.io.remote import read_range, size_of
from pipeline.io.urls import is_local, join

Unit = tuple[int, int]  # number of the shard in its split, and block: WHOLE where the shard is one unit
WHOLE = -1
OPEN_UNITS = 256  # the order (order.py) uses about 64 blocks at a time, 128 at a seam; each open one is a file handle
ATTEMPTS = 3  # at a block whose bytes are wrong: a transfer can be damaged, too


class BadUnit(UserError):
    """A shard, or a block of one, that is missing or damaged."""


class TokenReader:
    """Random access to the sequences of one split, numbered through its shards in index order. Thread-safe."""

    def __init__(
        self, index: TokenIndex, split: str, *, cache: NodeCache | None = None, stamps: Stamps | None = None
    ) -> None:
        """cache: keeps blocks of an index at a URL; without it each is read from there. stamps: let the ranks of a job on
        one node check each local shard once; without it each process does. Opens nothing yet.

        Raises UserError when the split has no sequences.
        """
        self.index = index
        self.split = split
        self.shards = index.of_split(split)
        self.num_sequences = sum(shard.sequences for shard in self.shards)
        if not self.num_sequences:
            raise UserError(
                f"{index.folder}: the {split} split has no sequences; add text and run `pldr tokenize` again"
            )
        self.is_local = is_local(index.folder)
        self._cache = cache
        self._stamps = stamps
        self._ends = np.cumsum([shard.sequences for shard in self.shards])
        self._starts = self._ends - [shard.sequences for shard in self.shards]
        self._first_block = np.cumsum([0] + [len(shard.offsets) for shard in self.shards])  # of each shard, and the end
        self._open = _Recent(OPEN_UNITS)
        self._whole: dict[int, tuple[int, ...]] = {}  # local shards that were checked here, as fstat showed them
        self._sized: set[int] = set()  # remote shards whose size was compared

    def read(self, indices: Sequence[int] | Indices) -> Indices:
        """Sequences by number: int64 [n, context_length + 1].

        Raises IndexError for a number outside [0, num_sequences), BadUnit (a UserError) naming a shard that is missing or
        damaged, UserError when a store cannot be read.
        """
        out = np.empty((len(indices), self.index.context_length + 1), dtype=np.int64)
        self._gather(indices, out, self._tokens)
        return out

    def segments(self, indices: Sequence[int] | Indices) -> npt.NDArray[np.uint16]:
        """The document each token of these sequences belongs to, from 1 in each sequence, 0 for padding: [n, C + 1].

        Raises as `read` does, and UserError when the tokens were made without boundaries.
        """
        if not self.index.boundaries:
            raise UserError(
                f"{self.index.folder}: has no document boundaries; run `pldr tokenize` with tokens.boundaries=true"
            )
        out = np.empty((len(indices), self.index.context_length + 1), dtype=np.uint16)
        self._gather(indices, out, self._segments)
        return out

    def units_of(self, indices: Indices) -> list[Unit]:
        """What these sequences need, each unit once, in order."""
        if self.is_local:
            shards = np.unique(np.searchsorted(self._ends, indices, side="right"))
            return [(shard, WHOLE) for shard in shards.tolist()]
        blocks = np.unique(self._blocks(indices)[0])
        shards = np.searchsorted(self._first_block, blocks, side="right") - 1
        return list(zip(shards.tolist(), (blocks - self._first_block[shards]).tolist(), strict=True))

    def in_units(self, indices: Indices, units: set[Unit]) -> npt.NDArray[np.bool_]:
        """Which of these sequences lie in any of the units."""
        shards = np.searchsorted(self._ends, indices, side="right")
        if self.is_local:
            return np.isin(shards, [shard for shard, _ in units])
        listed = [int(self._first_block[shard]) + block for shard, block in units]
        return np.isin(self._blocks(indices)[0], listed)

    def open(self, unit: Unit) -> None:
        """Make a unit ready to be read: checked, and on this node. Raises as `read` does."""
        shard, block = unit
        if block == WHOLE:
            self._open.get((shard, WHOLE, ""), lambda: self._map(self.shards[shard], shard))
        else:
            self._tokens(shard, block)

    def name(self, unit: Unit) -> str:
        """A unit for people."""
        shard, block = unit
        return self.shards[shard].name + ("" if block == WHOLE else f" block {block}")

    def _gather(
        self, indices: Sequence[int] | Indices, out: npt.NDArray[Any], view: Callable[[int, int], npt.NDArray[Any]]
    ) -> None:
        """Fill row i of `out` with sequence indices[i], block by block."""
        numbers = np.asarray(indices, dtype=np.int64)
        outside = (numbers < 0) | (numbers >= self.num_sequences)
        if outside.any():
            raise IndexError(f"sequence {numbers[outside][0]} of {self.num_sequences} in the {self.split} split")
        blocks, rows = self._blocks(numbers)
        order = np.argsort(blocks, kind="stable")
        blocks, rows = blocks[order], rows[order]
        cuts = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(blocks)]
        shards = np.searchsorted(self._first_block, blocks[cuts[:-1]] if len(blocks) else blocks, side="right") - 1
        for begin, end, shard in zip(cuts, cuts[1:], shards.tolist(), strict=False):
            block = int(blocks[begin] - self._first_block[shard])
            out[order[begin:end]] = view(shard, block)[rows[begin:end]]

    def _blocks(self, numbers: Indices) -> tuple[Indices, Indices]:
        """(number of the block through all shards, row in it) of each sequence."""
        shards = np.searchsorted(self._ends, numbers, side="right")
        inside, rows = np.divmod(numbers - self._starts[shards], self.index.block_sequences)
        return self._first_block[shards] + inside, rows

    def _tokens(self, shard: int, block: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        facts = self.shards[shard]
        return self._view(shard, block, self.index.dtype, facts.offsets, facts.block_sha256)

    def _segments(self, shard: int, block: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        facts = self.shards[shard]
        return self._view(shard, block, "uint16", facts.segment_offsets, facts.segment_sha256)

    def _view(
        self, shard: int, block: int, dtype: str, offsets: tuple[int, ...], hashes: tuple[str, ...]
    ) -> npt.NDArray[np.unsignedinteger[Any]]:
        """A block's numbers [rows, C + 1], not copied."""
        facts, numbers = self.shards[shard], np.dtype(dtype).newbyteorder("<")
        shape = self.index.rows(facts, block), self.index.context_length + 1
        if self.is_local:
            data, offset = self._open.get((shard, WHOLE, ""), lambda: self._map(facts, shard)), offsets[block]
        else:
            size, start, sha256 = shape[0] * shape[1] * numbers.itemsize, offsets[block], hashes[block]
            key = (shard, block, sha256)
            data, offset = self._open.get(key, lambda: self._fetch(shard, block, start, size, sha256)), 0
        return np.frombuffer(data, dtype=numbers, count=shape[0] * shape[1], offset=offset).reshape(shape)

    def _map(self, shard: TokenShard, number: int) -> Buffer:
        """A local shard, checked and mapped. What was checked before and is the same file is not checked again."""
        path = join(self.index.folder.removeprefix("file://"), shard.name)
        try:
            with open(path, "rb") as stream:
                facts = os.fstat(stream.fileno())
                if facts.st_size != shard.bytes:
                    raise BadUnit(wrong_size(path, facts.st_size, shard))
                identity = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
                if self._whole.get(number) != identity:
                    self._check(stream, path, shard, identity)
                    self._whole[number] = identity
                return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, NotADirectoryError):
            raise BadUnit(missing(path)) from None
        except OSError as error:
            raise BadUnit(f"{path}: cannot be read ({error.strerror}); mend the disk or make the file again") from None

    def _check(self, stream: BufferedReader, path: str, shard: TokenShard, identity: tuple[int, ...]) -> None:
        def compare() -> None:
            if hashlib.file_digest(stream, "sha256").hexdigest() != shard.sha256:
                raise BadUnit(wrong_sha256(path))

        if self._stamps is None:
            compare()
        else:
            self._stamps.once(f"{os.path.abspath(path)}|{identity}|{shard.sha256}", compare)

    def _fetch(self, shard: int, block: int, start: int, size: int, sha256: str) -> Buffer:
        """A block of a remote shard, from the node's cache or from its URL."""

        def download() -> bytes:
            url = join(self.index.folder, self.shards[shard].name)
            try:
                self._compare_size(shard, url)
                for _ in range(ATTEMPTS):
                    data = read_range(url, start, start + size)
                    if hashlib.sha256(data).hexdigest().startswith(sha256):
                        return data
            except FileNotFoundError:
                raise BadUnit(missing(url)) from None
            raise BadUnit(wrong_sha256(url, f", block {block}"))

        if self._cache is None:
            return download()
        return self._cache.get(f"{sha256}-{self.index.fingerprint[:16]}", sha256, download)

    def _compare_size(self, shard: int, url: str) -> None:
        """Before the first read of a shard: a cut one would look like a connection that ends early."""
        if shard not in self._sized:
            size = size_of(url)
            if size != self.shards[shard].bytes:
                raise BadUnit(wrong_size(url, size, self.shards[shard]))
            self._sized.add(shard)


def open_split(index: TokenIndex, split: str, *, cache_gigabytes: float, stamps: Stamps | None = None) -> TokenReader:
    """A reader with the cache that an index at a URL needs, in this node's folder. Raises as TokenReader does."""
    cache = None if is_local(index.folder) else NodeCache(int(cache_gigabytes * 1e9))
    return TokenReader(index, split, cache=cache, stamps=stamps)


class _Recent:
    """The things opened most recently. Each is opened once, also when threads ask at the same time."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[int, int, str], Future[Buffer]] = OrderedDict()

    def get(self, key: tuple[int, int, str], make: Callable[[], Buffer]) -> Buffer:
        if self._process != os.getpid():  # a fork: the lock may be held by a thread that exists in the parent only
            self._begin()
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            else:
                mine = self._entries[key] = Future()
                if len(self._entries) > self._capacity:
                    self._entries.popitem(last=False)
        if found is not None:
            return found.result()
        try:
            mine.set_result(make())
        except BaseException as error:
            with self._lock:
                self._entries.pop(key, None)
            mine.set_exception(error)
        return mine.result()
