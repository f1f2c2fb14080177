"""The token index: what `tokens/index.json` promises, read once, checked whole.

It holds every number a reader needs (member offsets, sequences, hashes), so that nothing has to list a
folder or walk a tar, and every number a stage has to agree on (context length, tokenizer, vocabulary), so
that a mismatch is an error with both values before anything runs. The fingerprint covers all of it; the data
order and checkpoints are tied to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.documents import check_file, fingerprint_of
from pipeline.errors import UserError
from pipeline.storage import check_url, exists, join, read_json, safe_member

SCHEMA_VERSION = 1
TOKENIZE_AGAIN = "run `pldr tokenize` again"


def dtype_for(vocab_size: int) -> str:
    """The smallest of uint16 and uint32 that holds every id."""
    return "uint16" if vocab_size <= 65536 else "uint32"


@dataclass(frozen=True)
class TokenShard:
    """One token tar. `offsets[b]`: byte offset in the file of block b's numbers (row-major [n,
    context_length + 1]); every block but the last has `block_sequences` rows. `tokens`: distinct tokens in
    the sequences, padding not counted."""

    name: str
    split: str
    sequences: int
    tokens: int
    documents: int
    text_bytes: int  # UTF-8 bytes of the documents
    bytes: int  # of the tar
    sha256: str
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class TokenIndex:
    """`tokens/index.json`. `splits[name]`: totals of sequences, tokens, documents, text_bytes, tokens_in
    (with each document's eos), tokens_dropped and tokens_padded, where tokens_in == tokens +
    tokens_dropped."""

    folder: str
    fingerprint: str
    context_length: int
    dtype: str
    vocab_size: int  # of the tokenizer
    tokenizer_sha256: str
    documents_fingerprint: str
    block_sequences: int
    splits: dict[str, dict[str, int]]
    shards: tuple[TokenShard, ...]

    @classmethod
    def load(cls, folder: str | Path) -> TokenIndex:
        """Read `index.json` in a local folder or below an fsspec URL.

        Raises UserError when there is none, or when it is damaged, was changed, or comes from another
        version.
        """
        url = join(check_url(str(folder)), "index.json")
        if not exists(url):
            raise UserError(f"{url}: no finished tokens; run `pldr tokenize` first")
        tree = read_json(url, schema_version=SCHEMA_VERSION)
        if tree.get("fingerprint") != fingerprint_of(tree):
            raise UserError(f"{url}: its fingerprint does not fit its content; it was changed: {TOKENIZE_AGAIN}")
        shards = tuple(
            TokenShard(**{**shard, "name": safe_member(shard["name"]), "offsets": tuple(shard["offsets"])})
            for shard in tree["shards"]
        )
        fields = {name: tree[name] for name in cls.__dataclass_fields__ if name not in ("folder", "shards")}
        return cls(folder=str(folder), shards=shards, **fields)

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
    ) -> None:
        """Raise UserError, with both values and the mend, unless a model of this context length and
        vocabulary, and this tokenizer, can use these tokens. A model's vocabulary may be larger than the
        tokenizer's."""
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

    def verify(self) -> None:
        """Every shard is there with its size and sha256. Raises UserError naming the first that is not.
        Local folders."""
        for shard in self.shards:
            check_shard(self.folder, shard)


def check_shard(folder: str, shard: TokenShard) -> Path:
    """The path of a local shard, after checking its size and sha256. Raises UserError naming it."""
    path = Path(folder.removeprefix("file://")) / shard.name
    check_file(path, {"bytes": shard.bytes, "sha256": shard.sha256}, mend=TOKENIZE_AGAIN)
    return path


def totals(shards: list[dict[str, Any]]) -> dict[str, int]:
    """Sums of the counts over shards."""
    names = ("sequences", "tokens", "documents", "text_bytes", "tokens_in", "tokens_dropped", "tokens_padded")
    return {name: sum(shard[name] for shard in shards) for name in names}
