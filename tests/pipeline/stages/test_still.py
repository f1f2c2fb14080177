"""Silence is broken: what is done, and for how long."""

import time

import pytest

from pipeline.stages import still
from pipeline.stages import train as module
from pipeline.stages.table import STAGES


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(still, "TELL_S", 0.05)


def slow(*_, **__):
    time.sleep(0.5)
    raise ValueError("the end of the test")


def test_a_stage_that_reports_nothing_is_still_heard_of(often, make, monkeypatch):
    """`validate` takes minutes for a large model."""
    assert {stage.name for stage in STAGES if not stage.is_silent} == {"shard", "tokenize", "train"}
    pipeline, reported = make()
    pipeline.stage("shard")
    monkeypatch.setattr("pipeline.data.tokens.train_tokenizer.make_tokenizer", slow)
    with pytest.raises(ValueError):
        pipeline.stage("tokenizer")
    said = [line for line in reported if line.startswith("  tokenizer: ")]
    assert said and said[0].endswith(" s")
    time.sleep(0.2)
    assert [line for line in reported if line.startswith("  tokenizer: ")] == said  # and it ends with the stage


def test_a_training_says_what_it_waits_for_before_its_ranks_start(often, make, monkeypatch):
    """A large checkpoint is read and hashed before it is resumed from."""
    pipeline, reported = make()
    for name in ("shard", "tokenizer", "tokenize"):
        pipeline.stage(name)
    monkeypatch.setattr(module, "find_start", slow)
    with pytest.raises(ValueError):
        pipeline.stage("train")
    assert any(line.startswith("  opening MLflow, and looking for a checkpoint") for line in reported)
