"""Our tars read by stock webdataset: the same tokens and the same documents."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.data.documents.read import DocumentIndex, read_shard
from pipeline.data.loading.reader import TokenReader
from pipeline.data.tokens.index import TokenIndex
from pipeline.data.tokens.tokenize import tokenize_documents

MakeConfig = Callable[..., RunConfig]


def samples_of(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    urls = [str(folder / name) for name in names]
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode())


@pytest.fixture(autouse=True)
def secure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset.utils, "enforce_security", True)


@pytest.mark.parametrize("split", ["train", "val"])
def test_tokens(split: str, finished: tuple[RunConfig, RunPaths]) -> None:
    folder = finished[1].tokens
    index = TokenIndex.load(folder)
    samples = samples_of(folder, [shard.name for shard in index.of_split(split)])
    rows = np.concatenate([sample["tokens.npy"] for sample in samples])
    assert rows.dtype == np.uint16 and len({sample["__key__"] for sample in samples}) == len(samples) > 1
    assert np.array_equal(rows, TokenReader(index, split).read(range(index.num_sequences(split))))


def test_tokens_with_their_segments(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, finished: tuple[RunConfig, RunPaths]
) -> None:
    """Both arrays of a block are one sample."""
    paths = RunPaths(tmp_path)
    shutil.copytree(finished[1].documents, paths.documents)
    shutil.copytree(finished[1].tokenizer.parent, paths.tokenizer.parent)
    config = make_config(tmp_path, str(corpus), tokens={"packing": "best-fit", "boundaries": True})
    tokenize_documents(config, paths)
    index = TokenIndex.load(paths.tokens)
    samples = samples_of(paths.tokens, [shard.name for shard in index.of_split("train")])
    rows = np.concatenate([sample["tokens.npy"] for sample in samples])
    segments = np.concatenate([sample["segments.npy"] for sample in samples])
    assert rows.shape == segments.shape == (index.num_sequences("train"), 17)
    reader = TokenReader(index, "train")
    assert np.array_equal(rows, reader.read(range(len(rows))))
    assert np.array_equal(segments, reader.segments(range(len(rows))))


@pytest.mark.parametrize("split", ["train", "val"])
def test_documents(split: str, finished: tuple[RunConfig, RunPaths]) -> None:
    folder = finished[1].documents
    shards = DocumentIndex.load(folder).of_split(split)
    ours = [document for shard in shards for document in read_shard(folder, shard)]
    samples = samples_of(folder, [shard["name"] for shard in shards])
    assert [(sample["__key__"], sample["txt"], sample["json"]) for sample in samples] == [
        (document.key, document.text, document.meta) for document in ours
    ]
    assert all(json.dumps(sample["json"]) for sample in samples) and len(samples) > 1
