"""The stages after training: nothing edited is packaged, no override rewrites the recipe, padding is replaced."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable, Set
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, UserError
from pipeline.io.storage import publish_json
from pipeline.post.consolidate import recipe_of
from pipeline.stages import validate
from pipeline.stages.records import facts_of
from pipeline.stages.runner import SCHEMA_VERSION as STAGE_VERSION
from pipeline.stages.runner import Pipeline
from pipeline.stages.table import NAMES
from pipeline.stages.trained import as_trained, held_out, notes


def config_of(tiny: SimpleNamespace, folder: Path, **changes: Any) -> RunConfig:
    tree = {"name": "x", "run_dir": str(folder), "data": {"sources": [{"url": "x"}]}, "model": tiny.config}
    return RunConfig.model_validate({**tree, **changes})


@pytest.mark.parametrize("name", ["certificate/certificate.json", "g_lm/extract.json", "weights/config.json"])
def test_what_was_edited_after_its_stage_is_not_packaged(tiny: SimpleNamespace, tmp_path: Path, name: str) -> None:
    files = {
        "consolidate": "weights/config.json", "extract": "g_lm/extract.json", "validate": "certificate/certificate.json",
    }  # fmt: skip
    for stage in NAMES[:-1]:
        outputs = {}
        if stage in files:
            publish_json(tmp_path / files[stage], {"verdict": "failed"})
            outputs = {files[stage]: facts_of(tmp_path / files[stage])}
        record = {"stage": stage, "inputs": "", "outputs": outputs, "result": {"verdict": "certified"}}
        publish_json(tmp_path / "stages" / f"{stage}.json", {"schema_version": STAGE_VERSION, **record})
    pipeline = Pipeline(config_of(tiny, tmp_path), launch=lambda *_: None, report=lambda _: None)
    with pytest.raises(UserError, match="schema_version None"):
        pipeline.stage("bundle")  # untouched: it reads the empty files
    publish_json(tmp_path / name, {"verdict": "passed"})
    with pytest.raises(UserError, match=rf"{name}: changed since `pldr (consolidate|extract|validate)` wrote it; run"):
        pipeline.stage("bundle")


def test_the_recipe_is_the_checkpoints_whatever_the_configuration_says_today(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    train = {"steps": 100, "warmup_steps": 0, "weight_decay": 0.1, "metric_weight_decay": 4.0}
    train["freeze_g"] = {"at_step": 40, "become": "parameter"}
    source = recipe_of(config_of(tiny, tmp_path, train=train, seed=7).as_dict())
    today = config_of(tiny, tmp_path, train={"steps": 999_999, "metric_weight_decay": 0.1, "micro_batch": 2}, seed=99)
    assert not any("ACCELERATED" in line for line in notes(today, {}))
    trained = as_trained(today, RunPaths(tmp_path), source)
    assert any("ACCELERATED RECIPE: the metric learner had weight decay 4" in line for line in notes(trained, source))
    assert (trained.seed, trained.train.steps, trained.train.micro_batch) == (7, 100, 2)
    assert trained.train.freeze_g is not None and trained.train.freeze_g.become == "parameter"
    assert trained.post == today.post and trained.model == today.model


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "run `pldr consolidate CONFIG` again"),
        ({"seed": 1, "recipe": {"g_start": "paper"}}, "model.g_start 'paper'"),
    ],
)
def test_weights_of_an_unknown_or_another_recipe_are_refused(
    tiny: SimpleNamespace, tmp_path: Path, source: dict[str, Any], message: str
) -> None:
    config = config_of(tiny, tmp_path, model=replace(tiny.config, g_start="identity"))
    with pytest.raises(ConfigError) as caught:
        as_trained(config, RunPaths(tmp_path), source)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("code", "kind"), [(2, ConfigError), (1, UserError)])
def test_a_ranks_mistake_in_the_configuration_stays_one(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[UserError]
) -> None:
    rank = tmp_path / "rank"
    rank.write_text(f"#!/bin/sh\necho 'pldr: error: a checkpoint of another model'\nexit {code}\n")
    rank.chmod(rank.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(rank))
    paths = RunPaths(tmp_path)
    paths.logs.mkdir()
    with pytest.raises(kind, match="validate: a checkpoint of another model") as caught:
        validate._judge_on(2, config_of(tiny, tmp_path), paths)
    assert caught.value.exit_code == code


class Reader:
    """A split whose sequence i holds i + 10, those in `padded` behind padding; every `each` of them are a document."""

    def __init__(self, num_sequences: int, *, padded: Set[int] = frozenset(), each: int = 1) -> None:
        self.index = SimpleNamespace(packing="pad", block_sequences=16, context_length=3, folder="tokens")
        self.num_sequences, self.padded, self.each = num_sequences, padded, each
        self.split, self.is_local, self.shards = "val", True, [SimpleNamespace(sequences=num_sequences)]

    def read(self, chosen: Any) -> Any:
        return np.array([self.sequence(int(i)) for i in chosen])

    def sequence(self, i: int) -> list[int]:
        last = 3 if i % self.each == self.each - 1 else i + 10  # eos
        return [i + 10, i + 10, 0 if i in self.padded else i + 10, last]


@pytest.fixture
def held(tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """held_out of a split, with 6 prompts: the numbers of the sequences, and of the documents."""

    def of(reader: Reader, half: int) -> tuple[list[int], int]:
        monkeypatch.setattr("pipeline.data.tokens.index.TokenIndex.load", lambda folder: SimpleNamespace(folder=folder))
        monkeypatch.setattr("pipeline.data.loading.reader.open_split", lambda *_, **__: reader)
        config = config_of(tiny, tmp_path, post={"prompts": 6, "min_prompts": 6})
        found = held_out(config, RunPaths(tmp_path), half=half)
        return [int(row[0]) - 10 for row in found.sequences_NT], found.documents

    return of


@pytest.mark.parametrize(
    ("padded", "unpadded"),
    [
        (set(), 6),
        ({0, 18, 38, 58}, 6),  # replaced
        (set(range(0, 90)), 5),  # as many as there are
    ],
)
def test_padded_sequences_are_replaced_as_long_as_there_are_others(
    held: Callable[..., Any], padded: set[int], unpadded: int
) -> None:
    found, documents = held(Reader(100, padded=padded), 0)
    assert len(found[:unpadded]) == len(set(found[:unpadded])) == unpadded == documents
    assert all(i % 2 == 0 for i in found) and not set(found[:unpadded]) & padded
    assert set(found[unpadded:]) <= padded and len(found) == unpadded + min(6, sum(i % 2 == 0 for i in padded))


def test_what_is_judged_is_from_as_many_documents_as_there_are(held: Callable[..., Any]) -> None:
    for each, documents in ((20, 5), (50, 2), (4, 6)):
        found, count = held(Reader(100, each=each), 1)
        assert len(set(found)) == 6 and all(i % 2 == 1 for i in found)
        assert count == len({i // each for i in found}) == documents


def test_g_comes_from_other_documents_than_it_is_judged_by_where_there_are_enough(held: Callable[..., Any]) -> None:
    judged, _ = held(Reader(100, each=4), 1)
    extracted, documents = held(Reader(100, each=4), 0)
    assert not {i // 4 for i in judged} & {i // 4 for i in extracted} and documents == 6
    few, _ = held(Reader(100, each=20), 0)  # from documents that are judged as well, but not from the same sequences
    assert len(few) == 6 and all(i % 2 == 0 for i in few)


def test_too_few_held_out_sequences_are_an_error(held: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="tokens: 3 held-out sequences are too few to judge with; raise data.val_f"):
        held(Reader(3), 1)
