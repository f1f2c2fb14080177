"""Which source each token of the val split is from, with `tokens.sources`: for the losses `val/loss/SOURCE`.

The names are in the index, and source k is number k + 1, so that 0 stays padding. A document knows its source by its id
(`SOURCE/file#12`).
Decision: numbers are packed like tokens, by a packer of their own that is given the same lengths. Where a packer puts a token
depends on lengths alone, so both make the same rows, in every kind of packing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.data.documents.read import read_shard
from pipeline.data.tokens.index import dtype_for
from pipeline.data.tokens.pack import Numbers, Tokens, make_packer


class Origins:
    """The source numbers of one shard's tokens: [n, context_length + 1], block by block as its packer yields them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """settings: those of the index, with the names of the sources."""
        self._number = {name: number for number, name in enumerate(settings["sources"], 1)}
        self._dtype = dtype_for(len(self._number) + 1)
        self._packer = make_packer({**settings, "dtype": self._dtype, "boundaries": False}, pad_id=0)
        self._read: list[int] = []  # of documents that were read, and not yet added

    def texts(self, folder: str, shard: dict[str, Any]) -> Iterator[bytes]:
        """What `read_texts` yields; each document's source is kept until its length is added."""
        for document in read_shard(folder, shard):
            self._read.append(self._number[document.meta["source"].partition("/")[0]])
            yield document.text.encode("utf-8")

    def add(self, lengths: Numbers) -> Iterator[Tokens]:
        """Add the documents read first, by their lengths in tokens."""
        numbers, self._read = self._read[: len(lengths)], self._read[len(lengths) :]
        stream = np.repeat(np.array(numbers, dtype=self._dtype), lengths)
        return (block.tokens for block in self._packer.add(stream, lengths))

    def finish(self) -> Iterator[Tokens]:
        """The remaining rows."""
        assert not self._read, "a document without a length"
        return (block.tokens for block in self._packer.finish())
