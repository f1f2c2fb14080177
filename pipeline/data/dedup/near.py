"""Near-duplicates: MinHash over word n-grams, banded (LSH), and clusters of documents that share a band.

A document is the set of its word n-grams; the probability that two sets have the same minimum hash is their Jaccard similarity
s. `rows` such minima form a band, and documents that share one of `bands` bands are near-duplicates: with probability
1 - (1 - s**rows)**bands, an S-shaped curve that `bands_for` centers at the requested similarity. Clusters are merged through
shared members (a like b, b like c), and the first document of each is kept.

The curve is not a step. For the defaults (similarity 0.75, 112 hashes: 14 bands of 8 rows), of pairs with

    Jaccard     0.40    0.50    0.60    0.70    0.75    0.80    0.85    0.90    0.95
    are found   0.9 %   5.3 %   21 %    56 %    77 %    92 %    98.8 %  99.96 % 100 %

and tests/pipeline/data/dedup/test_near.py measures it. Decision: pairs are not verified. A check against stored signatures
would cost 900 bytes a document on disk and a second pass over all pairs, only to sharpen the curve between 0.5 and 0.8; more
`hashes` or a higher `similarity` move it as well.

Decision: datatrove's MinhashDedup* blocks are not used. They call a language's word tokenizer (spaCy: one more dependency,
slow), number documents by task (so another number of tasks keeps other documents), tie the number of tasks to the number of
bands, and hold all clusters in one dictionary. Here keys go through the steps of exact.py.

Words are runs of letters and digits; in scripts without spaces those of pipeline/data/words.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from pipeline.data.dedup.exact import KeysStep, found_file, found_files, key_row, normalized
from pipeline.data.dedup.sorted_rows import MEMORY, NUMBER, Rows, TableWriter, merge, run_of
from pipeline.data.dedup.word_hashes import WordHashes, ngrams, splitmix64
from pipeline.data.executor.markers import write_record

Indices = npt.NDArray[np.int64]

BLOCK = 512  # n-grams hashed at once by all hash functions: fits in the CPU cache


def bands_for(similarity: float, hashes: int) -> tuple[int, int]:
    """(bands, rows) with bands * rows <= hashes whose curve is closest to a step at `similarity`.

    Closest: the smallest sum of the mean share missed above `similarity` and the mean share falsely found below it. Means, not
    areas: at a similarity of 0.9 the side above is narrow, and areas would ignore it.
    """
    grid = (np.arange(1000) + 0.5) / 1000
    step = grid >= similarity
    weight = np.where(step, 1 / max(1, step.sum()), 1 / max(1, (~step).sum()))
    best = (np.inf, 0, 0)
    for rows in range(1, hashes + 1):
        bands = np.arange(1, hashes // rows + 1)[:, None]
        errors = (np.abs(1 - (1 - grid**rows) ** bands - step) @ weight).round(12)
        number = int(errors.argmin())
        best = min(best, (float(errors[number]), number + 1, rows))
    return best[1], best[2]


class MinHasher:
    """The minimum hashes of a text's word n-grams; the same on every machine."""

    def __init__(self, ngram: int, hashes: int) -> None:
        self.ngram = ngram
        draws = splitmix64(np.arange(2 * hashes, dtype=NUMBER))
        self._factors = (draws[:hashes] | np.uint64(1))[:, None]  # odd: the map is a permutation of 64-bit numbers
        self._summands = draws[hashes:][:, None]
        self._words = WordHashes()

    def signature(self, text: str) -> Rows | None:
        """uint64 [hashes]; None for a text without words. A text of fewer than `ngram` words is one n-gram."""
        words = self._words.of(normalized(text))
        if not len(words):
            return None
        size = min(self.ngram, len(words))
        smallest = np.full(len(self._factors), np.iinfo(NUMBER).max, NUMBER)
        for start in range(0, len(words) - size + 1, BLOCK):
            grams = ngrams(words[start : start + BLOCK + size - 1], size)
            np.minimum(smallest, (grams * self._factors + self._summands).min(axis=1), out=smallest)
        return smallest


class NearKeys(KeysStep):
    """The keys of a document are the hashes of its bands. Documents without words have none."""

    name = "near_keys"

    def __init__(
        self, folder: Path, similarity: float, ngram: int, hashes: int, work: Path, memory: int = MEMORY
    ) -> None:
        super().__init__(folder, work, memory)
        self.ngram = ngram
        self.bands, self.rows = bands_for(similarity, hashes)
        self._hasher: MinHasher | None = None

    def keys(self, document: Document) -> bytes:
        if self._hasher is None:
            self._hasher = MinHasher(self.ngram, self.bands * self.rows)
        signature = self._hasher.signature(document.text)
        if signature is None:
            self.stat_update("without_words")
            return b""
        ordinal = document.metadata["ordinal"]
        return b"".join(key_row(_band_hash(band), ordinal) for band in signature.reshape(self.bands, self.rows))


class ClusterNear(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """A single task: merges the pairs of all ranges into clusters, and lists every document but the first of each.

    Memory grows with the near-duplicate documents (about 100 bytes for each and its pairs), not with the corpus.
    """

    type = "DEDUP"
    name = "cluster_near"

    def __init__(self, found: Path, clusters: Path, work: Path, memory: int = MEMORY) -> None:
        super().__init__()
        self.found = found
        self.clusters = clusters
        self.work = work
        self.memory = memory

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        assert world_size == 1, "clusters span all ranges"
        runs = [run_of(path) for path in found_files(self.found)]
        pairs = [_distinct(piece) for piece in merge(runs, self.memory)]
        path = found_file(self.clusters, rank, world_size)
        with TableWriter(path, 2, self.memory) as table:
            if pairs:
                table.append(components(np.concatenate(pairs)))
            facts = table.publish()
            self.stat_update("duplicates", value=table.rows)
            write_record(self.work, rank, {"duplicates": table.rows}, {path.name: facts})
        yield from ()


def components(pairs: Rows) -> Rows:
    """[n, 2] pairs of ordinals to [m, 2]: each ordinal that is not the smallest of its cluster, and the smallest.

    Union-find for all pairs at once: of two roots that a pair joins, the larger becomes a child of the smaller one, then all
    paths are compressed. Parents only get smaller, so this terminates with the smallest ordinal as the root.
    """
    ordinals, flat = np.unique(pairs, return_inverse=True)
    ends: Indices = flat.reshape(-1, 2).astype(np.int64)
    parent = np.arange(len(ordinals))
    while len(ends):
        np.minimum.at(parent, ends.max(axis=1), ends.min(axis=1))
        while (parent != (above := parent[parent])).any():
            parent = above
        ends = parent[ends]
        ends = ends[ends[:, 0] != ends[:, 1]]
    later = parent != np.arange(len(ordinals))
    return np.column_stack([ordinals[later], ordinals[parent[later]]])


def _band_hash(band: Rows) -> bytes:
    """Without the number of the band: each band has its own hash functions, so their minima do not collide."""
    return hashlib.blake2b(band.tobytes(), digest_size=16).digest()


def _distinct(rows: Rows) -> Rows:
    """Sorted rows without repeats: a pair that shares several bands occurs that often."""
    return rows[np.append(True, (rows[1:] != rows[:-1]).any(axis=1))] if len(rows) else rows
