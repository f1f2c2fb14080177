"""Stage `tokenize`: document tars to token tars, one task per document shard, restartable, byte-identical on every machine.

    documents/train-000000.tar --> tokens/train-000000.tar: {key}.tokens.npy blocks [n, context_length + 1],
    with tokens.boundaries also {key}.segments.npy, with tokens.sources and split val {key}.sources.npy;
    + tokenizer.model + index.json

Each document of a shard is followed by eos, never preceded by bos (like the published models). `tokens.packing` decides how
documents become rows of context_length + 1 tokens: see pack.py.

With packing concat, tokens that do not fill the last row of a shard are dropped (`tokens.remainder: drop`, the default) or
padded with pad, which the loss ignores. All tokens are counted: tokens_in == tokens + tokens_dropped.

The output may be an fsspec URL: a shard is written to a spool in the work folder, uploaded under a temporary name, read back,
and renamed. The index is written last: a folder without it is unfinished.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from datatrove.pipeline.base import PipelineStep

from pipeline.data.documents.read import DocumentIndex, fingerprint_of, read_texts
from pipeline.data.executor.jobs import engine_of, run_tasks
from pipeline.data.executor.markers import write_record
from pipeline.data.executor.progress import advance
from pipeline.data.tar import TarWriter, remove_leftovers, remove_strays
from pipeline.data.tokens.index import SCHEMA_VERSION, dtype_for
from pipeline.data.tokens.origins import Origins
from pipeline.data.tokens.pack import MAX_CONTEXT, Block, Numbers, Tokens, make_packer
from pipeline.errors import UserError
from pipeline.io.storage import (
    Need,
    bytes_below,
    publish_bytes,
    publish_json,
    require_space,
    sha256_json,
    temporary_space,
)
from pipeline.io.urls import is_local, join, local_path
from pipeline.tokenizer import Tokenizer

if TYPE_CHECKING:  # workers import this module, and the configuration imports torch
    from pipeline.config.paths import RunPaths
    from pipeline.config.run import RunConfig

BATCH_BYTES = 1 << 19  # passed to SentencePiece at once
TOKENS_PER_BYTE = 0.5  # upper estimate, to check the free space
HISTOGRAM_EDGES = 2 ** np.arange(41)  # bin i: documents of 2**i <= tokens < 2**(i+1)
TOKENIZER = "tokenizer.model"  # the copy next to the shards: readers of tokens need nothing else
COUNTED = ("documents", "text_bytes", "words", "sequences", "tokens", "tokens_in", "tokens_dropped", "tokens_padded")
OF_SPLITS = ("words", "tokens_in", "tokens_dropped", "tokens_padded", "length_histogram")  # not listed per shard


def tokenize_documents(config: RunConfig, paths: RunPaths, *, dry_run: bool = False) -> dict[str, Any]:
    """Run the stage. Returns {"fingerprint", "splits", "shards", "dtype", "bytes_per_token"}.

    dry_run: with data.executor slurm, only write and check the job's script; raises DryRun.

    Raises UserError for missing or damaged documents or tokenizer, a tokenizer with more pieces than model.vocab_size, a train
    or val split that is too short for one sequence, or a full disk.
    """
    folder = config.tokens.output or str(paths.tokens)
    documents = DocumentIndex.load(config.data.output or paths.documents)
    tokenizer = Tokenizer.load(paths.tokenizer)
    settings = _settings(config, documents, tokenizer, path=paths.tokenizer)
    work = paths.logs / f"tokenize-{sha256_json([SCHEMA_VERSION, settings])[:16]}"
    _check_space(
        documents,
        settings,
        folder=folder,
        work=work,
        workers=config.tokens.workers,
        is_here=config.data.executor == "local",
    )
    spool = work / "spool"  # of shards on their way to a URL
    remove_leftovers(spool)
    step = TokenizeShard(documents.folder, paths.tokenizer, folder, work, settings)
    records = run_tasks(
        [step],
        tasks=len(documents.shards),
        workers=config.tokens.workers,
        workers_key="tokens.workers",
        work=work,
        output=folder,
        engine=engine_of(config.data, dry_run=dry_run, output=config.tokens.output),
        label="tokenize",
        total_bytes=sum(shard["text_bytes"] for shard in documents.shards),
    )
    index = _index([record["shard"] for record in records], settings, _facts_of(paths.tokenizer))
    _check_splits(index, context_length=config.model.context_length)
    remove_strays(folder, {shard["name"] for shard in index["shards"]})
    publish_bytes(join(folder, TOKENIZER), paths.tokenizer.read_bytes())
    publish_json(join(folder, "index.json"), index)
    train = index["splits"]["train"]
    return {
        "fingerprint": index["fingerprint"],
        "splits": {split: {k: counts[k] for k in COUNTED} for split, counts in index["splits"].items()},
        "shards": len(index["shards"]),
        "dtype": settings["dtype"],
        "bytes_per_token": round(train["text_bytes"] / train["tokens_in"], 3),
    }


def _settings(config: RunConfig, documents: DocumentIndex, tokenizer: Tokenizer, *, path: Path) -> dict[str, Any]:
    """Everything that determines the tokens."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{path}: {tokenizer.vocab_size} pieces, but model.vocab_size is {config.model.vocab_size}; "
            f"set model.vocab_size={tokenizer.vocab_size} or more"
        )
    tokens, context_length = config.tokens, config.model.context_length
    if tokens.boundaries and context_length > MAX_CONTEXT:
        raise UserError(
            f"tokens.boundaries: document numbers are uint16, enough for a context of {MAX_CONTEXT}, "
            f"model.context_length is {context_length}; lower it or set tokens.boundaries=false"
        )
    names = [source["name"] for source in documents.tree["sources"] if source["name"] is not None]  # None: no file
    return {
        "context_length": context_length,
        "block_sequences": tokens.block_sequences,
        "packing": tokens.packing,
        "remainder": tokens.remainder,
        "boundaries": tokens.boundaries,
        **({"sources": names} if tokens.sources and len(names) > 1 else {}),
        "dtype": dtype_for(tokenizer.vocab_size),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "documents_fingerprint": documents.fingerprint,
    }


