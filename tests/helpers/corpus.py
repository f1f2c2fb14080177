"""A small corpus with line structure, and one finished run of the data stages that tests read and never change."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.data.documents.shard import shard_documents
from pipeline.data.tokens.tokenize import tokenize_documents
from pipeline.data.tokens.train_tokenizer import make_tokenizer

MakeConfig = Callable[..., RunConfig]
LINE = "thou art more lovely and temperate rough winds do shake the darling buds of May summer's lease hath"


def sentences(rng: random.Random, count: int) -> str:
    lines = [
        " ".join(rng.choices(LINE.split(), k=rng.randint(3, 12))) + rng.choice([".", "?", ",--", "  "])
        for _ in range(count)
    ]
    return "\n".join(lines) + "\n"


def write_corpus(folder: Path, *, files: int = 4, documents: int = 40, lines: int = 12, seed: int = 0) -> Path:
    """JSONL files of different documents."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        with open(folder / f"part-{number}.jsonl", "w", encoding="utf-8") as stream:
            for document in range(documents):
                text = f"# Document {number}.{document}\n\n" + sentences(rng, rng.randint(1, lines))
                stream.write(json.dumps({"text": text}) + "\n")
    return folder


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """A RunConfig for the data stages: `make_config(run_dir, sources, data={...}, tokens={...}, vocab_size=...)`."""

    def make(run_dir: Path, sources: str | list[Any], **sections: Any) -> RunConfig:
        listed = [sources] if isinstance(sources, str) else sources
        entries = [{"url": source} if isinstance(source, str) else source for source in listed]
        model = {"num_layers": 1, "num_heads": 2, "head_dim": 8, "vocab_size": sections.pop("vocab_size", 330)}
        tree = {
            "name": "test",
            "run_dir": str(run_dir),
            "data": {
                "sources": entries,
                "val_fraction": 0.1,
                "test_fraction": 0.05,
                "tasks": 2,
                **sections.pop("data", {}),
            },
            "tokens": {"block_sequences": 8, **sections.pop("tokens", {})},
            "model": {**model, "context_length": sections.pop("context_length", 16)},
            "train": {"steps": 10, "warmup_steps": 1},
            **sections,
        }
        return parse_config(tree, where="test")

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, make_config: MakeConfig
) -> tuple[RunConfig, RunPaths]:
    """The corpus after all three data stages. Read only."""
    root = tmp_path_factory.mktemp("run")
    config, paths = make_config(root, f"{corpus}/*.jsonl"), RunPaths(root)
    shard_documents(config, paths)
    make_tokenizer(config, paths)
    tokenize_documents(config, paths)
    return config, paths


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(name="contents", scope="session")
def contents_fixture() -> Callable[[Path], dict[str, bytes]]:
    return contents


def write_tokens(
    folder: str | Path,
    *,
    train: list[int],
    val: list[int] | None = None,
    context_length: int = 15,
    block_sequences: int = 8,
    boundaries: bool = False,
) -> None:
    """A tokens folder, local or at a URL, without running the stages. train, val: number of sequences of each shard.

    Sequence n of a split holds n % 65536 and n // 65536, then its own noise; its document numbers are n % 7 + 1.
    """
    import hashlib

    import numpy as np

    from pipeline.data.documents.read import fingerprint_of
    from pipeline.data.tar import TarWriter
    from pipeline.data.tokens.index import SCHEMA_VERSION
    from pipeline.data.tokens.tokenize import npy_bytes
    from pipeline.io.storage import publish_json
    from pipeline.io.urls import join

    rng, width, shards = np.random.default_rng(0), context_length + 1, []
    for split, sizes in (("train", train), ("val", val or [])):
        number = 0
        for position, sequences in enumerate(sizes):
            name = f"{split}-{position:06d}.tar"
            facts: dict[str, list[Any]] = {
                "offsets": [],
                "block_sha256": [],
                "segment_offsets": [],
                "segment_sha256": [],
            }
            with TarWriter(join(str(folder), name)) as tar:

                def add(member: str, array: Any, offsets: list[int], hashes: list[str], tar: TarWriter = tar) -> None:
                    header, payload = npy_bytes(array)
                    offsets.append(tar.add(member, bytes(header) + bytes(payload)) + len(header))
                    hashes.append(hashlib.sha256(payload).hexdigest()[:32])

                for block, start in enumerate(range(0, sequences, block_sequences)):
                    count = min(block_sequences, sequences - start)
                    rows = rng.integers(0, 60_000, size=(count, width)).astype(np.uint16)
                    ids = number + start + np.arange(count)
                    rows[:, 0], rows[:, 1] = ids % 65536, ids // 65536
                    key = f"{name.removesuffix('.tar')}-{block:06d}"
                    add(f"{key}.tokens.npy", rows, facts["offsets"], facts["block_sha256"])
                    if boundaries:
                        marks = np.repeat((ids % 7 + 1).astype(np.uint16)[:, None], width, axis=1)
                        add(f"{key}.segments.npy", marks, facts["segment_offsets"], facts["segment_sha256"])
                written = tar.publish()
            counts = {"sequences": sequences, "tokens": sequences * context_length, "documents": 1, "text_bytes": 1}
            shards.append(
                {"name": name, "split": split, **counts, "bytes": written["size"], "sha256": written["sha256"], **facts}
            )
            number += sequences
    index = {
        "schema_version": SCHEMA_VERSION,
        "context_length": context_length,
        "dtype": "uint16",
        "vocab_size": 60_000,
        "tokenizer_sha256": "0" * 64,
        "documents_fingerprint": "1" * 64,
        "block_sequences": block_sequences,
        "packing": "concat",
        "boundaries": boundaries,
        "tokenizer": {"name": "tokenizer.model", "bytes": 0, "sha256": "0" * 64},
        "splits": {"train": {}, "val": {}},
        "shards": shards,
    }
    publish_json(join(str(folder), "index.json"), {**index, "fingerprint": fingerprint_of(index)})


@pytest.fixture(name="write_tokens", scope="session")
def write_tokens_fixture() -> Callable[..., None]:
    return write_tokens
