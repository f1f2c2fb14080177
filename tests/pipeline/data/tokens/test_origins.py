"""tokens.sources: each token of the val split knows the source of its document, in every kind of packing."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.paths import RunPaths
from pipeline.data.documents.read import DocumentIndex, fingerprint_of, read_shard
from pipeline.data.documents.shard import shard_documents
from pipeline.data.loading.reader import TokenReader
from pipeline.data.tokens.index import TokenIndex, check_shard
from pipeline.data.tokens.origins import Origins
from pipeline.data.tokens.pack import make_packer
from pipeline.data.tokens.tokenize import tokenize_documents
from pipeline.errors import UserError
from pipeline.tokenizer import Tokenizer
from tests.helpers.corpus import write_corpus

NAMES = ["plays", "web", "code"]


@given(
    packing=st.sampled_from(["concat", "best-fit", "pad"]),
    documents=st.lists(st.tuples(st.integers(1, 40), st.sampled_from([1, 2, 3])), min_size=1, max_size=60),
    rest=st.sampled_from(["drop", "pad"]),
    at_once=st.integers(1, 9),
)
@settings(deadline=None, max_examples=60)
def test_numbers_lie_where_the_tokens_lie(packing: str, documents: Any, rest: str, at_once: int) -> None:
    """A document's tokens are 10 times its source here, so that rows can be compared cell by cell."""
    facts = {"context_length": 8, "block_sequences": 4, "packing": packing, "remainder": rest, "boundaries": True}
    packer = make_packer({**facts, "dtype": "uint16"}, pad_id=0)
    origins = Origins({**facts, "sources": NAMES})
    tokens, numbers = [], []
    for start in range(0, len(documents), at_once):
        lengths = np.array([length for length, _ in documents[start : start + at_once]])
        sources = np.array([source for _, source in documents[start : start + at_once]])
        origins._read += sources.tolist()  # as `texts` does
        tokens += list(packer.add(np.repeat(10 * sources, lengths).astype(np.uint16), lengths))
        numbers += list(origins.add(lengths))
    tokens += list(packer.finish())
    numbers += list(origins.finish())
    assert [block.tokens.shape for block in tokens] == [block.shape for block in numbers]
    for block, stored in zip(tokens, numbers, strict=True):
        assert stored.dtype == np.uint16 and np.array_equal(block.tokens, 10 * stored)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, make_config: Any, finished: Any) -> tuple[RunPaths, Any]:
    """The paths of a run with two sources, and a function that makes its configuration."""
    root = tmp_path_factory.mktemp("sources")
    urls = [str(write_corpus(root / name, files=1, seed=seed)) for seed, name in enumerate(NAMES[:2], 1)]
    paths = RunPaths(root / "run")

    def config(**tokens: Any) -> Any:
        return make_config(paths.root, urls, data={"val_fraction": 0.3, "tasks": 1}, tokens=tokens)

    shard_documents(config(), paths)
    shutil.copytree(finished[1].tokenizer.parent, paths.tokenizer.parent)
    tokenize_documents(config(sources=True, packing="best-fit"), paths)
    return paths, config


def test_each_token_has_the_source_of_its_document(tokens: tuple[RunPaths, Any]) -> None:
    paths, _ = tokens
    index, tokenizer = TokenIndex.load(paths.tokens), Tokenizer.load(paths.tokenizer)
    assert index.sources == ("plays", "web")
    reader = TokenReader(index, "val")
    everything = range(reader.num_sequences)
    rows, numbers = reader.read(everything), reader.sources(everything)
    assert rows.shape == numbers.shape and ((rows == 0) == (numbers == 0)).all()
    source_of: dict[tuple[int, ...], int] = {}
    for shard in DocumentIndex.load(paths.documents).of_split("val"):
        for document in read_shard(paths.documents, shard):
            ids = (*tokenizer.encode(document.text), tokenizer.eos_id)
            source_of[ids] = 1 + index.sources.index(document.meta["source"].split("/")[0])
    assert set(source_of.values()) == {1, 2}
    seen = set()
    for row, marks in zip(rows.tolist(), numbers.tolist(), strict=True):
        start = 0
        while (end := row.index(tokenizer.eos_id, start) + 1 if tokenizer.eos_id in row[start:] else 0) > start:
            piece = tuple(row[start:end])  # a document that ends here, or the end of a long one
            (number,) = {number for ids, number in source_of.items() if ids[-len(piece) :] == piece}
            assert set(marks[start:end]) == {number}
            seen.add(number)
            start = end
    assert seen == {1, 2}
    for token_shard in index.shards:
        check_shard(index, token_shard)
        assert bool(token_shard.source_offsets) == (token_shard.split == "val")


def test_without_the_key_tokens_are_what_they_were(tokens: tuple[RunPaths, Any], tmp_path: Path) -> None:
    """Also the train split with it; and of a single source nothing is stored."""
    paths, config = tokens
    plain = RunPaths(tmp_path)
    for name in ("documents", "tokenizer"):
        shutil.copytree(paths.root / name, plain.root / name)
    tokenize_documents(config(packing="best-fit"), plain)
    tree = json.loads((plain.tokens / "index.json").read_text())
    assert "sources" not in tree and not any("source_offsets" in shard for shard in tree["shards"])
    one, other = TokenIndex.load(plain.tokens), TokenIndex.load(paths.tokens)
    assert one.of_split("train") == other.of_split("train")
    rows = [TokenReader(index, "val").read(range(index.num_sequences("val"))) for index in (one, other)]
    assert np.array_equal(*rows)


def test_a_damaged_index_of_sources_is_refused(tokens: tuple[RunPaths, Any], tmp_path: Path) -> None:
    tree = json.loads((tokens[0].tokens / "index.json").read_text())
    for change in ({"sources": ["plays", "../web"]}, {"sources": [3]}, {"sources": 3}):
        damaged = {**tree, **change}
        (tmp_path / "index.json").write_text(json.dumps({**damaged, "fingerprint": fingerprint_of(damaged)}))
        with pytest.raises(UserError, match="not a token index"):
            TokenIndex.load(tmp_path)
    for key in ("source_offsets", "source_sha256"):
        damaged = {**tree, "shards": [{**shard, key: []} for shard in tree["shards"]]}
        (tmp_path / "index.json").write_text(json.dumps({**damaged, "fingerprint": fingerprint_of(damaged)}))
        with pytest.raises(UserError, match="blocks of val-000000.tar"):
            TokenIndex.load(tmp_path)
