"""Sequences by number, from token tars on a local disk or at a URL. Everything that is returned has been checked.

A local shard is checked completely (size, sha256) on first use and then memory-mapped: a read is a copy from the page cache.
Of a shard at a URL only blocks are read, by byte range, each checked against its own sha256; they are cached on the node's disk
(cache.py). What is opened and can be bad, a local shard or a remote block, is called an *extent*.

Decision: an extent is bad if it is missing or has the wrong size or sha256. An unreachable store is not a bad extent but an
error, also with `data.on_bad_shard: skip`: a network failure must not decide what a model is trained on.

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
from pipeline.data.tokens.index import (
    SEGMENTS,
    SOURCES,
    TOKENS,
    TokenIndex,
    TokenShard,
    missing,
    no_boundaries,
    wrong_sha256,
    wrong_size,
)
from pipeline.errors import UserError
from pipeline.io.remote import read_range, size_of
from pipeline.io.urls import is_local, join

Extent = tuple[int, int]  # (number of the shard in its split, block; WHOLE_SHARD for a local shard)
WHOLE_SHARD = -1
OPEN_EXTENTS = 256  # the order (order.py) uses about 64 blocks at a time, 128 between two windows; each is an open file
ATTEMPTS = 3  # for a block with wrong bytes: a transfer can be damaged, too


class BadExtent(UserError):
    """A shard or block that is missing or damaged."""


class TokenReader:
    """Random access to the sequences of one split, numbered through its shards in index order. Thread-safe."""

    def __init__(
        self,
        index: TokenIndex,
        split: str,
        *,
        cache: NodeCache | None = None,
        stamps: Stamps | None = None,
        segments: bool = False,
        sources: bool = False,
    ) -> None:
        """cache: stores the blocks of an index at a URL; without it every read is remote. stamps: the ranks of a job on one
        node check each local shard only once; without it each process checks it. segments, sources: they will be read too,
        so `open` prepares them with the tokens. Opens nothing yet.

        Raises UserError if the split has no sequences.
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
        self._needed = [TOKENS, *[SEGMENTS] * segments, *[SOURCES] * sources]
        self._open = _Recent(OPEN_EXTENTS * len(self._needed))
        self._checked: dict[int, tuple[int, ...]] = {}  # local shards checked by this process, with their fstat
        self._sized: set[int] = set()  # remote shards whose size was checked

    def read(self, indices: Sequence[int] | Indices) -> Indices:
        """Sequences by number: int64 [n, context_length + 1].

        Raises IndexError for a number outside [0, num_sequences), BadExtent (a UserError) naming a shard that is missing or
        damaged, UserError when a store cannot be read.
        """
        out = np.empty((len(indices), self.index.context_length + 1), dtype=np.int64)
        self._gather(indices, out, TOKENS)
        return out

    def segments(self, indices: Sequence[int] | Indices) -> npt.NDArray[np.uint16]:
        """The document number of each token of these sequences, from 1 in each sequence, 0 for padding: [n, C + 1].

        Raises like `read`, and UserError if the tokens were made without boundaries.
        """
        if not self.index.boundaries:
            raise UserError(no_boundaries(self.index.folder))
        out = np.empty((len(indices), self.index.context_length + 1), dtype=np.uint16)
        self._gather(indices, out, SEGMENTS)
        return out

    def read_with_documents(self, indices: Sequence[int] | Indices) -> Indices:
        """`read` and `segments` of these sequences: int64 [2, n, context_length + 1]."""
        return np.stack([self.read(indices), self.segments(indices)])

    def sources(self, indices: Sequence[int] | Indices) -> Indices:
        """The source number of each token of these sequences (index.py), 0 for padding: [n, C + 1]. Raises like `read`."""
        assert self.index.sources and self.split == "val", "asked of tokens that do not hold it"
        out = np.empty((len(indices), self.index.context_length + 1), dtype=np.int64)
        self._gather(indices, out, SOURCES)
        return out

    def extents_of(self, indices: Indices) -> list[Extent]:
        """The extents that these sequences need, each once, in order."""
        if self.is_local:
            shards = np.unique(np.searchsorted(self._ends, indices, side="right"))
            return [(shard, WHOLE_SHARD) for shard in shards.tolist()]
        blocks = np.unique(self._blocks(indices)[0])
        shards = np.searchsorted(self._first_block, blocks, side="right") - 1
        return list(zip(shards.tolist(), (blocks - self._first_block[shards]).tolist(), strict=True))

    def in_extents(self, indices: Indices, extents: set[Extent]) -> npt.NDArray[np.bool_]:
        """Which of these sequences are in any of the extents."""
        shards = np.searchsorted(self._ends, indices, side="right")
        if self.is_local:
            return np.isin(shards, [shard for shard, _ in extents])
        listed = [int(self._first_block[shard]) + block for shard, block in extents]
        return np.isin(self._blocks(indices)[0], listed)

    def open(self, extent: Extent) -> None:
        """Prepare an extent for reading: checked, and on this node. Raises like `read`."""
        shard, block = extent
        if block == WHOLE_SHARD:
            self._open.get((shard, WHOLE_SHARD, ""), lambda: self._map(self.shards[shard], shard))
        else:
            for what in self._needed:
                self._view(shard, block, what)

    def name(self, extent: Extent) -> str:
        """An extent's name for messages."""
        shard, block = extent
        return self.shards[shard].name + ("" if block == WHOLE_SHARD else f" block {block}")

    def _gather(self, indices: Sequence[int] | Indices, out: npt.NDArray[Any], what: int) -> None:
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
            out[order[begin:end]] = self._view(shard, block, what)[rows[begin:end]]

    def _blocks(self, numbers: Indices) -> tuple[Indices, Indices]:
        """(number of the block over all shards, row in it) of each sequence."""
        shards = np.searchsorted(self._ends, numbers, side="right")
        inside, rows = np.divmod(numbers - self._starts[shards], self.index.block_sequences)
        return self._first_block[shards] + inside, rows

    def _view(self, shard: int, block: int, what: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        """The numbers of a block [rows, C + 1], without a copy."""
        facts = self.shards[shard]
        kind = self.index.blocks_of(facts)[what]
        numbers = np.dtype(kind.dtype).newbyteorder("<")
        shape, start = (self.index.rows(facts, block), self.index.context_length + 1), kind.offsets[block]
        if self.is_local:
            data, offset = self._open.get((shard, WHOLE_SHARD, ""), lambda: self._map(facts, shard)), start
        else:
            size, sha256 = shape[0] * shape[1] * numbers.itemsize, kind.sha256[block]
            key = (shard, block, sha256)
            data, offset = self._open.get(key, lambda: self._fetch(shard, block, start, size, sha256)), 0
        return np.frombuffer(data, dtype=numbers, count=shape[0] * shape[1], offset=offset).reshape(shape)

    def _map(self, shard: TokenShard, number: int) -> Buffer:
        """A local shard, checked and mapped. A file that was checked before and has not changed is not checked again."""
        path = join(self.index.folder.removeprefix("file://"), shard.name)
        try:
            with open(path, "rb") as stream:
                facts = os.fstat(stream.fileno())
                if facts.st_size != shard.bytes:
                    raise BadExtent(wrong_size(path, facts.st_size, shard))
                identity = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
                if self._checked.get(number) != identity:
                    self._check(stream, path, shard, identity)
                    self._checked[number] = identity
                return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, NotADirectoryError):
            raise BadExtent(missing(path)) from None
        except OSError as error:
            raise BadExtent(f"{path}: cannot be read ({error.strerror}); fix the disk or make the file again") from None

    def _check(self, stream: BufferedReader, path: str, shard: TokenShard, identity: tuple[int, ...]) -> None:
        def compare() -> None:
            if hashlib.file_digest(stream, "sha256").hexdigest() != shard.sha256:
                raise BadExtent(wrong_sha256(path))

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
                raise BadExtent(missing(url)) from None
            raise BadExtent(wrong_sha256(url, f", block {block}"))

        if self._cache is None:
            return download()
        return self._cache.get(f"{sha256}-{self.index.fingerprint[:16]}", sha256, download)

    def _compare_size(self, shard: int, url: str) -> None:
        """Before the first read of a shard, because a truncated one would look like a broken connection."""
        if shard not in self._sized:
            size = size_of(url)
            if size != self.shards[shard].bytes:
                raise BadExtent(wrong_size(url, size, self.shards[shard]))
            self._sized.add(shard)


def open_split(index: TokenIndex, split: str, *, cache_gigabytes: float, **more: Any) -> TokenReader:
    """A reader; for an index at a URL with a cache in this node's folder. `more`: as TokenReader has it, and raises."""
    cache = None if is_local(index.folder) else NodeCache(int(cache_gigabytes * 1e9))
    return TokenReader(index, split, cache=cache, **more)


class _Recent:
    """The most recently opened buffers. Each is opened once, even if threads request it at the same time."""

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
