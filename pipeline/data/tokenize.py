"""Stage `tokenize`: document tars to token tars, one task a document shard, restartable, byte-identical
whoever runs it.

    documents/train-000000.tar --> tokens/train-000000.tar: {key}.tokens.npy blocks [n, context_length + 1];
    + index.json

Documents of a shard are concatenated, each followed by eos, never preceded by bos (like the published
models).

Decision: sequences overlap by one token. Sequence k holds tokens [k*C, k*C + C] of its shard's stream, C the
context length: inputs are the first C, targets the last C, so every token but a shard's very first is
predicted exactly once. Cutting without overlap would lose one target in C + 1; the overlap costs one stored
token in C.

What does not fill the last sequence of a shard is dropped (`tokens.remainder: drop`, the default) or padded
with pad, which the loss ignores. Both are counted: tokens_in == tokens + tokens_dropped.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from datatrove.pipeline.base import PipelineStep

from pipeline.data.documents import DocumentIndex, fingerprint_of, read_shard
from pipeline.data.index import SCHEMA_VERSION, dtype_for, totals
from pipeline.data.tar import TarWriter
from pipeline.data.tasks import run_tasks, write_record
from pipeline.errors import UserError
from pipeline.storage import publish_json, require_free_space, sha256_json
from pipeline.tokenizer import Tokenizer

if TYPE_CHECKING:  # workers import this module; torch is behind the configuration
    from pipeline.config import RunConfig, RunPaths

Tokens = npt.NDArray[np.unsignedinteger[Any]]

BATCH_CHARACTERS = 1 << 19  # handed to SentencePiece at once
TOKENS_PER_BYTE = 0.5  # an upper estimate, for the free space


def tokenize_documents(config: RunConfig, paths: RunPaths) -> dict[str, Any]:
    """Run the stage. Returns {"fingerprint", "splits", "shards", "dtype", "bytes_per_token"}.

    Raises UserError for documents or a tokenizer that are missing or damaged, a tokenizer with more pieces
    than model.vocab_size, a train or val split too short for one sequence, or a full disk.
    """
    documents = DocumentIndex.load(paths.documents)
    tokenizer = Tokenizer.load(paths.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{paths.tokenizer}: {tokenizer.vocab_size} pieces, but model.vocab_size is {config.model.vocab_size}; "
            f"set model.vocab_size={tokenizer.vocab_size} or more"
        )
    dtype = dtype_for(tokenizer.vocab_size)
    text_bytes = sum(shard["text_bytes"] for shard in documents.shards)
    needed = text_bytes * TOKENS_PER_BYTE * np.dtype(dtype).itemsize
    require_free_space(paths.tokens, int(needed), "writing the tokens")

    settings = {
        "context_length": config.model.context_length,
        "block_sequences": config.tokens.block_sequences,
        "remainder": config.tokens.remainder,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "documents_fingerprint": documents.fingerprint,
    }
    work = paths.logs / f"tokenize-{sha256_json([SCHEMA_VERSION, settings])[:16]}"
    step = TokenizeShard(documents, paths.tokenizer, paths.tokens, work, settings)
    records = run_tasks(
        [step],
        tasks=len(documents.shards),
        workers=config.tokens.workers,
        workers_key="tokens.workers",
        work=work,
        output=paths.tokens,
    )
    index = _index([record["shard"] for record in records], settings)
    _check_splits(index, context_length=config.model.context_length)
    _remove_strays(paths.tokens, {shard["name"] for shard in index["shards"]})
    publish_json(paths.tokens / "index.json", index)
    train = index["splits"]["train"]
    return {
        "fingerprint": index["fingerprint"],
        "splits": index["splits"],
        "shards": len(index["shards"]),
        "dtype": dtype,
        "bytes_per_token": round(train["text_bytes"] / train["tokens_in"], 3),
    }


class TokenizeShard(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """Task i: document shard i to one token tar, published together with the task's record."""

    type = "TOKENIZER"
    name = "shard"

    def __init__(
        self, documents: DocumentIndex, tokenizer: Path, folder: Path, work: Path, settings: dict[str, Any]
    ) -> None:
        super().__init__()
        self.documents = documents
        self.tokenizer = tokenizer
        self.folder = folder
        self.work = work
        self.settings = settings

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        source = self.documents.shards[rank]
        tokenizer = Tokenizer.load(self.tokenizer)
        if tokenizer.sha256 != self.settings["tokenizer_sha256"]:
            raise UserError(f"{self.tokenizer}: changed while tokens were made with it; start again")
        dtype = self.settings["dtype"]
        packer = Packer(self.settings["context_length"], self.settings["block_sequences"], dtype=dtype)
        name = source["name"]
        offsets: list[int] = []
        files: dict[str, Any] = {}
        with TarWriter(self.folder / name) as tar:

            def write(block: Tokens) -> None:
                key = f"{name.removesuffix('.tar')}-{len(offsets):06d}"
                header, payload = npy_bytes(block)
                offsets.append(tar.add(f"{key}.tokens.npy", header + payload) + len(header))

            for tokens in encode(self.documents.folder, source, tokenizer, dtype=dtype):
                for block in packer.add(tokens):
                    write(block)
            for block in packer.finish(pad_id=tokenizer.pad_id if self.settings["remainder"] == "pad" else None):
                write(block)
            if offsets:
                files[name] = tar.publish()
        facts = files.get(name, {"size": 0, "sha256": ""})
        shard = {
            "name": name,
            "split": source["split"],
            "documents": source["documents"],
            "text_bytes": source["text_bytes"],
            "bytes": facts["size"],
            "sha256": facts["sha256"],
            "offsets": offsets,
            **packer.counts(),
        }
        write_record(self.work, rank, {"shard": shard}, files)
        yield from ()


