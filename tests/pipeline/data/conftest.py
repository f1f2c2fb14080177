"""A small corpus with line structure, and one finished run of the data stages that tests read and never change."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RunConfig, RunPaths, parse_config
from pipeline.data.shard import shard_documents
from pipeline.data.tokenize import tokenize_documents
from pipeline.data.tokenizer import make_tokenizer

MakeConfig = Callable[..., RunConfig]
LINE = "thou art more lovely and temperate rough winds do shake the darling buds of May summer's lease hath"


def sentences(rng: random.Random, count: int) -> str:
    lines = [
        " ".join(rng.choices(LINE.split(), k=rng.randint(3, 12))) + rng.choice([".", "?", ",--", "  "])
        for _ in range(count)
    ]
    return "\n".join(lines) + "\n"


def write_corpus(folder: Path, *, files: int = 4, documents: int = 40, lines: int = 12, seed: int = 0) -> Path:
    """JSONL files of documents that all differ."""
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
            "data": {"sources": entries, "val_fraction": 0.1, "test_fraction": 0.05, **sections.pop("data", {})},
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
    """All three data stages of the corpus, done. Read only."""
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
