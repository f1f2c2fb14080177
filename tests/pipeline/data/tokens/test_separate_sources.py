"""`data.separate_sources`: shards of one source each, through shard and tokenize to the batches of `data.phases`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.data.documents.read import DocumentIndex, read_shard
from pipeline.data.documents.shard import shard_documents
from pipeline.data.loading.loader import TrainLoader
from pipeline.data.loading.mixture import mixture_of
from pipeline.data.loading.reader import TokenReader
from pipeline.data.readers.sources import InputFile
from pipeline.data.readers.units import Unit, deal_by_source
from pipeline.data.tokens.index import TokenIndex
from pipeline.data.tokens.tokenize import tokenize_documents
from pipeline.data.tokens.train_tokenizer import make_tokenizer
from pipeline.errors import ConfigError, UserError
from tests.helpers.corpus import write_corpus

MakeConfig = Callable[..., RunConfig]
PHASES = [{"until": 0.5, "weights": {"web": 3, "books": 1}}, {"until": 1.0, "weights": {"books": 1}}]


@pytest.fixture(scope="module")
def separate(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> tuple[RunConfig, RunPaths]:
    folder = tmp_path_factory.mktemp("separate")
    sources = [
        {"url": f"{write_corpus(folder / 'web', files=3, documents=30)}/*.jsonl", "name": "web"},
        {"url": f"{write_corpus(folder / 'books', files=1, documents=40, seed=5)}/*.jsonl", "name": "books"},
    ]
    data: dict[str, Any] = {"separate_sources": True, "phases": PHASES}
    config, paths = make_config(folder / "run", sources, data=data), RunPaths(folder / "run")
    shard_documents(config, paths)
    make_tokenizer(config, paths)
    tokenize_documents(config, paths)
    return config, paths


def test_each_shard_has_the_documents_of_the_source_it_is_named_by(separate: tuple[RunConfig, RunPaths]) -> None:
    documents, tokens = DocumentIndex.load(separate[1].documents), TokenIndex.load(separate[1].tokens)
    assert {shard["source"] for shard in documents.of_split("train")} == {"web", "books"}
    for shard in documents.shards:
        seen = {document.meta["source"].partition("/")[0] for document in read_shard(documents.folder, shard)}
        assert seen == {shard["source"]}
    named = {shard["name"]: shard["source"] for shard in documents.shards}
    assert all(shard.source == named[shard.name] for shard in tokens.shards)
    counts = {source["name"]: source["documents"] for source in documents.tree["sources"]}
    assert counts == {"web": 90, "books": 40}


def test_without_it_shards_and_the_index_are_as_before(finished: tuple[RunConfig, RunPaths]) -> None:
    documents, tokens = DocumentIndex.load(finished[1].documents), TokenIndex.load(finished[1].tokens)
    assert all("source" not in shard for shard in documents.shards)
    assert all(shard.source == "" for shard in tokens.shards)
    assert mixture_of(tokens, finished[0]) is None


def loader(separate: tuple[RunConfig, RunPaths], rank: int = 0, world_size: int = 1) -> TrainLoader:
    config, paths = separate
    index = TokenIndex.load(paths.tokens)
    return TrainLoader(
        TokenReader(index, "train"),
        seed=config.seed,
        global_batch=32,
        micro_batch=4,
        rank=rank,
        world_size=world_size,
        order=mixture_of(index, config),
    )


def test_batches_have_the_phases_shares_on_any_number_of_ranks(separate: tuple[RunConfig, RunPaths]) -> None:
    """Training is 10 steps of 32 sequences: the first 160 are three parts of web, then none."""
    index = TokenIndex.load(separate[1].tokens)
    of = np.concatenate([np.full(shard.sequences, shard.source == "web") for shard in index.of_split("train")])
    alone = loader(separate)
    ids = np.concatenate([alone.indices(position) for position in range(0, 320, 32)])
    assert 100 <= int(of[ids[:160]].sum()) <= 140 and not of[ids[160:]].any()  # 120; inside a block in any order
    batches = list(alone.micro_batches(64, limit=5))
    assert np.array_equal(np.concatenate(batches[0][0]), alone.reader.read(ids[64:96]))
    halves = [list(loader(separate, rank, 2).micro_batches(64, limit=5)) for rank in (0, 1)]
    for (micro, end), *shares in zip(batches, *halves, strict=True):
        assert np.array_equal(np.concatenate(micro), np.concatenate([rows for share, _ in shares for rows in share]))
        assert all(end == theirs for _, theirs in shares)


def test_shards_that_mix_sources_are_one_line(finished: tuple[RunConfig, RunPaths]) -> None:
    config = finished[0]
    phases = config.data.model_copy(update={"phases": [{"until": 1.0, "weights": {"part": 1.0}}]})
    with pytest.raises(
        UserError, match="its shards mix sources, .* set data.separate_sources=true and run `pldr shard`"
    ):
        mixture_of(TokenIndex.load(finished[1].tokens), config.model_copy(update={"data": phases}))


def test_an_unknown_source_is_one_line(separate: tuple[RunConfig, RunPaths], make_config: MakeConfig) -> None:
    phases = [{"until": 1.0, "weights": {"web": 1, "boks": 1}}]
    sources = [{"url": "x.txt", "name": "web"}]
    config = make_config(separate[1].root, sources, data={"separate_sources": True, "phases": phases})
    with pytest.raises(UserError, match="no training sequence of a source 'boks'; its sources: books, web"):
        mixture_of(TokenIndex.load(separate[1].tokens), config)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"phases": PHASES}, "set separate_sources=true"),
        ({"separate_sources": True, "phases": PHASES[:1]}, "must grow, and end with 1"),
        ({"separate_sources": True, "phases": [PHASES[1], PHASES[0]]}, "must grow, and end with 1"),
        ({"separate_sources": True, "phases": [{"until": 1, "weights": {"a": 0}}]}, "above 0; leave out"),
        ({"separate_sources": True, "phases": [{"until": 1, "weights": {"a": 1, "b": 5e3}}]}, "less than 1/1024"),
        ({"separate_sources": True, "phases": [{"until": 1, "weights": {}}]}, "at least 1"),
    ],
)
def test_phases_that_make_no_sense_are_one_line(
    data: dict[str, Any], message: str, tmp_path: Path, make_config: MakeConfig
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, "x.txt", data=data)


def test_tasks_are_dealt_by_source_and_size() -> None:
    def unit(number: int, source: int, size: int) -> Unit:
        file = InputFile.__new__(InputFile)
        object.__setattr__(file, "source", source)
        return Unit(number, file, 0, 1, size)

    units = [unit(n, source, size) for n, (source, size) in enumerate([(0, 50), (1, 10), (0, 50), (0, 40), (2, 1)])]
    plan = deal_by_source(units, 3)
    assert [[u.number for u in share] for share in plan] == [[0, 3], [2], [1], [4]] or len(plan) == 5
    assert all(len({u.file.source for u in share}) == 1 for share in plan)
    assert sorted(u.number for share in plan for u in share) == [0, 1, 2, 3, 4]