def encode(folder: Path, shard: dict[str, Any], tokenizer: Tokenizer, *, dtype: str) -> Iterator[Tokens]:
    """The ids of each document of a shard, eos behind each."""
    for batch in batches(document.text for document in read_shard(folder, shard)):
        for ids in tokenizer.encode_batch(batch):
            ids.append(tokenizer.eos_id)
            yield np.array(ids, dtype=dtype)


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of about BATCH_CHARACTERS: calls stay few for short texts, memory stays small for long ones."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Packer:
    """A stream of tokens to blocks of overlapping sequences [n, context_length + 1]; counts everything."""

    def __init__(self, context_length: int, block_sequences: int, *, dtype: str) -> None:
        self.context_length = context_length
        self.block_sequences = block_sequences
        self._kept: list[Tokens] = []  # not yet in a block; the first is the last token of the block before, if any
        self._waiting = 0
        self._dtype = dtype
        self._in = self._sequences = self._dropped = self._padded = 0

    def add(self, tokens: Tokens) -> Iterator[Tokens]:
        """Blocks that are full now."""
        self._in += len(tokens)
        self._kept.append(tokens)
        self._waiting += len(tokens)
        stride = self.block_sequences * self.context_length
        if self._waiting <= stride:
            return
        stream = np.concatenate(self._kept)
        while len(stream) > stride:
            yield self._block(stream[: stride + 1])
            stream = stream[stride:]
        self._kept, self._waiting = [stream], len(stream)

    def finish(self, *, pad_id: int | None) -> Iterator[Tokens]:
        """The last block, shorter than the others, if anything is left for one. pad_id None: drop the
        remainder."""
        stream = np.concatenate([np.empty(0, dtype=self._dtype), *self._kept])
        if len(stream) < 2:  # one token predicts nothing; behind a block it is that block's last one
            self._dropped = 0 if self._sequences else len(stream)
            return
        remainder = (len(stream) - 1) % self.context_length
        if remainder and pad_id is not None:
            self._padded = self.context_length - remainder
            stream = np.concatenate([stream, np.full(self._padded, pad_id, dtype=self._dtype)])
        elif remainder:
            self._dropped = remainder if len(stream) > remainder + 1 or self._sequences else len(stream)
            stream = stream[: len(stream) - remainder]
        if len(stream) > 1:
            yield self._block(stream)

    def counts(self) -> dict[str, int]:
        """sequences, tokens (distinct, in sequences), tokens_in, tokens_dropped, tokens_padded."""
        stored = self._sequences * self.context_length + 1 if self._sequences else 0
        tokens = stored - self._padded
        assert self._in == tokens + self._dropped, f"tokens lost: {self._in} in, {tokens} out, {self._dropped} dropped"
        return {
            "sequences": self._sequences,
            "tokens": tokens,
            "tokens_in": self._in,
            "tokens_dropped": self._dropped,
            "tokens_padded": self._padded,
        }

    def _block(self, stream: Tokens) -> Tokens:
        """[n * C + 1] tokens as n rows of C + 1, each beginning with the last token of the row before."""
        windows = np.lib.stride_tricks.sliding_window_view(stream, self.context_length + 1)
        block = np.ascontiguousarray(windows[:: self.context_length])
        self._sequences += len(block)
        return block


def npy_bytes(block: Tokens) -> tuple[bytes, bytes]:
    """Header and numbers of a .npy file (format 1.0, little-endian, no pickle)."""
    little = block.astype(block.dtype.newbyteorder("<"), copy=False)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(little))
    return header.getvalue(), little.tobytes()


def _index(shards: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    splits = {
        split: totals([shard for shard in shards if shard["split"] == split])
        for split in dict.fromkeys(shard["split"] for shard in shards)
    }
    counted = ("tokens_in", "tokens_dropped", "tokens_padded")  # a split's business
    listed = [{k: v for k, v in shard.items() if k not in counted} for shard in shards if shard["sequences"]]
    index = {"schema_version": SCHEMA_VERSION, **settings, "splits": splits, "shards": listed}
    return {**index, "fingerprint": fingerprint_of(index)}


def _check_splits(index: dict[str, Any], *, context_length: int) -> None:
    for split in ("train", "val"):
        counts = index["splits"].get(split, {"sequences": 0, "tokens_in": 0})
        if not counts["sequences"]:
            raise UserError(
                f"the {split} split has {counts['tokens_in']} tokens, too few for one sequence of {context_length + 1}; "
                f"add text, {'raise data.val_fraction, ' if split == 'val' else ''}lower data.tasks or "
                "model.context_length, or set tokens.remainder=pad"
            )


def _remove_strays(folder: Path, names: set[str]) -> None:
    """Shards of an earlier run with more of them: a reader that globs would mix them in."""
    for path in folder.glob("*.tar"):
        if path.name not in names:
            path.unlink()
