"""64-bit hashes of words and word n-grams, for finding near-duplicates and contamination.

Words are runs of letters and digits (`\\w+`); in scripts without spaces those of pipeline/data/words.py. The hashes are
the same on every machine and in every version of Python.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from pipeline.data.dedup.sorted_rows import NUMBER, Rows
from pipeline.data.words import PLAIN_WORD, WORD, has_spaceless

PIECE = 1 << 20  # characters whose words are in memory at once
MAX_WORDS_KNOWN = 500_000  # hashes of words kept in memory
GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's constants
MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


class WordHashes(dict[str, int]):
    """Word -> 64-bit hash, computed on first use. word: the pattern of a word; plain: a faster one for most texts."""

    word: Any = WORD
    plain: Any = PLAIN_WORD

    def __missing__(self, word: str) -> int:
        value = self.hash_of(word)
        self[word] = value
        return value

    def hash_of(self, word: str) -> int:
        """Compute a word's hash."""
        return int.from_bytes(hashlib.blake2b(word.encode("utf-8"), digest_size=8).digest(), "little")

    def of(self, text: str) -> Rows:
        """The hash of each word of a text, in order."""
        pieces, start = [], 0
        word = self.word if has_spaceless(text) else self.plain
        while start < len(text):
            stop = text.find(" ", start + PIECE)  # a piece ends at a space, so no word is cut
            stop = len(text) if stop < 0 else stop
            words = word.findall(text, start, stop)
            pieces.append(np.fromiter(map(self.__getitem__, words), NUMBER, len(words)))
            start = stop
            if len(self) > MAX_WORDS_KNOWN:
                self.clear()
        return np.concatenate(pieces) if pieces else np.empty(0, NUMBER)


def ngrams(words: Rows, size: int) -> Rows:
    """The hash of each run of `size` words; none if there are fewer words."""
    count = max(0, len(words) - size + 1)
    total = np.zeros(count, NUMBER)
    for place in range(size):
        total = total * np.uint64(GOLDEN) + words[place : place + count]
    return splitmix64(total)


def splitmix64(numbers: Rows) -> Rows:
    """A well-mixed 64-bit number for each number."""
    mixed = numbers + np.uint64(GOLDEN)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(MIX[0])
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(MIX[1])
    return mixed ^ (mixed >> np.uint64(31))
