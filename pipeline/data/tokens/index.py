"""The token index, `tokens/index.json`: read once and fully checked.

It holds everything a reader needs (member offsets, sequences, hashes), so nothing has to list a folder or scan a tar, and
everything stages have to agree on (context length, tokenizer, vocabulary), so a mismatch is an error with both values before
anything runs. The fingerprint covers all of it; the data order and checkpoints depend on it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipeline.data.documents.read import fingerprint_of
from pipeline.errors import UserError
from pipeline.io.remote import open_retrying, size_of
from pipeline.io.storage import CHUNK, exists, read_json, safe_member
from pipeline.io.urls import check_url, join, public_url

SCHEMA_VERSION = 2
TOKENS, SEGMENTS, SOURCES = 0, 1, 2  # of `TokenIndex.blocks_of`
SOURCE_NAME = re.compile(r"[A-Za-z0-9._-]+")  # as data.sources has them, and MLflow's names of metrics
TOKENIZE_AGAIN = "run `pldr tokenize` again"


def dtype_for(vocab_size: int) -> str:
    """The smaller of uint16 and uint32 that can hold every id."""
    return "uint16" if vocab_size <= 65536 else "uint32"


class Blocks(NamedTuple):
    """The blocks of one kind in a shard. required: whether an index without them is damaged."""

    what: str
    dtype: str
    offsets: tuple[int, ...]
    sha256: tuple[str, ...]
    required: bool


@dataclass(frozen=True)
class TokenShard:
    """One token tar.

    offsets[b]: byte offset in the file of block b's numbers, row-major [n, context_length + 1]; every block but the last has
    `block_sequences` rows. block_sha256[b]: the first 32 hex digits of the sha256 of these bytes. segment_*: the same of
    the blocks of document numbers (uint16), empty without boundaries; source_*: of the blocks of source numbers, in the val
    split of tokens with sources. tokens: distinct ones in the sequences, without
    padding. text_bytes: UTF-8 bytes of the documents. bytes, sha256: of the tar.
    source: the only one of its documents, with `data.separate_sources`.
    """

    name: str
    split: str
    sequences: int
    tokens: int
    documents: int
    text_bytes: int
    bytes: int
    sha256: str
    offsets: tuple[int, ...]
    block_sha256: tuple[str, ...]
    segment_offsets: tuple[int, ...] = ()
    segment_sha256: tuple[str, ...] = ()
    source: str = ""
    source_offsets: tuple[int, ...] = ()
    source_sha256: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> TokenShard:
        """A shard as listed in the index; keys that only reports read are ignored. Raises UserError for an unsafe name."""
        safe_member(tree["name"])
        fields: dict[str, Any] = {
            name: tuple(tree[name]) if isinstance(tree[name], list) else tree[name]
            for name in cls.__dataclass_fields__
            if name in tree
        }
        return cls(**fields)


@dataclass(frozen=True)
class TokenIndex:
    """`tokens/index.json`. `splits[name]`: totals of sequences, tokens, documents, text_bytes, tokens_in
    (with each document's eos), tokens_dropped and tokens_padded, where tokens_in == tokens +
    tokens_dropped, and what reports show. `tokenizer`: name, bytes and sha256 of the copy next to the index. `sources`: the
    names of the sources that the val split's tokens are told apart by; source k is number k + 1, and 0 is padding."""

    folder: str
    fingerprint: str
    context_length: int
    dtype: str
    vocab_size: int  # of the tokenizer
    tokenizer_sha256: str
    documents_fingerprint: str
    block_sequences: int
    splits: dict[str, dict[str, Any]]
    shards: tuple[TokenShard, ...]
    packing: str
    boundaries: bool
    tokenizer: dict[str, Any]
    sources: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: str | Path) -> TokenIndex:
        """Read `index.json` in a local folder or below an fsspec URL.

        Raises UserError if there is none, or if it is damaged, was changed, or has another schema version.
        """
        url = join(check_url(str(folder)), "index.json")
        if not exists(url):
            raise UserError(f"{url}: no finished tokens; run `pldr tokenize` first")
        tree = read_json(url, schema_version=SCHEMA_VERSION)
        if tree.get("fingerprint") != fingerprint_of(tree):
            raise UserError(f"{url}: its fingerprint does not match its content; it was changed: {TOKENIZE_AGAIN}")
        if "context_length" not in tree and "splits" in tree:
            raise UserError(f"{url}: an index of documents, not of tokens; name the folder that `pldr tokenize` made")
        try:
            shards = tuple(TokenShard.from_dict(shard) for shard in tree["shards"])
            apart = ("folder", "shards", "sources")
            fields = {name: tree[name] for name in cls.__dataclass_fields__ if name not in apart}
            sources = tuple(tree.get("sources", ()))
            index = cls(folder=str(folder), shards=shards, sources=sources, **fields)
            index._check_numbers()
            return index
        except UserError as error:  # a name that leaves the folder
            raise UserError(f"{url}: {error}; {TOKENIZE_AGAIN}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{url}: not a token index ({type(error).__name__}: {error}); {TOKENIZE_AGAIN}") from None

    def _check_numbers(self) -> None:
        """Raise TypeError for a value that no index has: nobody may allocate or seek by it."""
        counts = {key: getattr(self, key) for key in ("context_length", "block_sequences", "vocab_size")}
        for key, value in counts.items():
            if type(value) is not int or not 0 < value < 1 << 40:
                raise TypeError(f"{key} {value!r}")
        if self.dtype not in ("uint16", "uint32") or not isinstance(self.splits, dict):
            raise TypeError(f"dtype {self.dtype!r}, splits {type(self.splits).__name__}")
        if not all(isinstance(self.tokenizer[key], str) for key in ("name", "sha256")):
            raise TypeError("tokenizer")
        if not all(isinstance(name, str) and SOURCE_NAME.fullmatch(name) for name in self.sources):
            raise TypeError("sources")
        for shard in self.shards:
            row, blocks = self.context_length + 1, -(-shard.sequences // self.block_sequences)
            for kind in self.blocks_of(shard):
                size = np.dtype(kind.dtype).itemsize
                ends = [at + self.rows(shard, block) * row * size for block, at in enumerate(kind.offsets)]
                number = blocks if kind.offsets or kind.required else 0
                inside = all(0 <= at < end <= shard.bytes for at, end in zip(kind.offsets, ends, strict=True))
                hashed = len(kind.sha256) == number and all(isinstance(h, str) for h in kind.sha256)
                if not (len(kind.offsets) == number and inside and hashed):
                    raise TypeError(f"blocks of {shard.name}")

    def blocks_of(self, shard: TokenShard) -> tuple[Blocks, Blocks, Blocks]:
        """What is stored of each token in a shard: [TOKENS] its id, [SEGMENTS] its document's number, [SOURCES] the number of
        its source."""
        has_sources = bool(self.sources) and shard.split == "val"
        of_sources = dtype_for(len(self.sources) + 1)
        return (
            Blocks("block", self.dtype, shard.offsets, shard.block_sha256, True),
            Blocks("document numbers of block", "uint16", shard.segment_offsets, shard.segment_sha256, self.boundaries),
            Blocks("source numbers of block", of_sources, shard.source_offsets, shard.source_sha256, has_sources),
        )

    def of_split(self, split: str) -> list[TokenShard]:
        """The shards of a split, in order."""
        return [shard for shard in self.shards if shard.split == split]

    def num_sequences(self, split: str) -> int:
        """Sequences of a split; 0 for one that does not exist."""
        return sum(shard.sequences for shard in self.of_split(split))

    def check(
        self,
        *,
        context_length: int | None = None,
        tokenizer_sha256: str | None = None,
        vocab_size: int | None = None,
        boundaries: bool = False,
    ) -> None:
        """Raise UserError, with both values and the fix, unless a model of this context length and vocabulary, and this
        tokenizer, can use these tokens, and they hold boundaries where these are asked for. A model's vocabulary may be larger
        than the tokenizer's."""
        if boundaries and not self.boundaries:
            raise UserError(no_boundaries(self.folder))
        if context_length is not None and context_length != self.context_length:
            raise UserError(
                f"{self.folder}: tokens of context length {self.context_length}, model.context_length is {context_length}; "
                f"{TOKENIZE_AGAIN} or set model.context_length={self.context_length}"
            )
        if tokenizer_sha256 is not None and tokenizer_sha256 != self.tokenizer_sha256:
            raise UserError(
                f"{self.folder}: tokens of tokenizer {self.tokenizer_sha256[:12]}, this one is {tokenizer_sha256[:12]} "
                f"(sha256); {TOKENIZE_AGAIN} or set tokenizer.model to the one they were made with"
            )
        if vocab_size is not None and vocab_size < self.vocab_size:
            raise UserError(
                f"{self.folder}: tokens of a vocabulary of {self.vocab_size}, model.vocab_size is {vocab_size}; "
                f"{TOKENIZE_AGAIN} or set model.vocab_size={self.vocab_size}"
            )

    def rows(self, shard: TokenShard, block: int) -> int:
        """Sequences in a block of a shard."""
        return min(self.block_sequences, shard.sequences - block * self.block_sequences)

    def verify(self) -> None:
        """Check size and sha256 of every shard and every block in it, in one pass over each file, local or remote. Raises
        UserError naming the first shard that is missing or damaged."""
        for shard in self.shards:
            check_shard(self, shard)


def check_shard(index: TokenIndex, shard: TokenShard) -> None:
    """Read a shard once and check its size, its sha256 and those of its blocks. Raises UserError naming it."""
    url = join(index.folder, shard.name)
    try:
        size = size_of(url)
        if size != shard.bytes:
            raise UserError(wrong_size(url, size, shard))
        with open_retrying(url, size=size) as stream:
            sha256, damaged = _hash(stream, _ranges(index, shard))
    except FileNotFoundError:
        raise UserError(missing(url)) from None
    if sha256 != shard.sha256 or damaged:
        where = f"; first in {damaged[0]}" if damaged else ""
        raise UserError(wrong_sha256(url, where))


def no_boundaries(folder: str) -> str:
    """The message for tokens that do not say which document they are of."""
    return f"{public_url(folder)}: no document boundaries; run `pldr tokenize` with tokens.boundaries=true"


def missing(url: str) -> str:
    """The message for a missing shard."""
    return f"{public_url(url)}: missing, but its index lists it; {TOKENIZE_AGAIN}"


def wrong_size(url: str, size: int, shard: TokenShard) -> str:
    """The message for a shard of the wrong size."""
    return f"{public_url(url)}: {size} bytes, its index says {shard.bytes}: truncated or damaged; {TOKENIZE_AGAIN}"


def wrong_sha256(url: str, where: str = "") -> str:
    """The message for a shard with the wrong bytes."""
    return f"{public_url(url)}: its sha256 is not the one in its index: damaged{where}; {TOKENIZE_AGAIN}"


def _ranges(index: TokenIndex, shard: TokenShard) -> list[tuple[int, int, str, str]]:
    """(start, bytes, first digits of the sha256, name) of every checksummed range of a shard, in file order."""
    width = index.context_length + 1
    return sorted(
        (offset, index.rows(shard, number) * width * np.dtype(kind.dtype).itemsize, sha256, f"{kind.what} {number}")
        for kind in index.blocks_of(shard)
        for number, (offset, sha256) in enumerate(zip(kind.offsets, kind.sha256, strict=True))
    )


def _hash(stream: BinaryIO, ranges: list[tuple[int, int, str, str]]) -> tuple[str, list[str]]:
    """The sha256 of a stream, and the names of the ranges in it with a wrong one."""
    total, damaged, position = hashlib.sha256(), [], 0

    def pieces(count: int) -> Iterator[bytes]:
        while count > 0 and (piece := stream.read(min(count, CHUNK))):
            total.update(piece)
            count -= len(piece)
            yield piece

    for start, size, expected, name in ranges:
        for _ in pieces(start - position):
            pass
        part = hashlib.sha256()
        for piece in pieces(size):
            part.update(piece)
        if not expected or not part.hexdigest().startswith(expected):
            damaged.append(name)
        position = start + size
    while piece := stream.read(CHUNK):
        total.update(piece)
    return total.hexdigest(), damaged
