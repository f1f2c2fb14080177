"""The data order: a pure function of (fingerprint, seed, epoch, position). No state, no lists, O(1) memory.

The only training-data state is `sequences_consumed`. World size, micro batch, workers and restarts cannot
change the content of a global batch, because none of them is an argument here.

An epoch is laid out by two keyed permutations:
1. Blocks of `block_sequences` consecutive sequences (a tar member) are permuted over the entire split.
2. The permuted blocks are divided into windows of WINDOW_BLOCKS blocks; inside each window single sequences are
   permuted. So a reader touches at most WINDOW_BLOCKS blocks at a time (two windows where they meet): with
   256 sequences of 1025 uint16, 33 MB for any size of the corpus. Sequences of one block are still close to
   one another; a window of 16,384 sequences (512 global batches of 32) mixes them.

A permutation of [0, n) is a Feistel network on the smallest even number of bits that holds n, applied again
until the value is inside ("cycle walking"; Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002):
less than four times on average. The last block of a split may be short; it is inserted at a keyed position, and
everything after it moves up.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

WINDOW_BLOCKS = 64
ROUNDS = 6
VERSION = "pldr-order-1"  # any change below changes the data order of every run: change this version with it


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of one split's sequences.

    fingerprint: of the token index. seed: of the run. block_sequences: sequences in a tar member.
    """

    num_sequences: int
    block_sequences: int
    fingerprint: str
    seed: int

    def __post_init__(self) -> None:
        if self.num_sequences < 1 or self.block_sequences < 1:
            raise ValueError(
                "an order needs num_sequences >= 1 and block_sequences >= 1, "
                f"got {self.num_sequences} and {self.block_sequences}"
            )

    def sequences(self, epoch: int, positions: npt.ArrayLike) -> Indices:
        """The sequence ids at `positions` (each in [0, num_sequences)) of an epoch. Shape as `positions`."""
        place = np.asarray(positions, dtype=np.int64)
        assert place.size == 0 or (place.min() >= 0 and place.max() < self.num_sequences)
        block_key, window_key, short_key = self._keys(epoch)
        return self._sequence_at(self._within_window(place, window_key), block_key, short_key)

    def global_batch(self, start: int, size: int) -> Indices:
        """Sequence ids [size] of the batch that begins after `start` consumed sequences; may span epochs."""
        parts = []
        while size > 0:
            epoch, position = divmod(start, self.num_sequences)
            count = min(size, self.num_sequences - position)
            parts.append(self.sequences(epoch, np.arange(position, position + count)))
            start, size = start + count, size - count
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _keys(self, epoch: int) -> tuple[int, int, int]:
        text = f"{VERSION}|{self.fingerprint}|{self.seed}|{epoch}"
        digest = hashlib.sha256(text.encode()).digest()
        return tuple(int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16))  # type: ignore[return-value]

    def _within_window(self, place: Indices, key: int) -> Indices:
        """Permute positions inside their window; the last window may be shorter."""
        window = WINDOW_BLOCKS * self.block_sequences
        number = place // window
        inside = place - number * window
        keys = _mix(np.uint64(key) ^ _mix(number.astype(np.uint64)))
        last, last_size = divmod(self.num_sequences, window)
        out = np.empty_like(place)
        for chosen, size in ((number < last, window), (number == last, last_size)):
            if chosen.any():
                out[chosen] = permute(inside[chosen], size, keys[chosen])
        return out + number * window

    def _sequence_at(self, place: Indices, block_key: int, short_key: int) -> Indices:
        """Sequence id at each position of the permuted blocks."""
        size = self.block_sequences
        full, short = divmod(self.num_sequences, size)
        short_at = short_key % (full + 1) * size if short else self.num_sequences
        behind = place >= short_at + short
        in_short = (place >= short_at) & ~behind
        moved = np.where(behind, place - short, place)
        block, offset = np.divmod(moved, size)
        out = np.empty_like(place)
        out[in_short] = full * size + place[in_short] - short_at
        normal = ~in_short
        if normal.any():
            keys = np.full(int(normal.sum()), block_key, dtype=np.uint64)
            out[normal] = permute(block[normal], full, keys) * size + offset[normal]
        return out


def permute(values: Indices, size: int, keys: Words) -> Indices:
    """A keyed permutation of [0, size): the image of each value under its own key. Shapes [n], [n] -> [n]."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    out = values.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):  # cycle walking: values outside [0, size) are permuted again
        out[todo] = _feistel(out[todo], keys[todo], half)
        todo = todo[out[todo] >= size]
    return out.astype(np.int64)


def _feistel(values: Words, keys: Words, half: int) -> Words:
    """ROUNDS rounds on two halves of `half` bits each: a bijection of [0, 4**half) for every key."""
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (_mix(keys + (right << np.uint64(8)) + np.uint64(number)) & mask)
    return (left << shift) | right


def _mix(word: Words) -> Words:
    """The finalizer of splitmix64: every input bit affects every output bit."""
    with np.errstate(over="ignore"):
        word = (word + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return word ^ (word >> np.uint64(31))
