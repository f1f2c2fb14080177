"""`data.separate_sources`: shards of one source each, through shard and tokenize to the batches of `data.phases`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.data import Phase
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.config.train import TrainConfig
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
from pipeline.train.batching import batches_from, of_step
from pipeline.train.state import TrainState
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
    assert mixture_of(tokens, finished[0], {}) is None


def loader(
    separate: tuple[RunConfig, RunPaths], rank: int = 0, world_size: int = 1, state: dict[str, Any] | None = None
) -> TrainLoader:
    config, paths = separate
    index = TokenIndex.load(paths.tokens)
    return TrainLoader(
        TokenReader(index, "train"),
        seed=config.seed,
        global_batch=32,
        micro_batch=4,
        rank=rank,
        world_size=world_size,
        order=mixture_of(index, config, state or {}),
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


def test_other_phases_begin_after_what_was_drawn_on_any_number_of_ranks(separate: tuple[RunConfig, RunPaths]) -> None:
    """Of 10 steps of 32 sequences, 4 with the first phases; then web alone for the 16 that are left of 20. Stopped in between,
    the run goes on with what it counted itself."""
    config, paths = separate
    data = config.data.model_copy(update={"phases": [Phase(until=1.0, weights={"web": 1})]})
    train = config.train.model_copy(update={"steps": 20})
    other = config.model_copy(update={"data": data, "train": train}), paths
    first = loader(separate)
    state = {"step": 4, "sequences_consumed": 128, **json.loads(json.dumps(first.recorded(128)))}
    drawn = state["mixture"]["drawn"]
    ids = np.concatenate([first.indices(position) for position in range(0, 128, 32)])
    index = TokenIndex.load(paths.tokens)
    of = np.concatenate([np.full(shard.sequences, shard.source == "web") for shard in index.of_split("train")])
    assert drawn == {"web": int(of[ids].sum()), "books": int((~of[ids]).sum())}

    alone = loader(other, state=state)
    rest = np.concatenate([alone.indices(position) for position in range(128, 640, 32)])
    assert of[rest].all()
    web = np.concatenate([ids[of[ids]], rest])[: int(of.sum())]
    assert len(np.unique(web)) == len(web)  # each sequence of web is drawn before one is drawn again
    assert alone.recorded(640)["mixture"]["drawn"] == {**drawn, "web": drawn["web"] + 512}

    later = {"step": 9, "sequences_consumed": 288, **json.loads(json.dumps(alone.recorded(288)))}
    batches = list(alone.micro_batches(288, limit=3))
    halves = [list(loader(other, rank, 2, later).micro_batches(288, limit=3)) for rank in (0, 1)]
    for (micro, _), *shares in zip(batches, *halves, strict=True):
        assert np.array_equal(np.concatenate(micro), np.concatenate([rows for share, _ in shares for rows in share]))


def test_batches_that_grow_are_slices_of_the_same_order_from_any_step(separate: tuple[RunConfig, RunPaths]) -> None:
    """`train.batch_warmup` on the real loader (tests/pipeline/train/test_batch_warmup.py has the steps)."""
    warmup = [{"batch": 8, "steps": 3}, {"batch": 16, "steps": 2}]
    train = TrainConfig(steps=8, warmup_steps=1, global_batch=32, micro_batch=4, batch_warmup=warmup)
    sizes, data = [8, 8, 8, 16, 16, 32, 32, 32], loader(separate)
    rows = data.reader.read(np.concatenate([data.indices(position) for position in range(0, 160, 32)]))
    for step in range(8):
        position = sum(sizes[:step])
        seen = list(batches_from(data, train, TrainState(step=step, sequences_consumed=position)))
        assert [sum(map(len, micro)) for micro, _ in seen] == sizes[step:]
        assert [end for _, end in seen] == [sum(sizes[:n]) for n in range(step + 1, 9)]
        together = np.concatenate([block for micro, _ in seen for block in micro])
        assert np.array_equal(together, rows[position:152])
    assert np.array_equal(of_step(data, train, 3).indices(24), data.indices(24)[:16])


def test_shards_that_mix_sources_are_one_line(finished: tuple[RunConfig, RunPaths]) -> None:
    config = finished[0]
    phases = config.data.model_copy(update={"phases": [{"until": 1.0, "weights": {"part": 1.0}}]})
    with pytest.raises(
        UserError, match="its shards mix sources, .* set data.separate_sources=true and run `pldr shard`"
    ):
        mixture_of(TokenIndex.load(finished[1].tokens), config.model_copy(update={"data": phases}), {})


def test_an_unknown_source_is_one_line(separate: tuple[RunConfig, RunPaths], make_config: MakeConfig) -> None:
    phases = [{"until": 1.0, "weights": {"web": 1, "boks": 1}}]
    sources = [{"url": f"{name}.txt", "name": name} for name in ("web", "boks")]
    config = make_config(separate[1].root, sources, data={"separate_sources": True, "phases": phases})
    with pytest.raises(UserError, match="no training sequence of a source 'boks'; its sources: books, web"):
        mixture_of(TokenIndex.load(separate[1].tokens), config, {})


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