def _check_space(
    documents: DocumentIndex, settings: dict[str, Any], *, folder: str, work: Path, workers: int, is_here: bool
) -> None:
    """Raise UserError unless the tokens (for a URL: the shards written at once) fit on the disk that they are written to, and
    temporary files on theirs. is_here: whether this machine does the work."""
    context_length = settings["context_length"]
    cell = np.dtype(settings["dtype"]).itemsize + (2 if settings["boundaries"] else 0)

    def needed(shard: dict[str, Any]) -> float:
        rows = shard["text_bytes"] * TOKENS_PER_BYTE / context_length
        rows += shard["documents"] if settings["packing"] == "pad" else 0
        return float(rows * (context_length + 1) * cell)

    sizes = sorted(map(needed, documents.shards), reverse=True)
    needs = []
    if is_local(folder):
        path = local_path(folder).absolute()
        left = max(0, int(sum(sizes)) - bytes_below(path, "*.tar"))
        needs.append(Need(path, left, "writing the tokens", "set run_dir or tokens.output to another disk"))
    else:
        needs.append(Need(work, int(sum(sizes[:workers])), "writing shards of tokens before they are uploaded"))
    if (
        not is_local(documents.folder) and is_here
    ):  # each is copied to a temporary file, which is checked before it is read
        copies = sorted((shard["bytes"] for shard in documents.shards), reverse=True)[:workers]
        needs.append(temporary_space(sum(copies), "copies of document shards"))
    require_space(needs)


