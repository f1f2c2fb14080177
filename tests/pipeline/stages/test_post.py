"""The stages after training: nothing edited is packaged, no override rewrites the recipe, padding is replaced."""

from __future__ import annotations

import stat
import sys
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
    """A split whose sequence i holds i + 1, those in `padded` behind padding."""

    def __init__(self, num_sequences: int, padded: set[int]) -> None:
        self.num_sequences, self.padded, self.most = num_sequences, padded, 0

    def read(self, chosen: Any) -> Any:
        self.most = max(self.most, len(chosen))
        return np.array([[0 if i in self.padded and t == 2 else i + 1 for t in range(3)] for i in chosen])


@pytest.mark.parametrize(
    ("padded", "first", "read"),
    [
        (set(), [0, 18, 38, 58, 78, 98], 6),  # none is padded: those that were taken always
        ({0, 18, 38, 58}, [8, 26, 44, 62, 80, 98], 12),  # replaced, evenly
        (set(range(0, 90)), [90, 92, 94, 96, 98], 50),  # as many as there are
    ],
)
def test_padded_sequences_are_replaced_as_long_as_there_are_others(
    tiny: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    padded: set[int],
    first: list[int],
    read: int,
) -> None:
    reader = Reader(100, padded)
    monkeypatch.setattr("pipeline.data.tokens.index.TokenIndex.load", lambda folder: SimpleNamespace(folder=folder))
    monkeypatch.setattr("pipeline.data.loading.reader.open_split", lambda *_, **__: reader)
    found = held_out(config_of(tiny, tmp_path, post={"prompts": 6, "min_prompts": 6}), RunPaths(tmp_path), half=0)
    unpadded = [int(row[0]) - 1 for row in found if (row != 0).all()]
    assert unpadded == [int(row[0]) - 1 for row in found[: len(unpadded)]]  # before the padded ones
    assert (unpadded, reader.most) == (first, read)
    assert all(i % 2 == 0 for i in unpadded) and not set(unpadded) & padded