class TokenizeShard(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """Task i: document shard i to one token tar, published together with the task's record.

    documents, folder: paths or URLs. settings: those in the index.
    """

    type = "TOKENIZER"
    name = "shard"

    def __init__(self, documents: str, tokenizer: Path, folder: str, work: Path, settings: dict[str, Any]) -> None:
        super().__init__()
        self.documents = documents
        self.tokenizer = tokenizer
        self.folder = folder
        self.work = work
        self.settings = settings

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        documents = DocumentIndex.load(self.documents)
        tokenizer = _tokenizer(self.tokenizer.read_bytes(), path=self.tokenizer)
        now = {"tokenizer_sha256": tokenizer.sha256, "documents_fingerprint": documents.fingerprint}
        for name, origin in (("tokenizer_sha256", self.tokenizer), ("documents_fingerprint", self.documents)):
            if now[name] != self.settings[name]:
                raise UserError(f"{origin}: changed while it was being tokenized; start again")
        source = documents.shards[rank]
        packer = make_packer(self.settings, pad_id=tokenizer.pad_id)
        histogram = np.zeros(len(HISTOGRAM_EDGES) - 1, dtype=np.int64)
        files: dict[str, Any] = {}
        with TarWriter(join(self.folder, source["name"]), spool=self.work / "spool") as tar:
            blocks = _Blocks(tar, source["name"], boundaries=self.settings["boundaries"])
            origins = Origins(self.settings) if source["split"] == "val" and "sources" in self.settings else None
            texts = read_texts(self.documents, source) if origins is None else origins.texts(self.documents, source)
            for tokens, lengths in encode(texts, tokenizer, dtype=self.settings["dtype"]):
                histogram += np.histogram(lengths, HISTOGRAM_EDGES)[0]
                added = () if origins is None else origins.add(lengths)
                for block, numbers in zip_longest(packer.add(tokens, lengths), added):
                    blocks.write(block, numbers)
            for block, numbers in zip_longest(packer.finish(), () if origins is None else origins.finish()):
                blocks.write(block, numbers)
            if packer.counts()["sequences"]:
                files[source["name"]] = tar.publish()
        facts = files.get(source["name"], {"size": 0, "sha256": ""})
        listed = ("name", "split", "documents", "text_bytes", "words", "source")
        shard = {
            **{key: source[key] for key in listed if key in source},
            "bytes": facts["size"],
            "sha256": facts["sha256"],
            "length_histogram": histogram.tolist(),
            **packer.counts(),
            **blocks.facts,
        }
        write_record(self.work, rank, {"shard": shard}, files)
        yield from ()


class _Blocks:
    """Writes blocks to a tar. `facts`: the offset of each block and the first half of its sha256."""

    def __init__(self, tar: TarWriter, name: str, *, boundaries: bool) -> None:
        self.tar = tar
        self.stem = name.removesuffix(".tar")
        names = ("offsets", "block_sha256", *(("segment_offsets", "segment_sha256") if boundaries else ()))
        self.facts: dict[str, list[Any]] = {name: [] for name in names}

    def write(self, block: Block, sources: Tokens | None = None) -> None:
        key = f"{self.stem}-{len(self.facts['offsets']):06d}"
        self._add(f"{key}.tokens.npy", block.tokens, "offsets", "block_sha256")
        if block.segments is not None:
            self._add(f"{key}.segments.npy", block.segments, "segment_offsets", "segment_sha256")
        if sources is not None:
            self._add(f"{key}.sources.npy", sources, "source_offsets", "source_sha256")

    def _add(self, member: str, array: npt.NDArray[Any], offsets: str, hashes: str) -> None:
        header, numbers = npy_bytes(array)
        self.facts.setdefault(offsets, []).append(self.tar.add(member, header, numbers) + len(header))
        self.facts.setdefault(hashes, []).append(hashlib.sha256(numbers).hexdigest()[:32])


@lru_cache(maxsize=1)
def _tokenizer(data: bytes, *, path: Path) -> Tokenizer:
    """A worker's tokenizer, parsed once for all of its tasks."""
    return Tokenizer.from_bytes(data, path=path)


def encode(texts: Iterable[bytes], tokenizer: Tokenizer, *, dtype: str) -> Iterator[tuple[Tokens, Numbers]]:
    """Ids of UTF-8 documents, each followed by eos: many documents in one array, and their lengths.

    A document is encoded in one piece, however long: time is linear in its length, memory about 28 bytes per byte (1.8 GB for
    the 64 MB that data.max_document_megabytes allows; clean.split_long keeps it small). SentencePiece accumulates rounded
    scores along the text, so cutting it would change a few tokens.
    """
    eos = np.array([tokenizer.eos_id], dtype=np.int32)
    for batch in batches(texts):
        arrays = tokenizer.encode_arrays(batch)
        lengths = np.fromiter(map(len, arrays), dtype=np.int64, count=len(arrays)) + 1
        tokens = np.concatenate([part for ids in arrays for part in (ids, eos)]).astype(dtype)
        advance(documents=len(batch), bytes=sum(map(len, batch)))
        yield tokens, lengths


def batches(texts: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Texts in lists of about BATCH_BYTES: few calls for short texts, little memory for long ones."""
    batch: list[bytes] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def npy_bytes(block: npt.NDArray[Any]) -> tuple[bytes, bytes]:
    """Header and data of a .npy file (format 1.0, little-endian, no pickle)."""
    little = block.astype(block.dtype.newbyteorder("<"), copy=False)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(little))
    return header.getvalue(), little.tobytes()


def _index(shards: list[dict[str, Any]], settings: dict[str, Any], tokenizer: dict[str, Any]) -> dict[str, Any]:
    splits = {
        split: _totals([shard for shard in shards if shard["split"] == split])
        for split in dict.fromkeys(shard["split"] for shard in shards)
    }
    listed = [{k: v for k, v in shard.items() if k not in OF_SPLITS} for shard in shards if shard["sequences"]]
    index = {"schema_version": SCHEMA_VERSION, **settings, "tokenizer": tokenizer, "splits": splits, "shards": listed}
    return {**index, "fingerprint": fingerprint_of(index)}


def _totals(shards: list[dict[str, Any]]) -> dict[str, Any]:
    histograms = (shard["length_histogram"] for shard in shards)
    return {
        **{name: sum(shard[name] for shard in shards) for name in COUNTED},
        "length_histogram": [sum(counts) for counts in zip(*histograms, strict=True)],
    }


def _facts_of(tokenizer: Path) -> dict[str, Any]:
    data = tokenizer.read_bytes()
    return {"name": TOKENIZER, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _check_splits(index: dict[str, Any], *, context_length: int) -> None:
    for split in ("train", "val"):
        counts = index["splits"].get(split, {"sequences": 0, "tokens_in": 0})
        if not counts["sequences"]:
            raise UserError(
                f"the {split} split has {counts['tokens_in']} tokens, too few for one sequence of {context_length + 1}; "
                f"add text, {'raise data.val_fraction, ' if split == 'val' else ''}lower data.tasks or "
                "model.context_length, or set tokens.remainder=pad"
            )
