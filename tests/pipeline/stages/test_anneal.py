"""`--anneal-from`: which run it is, where it begins, and what it refuses. Nothing trains here."""

import shutil

import pytest
import yaml

from pipeline.config.load import load_config
from pipeline.config.paths import RunPaths
from pipeline.config.schedule import learning_rate
from pipeline.errors import ConfigError, UserError
from pipeline.io import storage
from pipeline.io.sealed import publish_sealed
from pipeline.stages.anneal import branch
from pipeline.stages.resume import ORIGIN


@pytest.fixture
def parent(tmp_path, monkeypatch):
    """Makes the YAML of a run `runs/long` with a schedule and its checkpoints of steps 50, 3000 and 4500."""
    monkeypatch.chdir(tmp_path)

    def make(**train):
        tree = {
            "name": "long",
            "run_dir": "runs/long",
            "data": {"sources": ["x.txt"]},
            "model": {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8},
            "train": {"steps": 5000, "warmup_steps": 100, **train},
        }
        (tmp_path / "long.yaml").write_text(yaml.safe_dump(tree))
        config = load_config("long.yaml").as_dict()
        for step in (50, 3000, 4500):
            state = {"schema_version": 2, "step": step, "config": config}
            storage.publish_json(RunPaths("runs/long").checkpoints / f"step-{step:06d}" / "state.json", state)
        return "long.yaml"

    return make


def begin(file, text, *overrides):
    return branch(file, overrides, text, print)


@pytest.mark.parametrize("schedule", ["wsd", "constant"])
@pytest.mark.parametrize("text", ["step-003000", "runs/long/checkpoints/step-003000", "TMP/step-003000"])
def test_it_decays_over_its_share_in_a_run_of_its_own(parent, tmp_path, schedule, text):
    file = parent(schedule=schedule)
    text = text.replace("TMP", f"{tmp_path}/runs/long/checkpoints")
    begun = begin(file, text)
    train = begun.config.train
    assert (train.schedule, train.steps, train.decay_begins, begun.state["step"]) == ("wsd", 3750, 3000, 3000)
    assert begun.config.name == "long-anneal-3000"
    assert RunPaths(begun.config.run_dir).root == tmp_path / "runs" / "long-anneal-3000"
    assert begun.resume == str(RunPaths("runs/long").checkpoints / "step-003000")
    straight = load_config(file, ["train.schedule=wsd", "train.steps=3750"]).train
    assert [learning_rate(train, s) for s in range(3751)] == [learning_rate(straight, s) for s in range(3751)]


@pytest.mark.parametrize("share", [0.001, 0.07, 1 / 3, 0.9])
def test_it_begins_at_the_checkpoint_for_every_share(parent, share):
    file = parent(schedule="constant")
    train = begin(file, "step-003000", f"train.decay_share={share!r}").config.train
    assert train.decay_begins == 3000 and train.steps == round(3000 / (1 - share))


def test_its_length_shape_name_and_folder_can_be_given(parent):
    file = parent(schedule="constant")
    given = ("train.steps=3100", "train.decay_shape=1-sqrt", "train.min_lr_ratio=0", "name=cool", "run_dir=runs/cool")
    config = begin(file, "step-003000", *given).config
    assert (config.train.steps, config.train.decay_begins, config.train.decay_shape) == (3100, 3000, "1-sqrt")
    assert (config.name, config.run_dir, config.train.min_lr_ratio) == ("cool", "runs/cool", 0)


@pytest.mark.parametrize(
    ("train", "text", "overrides", "problem"),
    [
        ({}, "step-003000", (), "trained with a cosine schedule, which has no stable part"),
        ({"schedule": "wsd"}, "step-000050", (), "step 50 is not in the stable part, from 100 to 4000"),
        ({"schedule": "wsd"}, "step-004500", (), "step 4500 is not in the stable part, from 100 to 4000"),
        ({"schedule": "wsd"}, "step-000777", (), "step-000777: no such checkpoint"),
        ({"schedule": "wsd"}, "runs/long", (), "name one checkpoint"),
        ({"schedule": "wsd"}, "runs:/abc", (), "name one checkpoint"),
        ({"schedule": "wsd"}, "step-003000", ("train.schedule=cosine",), "remove train.schedule=cosine"),
        ({"schedule": "wsd"}, "step-003000", ("train.steps=3000",), "more than 3000 are needed"),
        ({"schedule": "wsd"}, "step-003000", ("train.steps=4000", "train.decay_share=0.1"), "give one of them"),
        ({"schedule": "wsd"}, "step-003000", ("train.decay_share=1",), "between 0 and 1"),
        ({"schedule": "wsd"}, "step-003000", ("run_dir=runs/long",), "begins a run of its own; set run_dir"),
    ],
)
def test_what_it_refuses_is_one_line(parent, train, text, overrides, problem):
    with pytest.raises(UserError, match=problem) as error:
        begin(parent(**train), text, *overrides)
    assert "\n" not in str(error.value) and "--anneal-from" in str(error.value)


def test_started_again_it_continues_also_when_its_parent_has_removed_the_checkpoint(parent):
    file = parent(schedule="wsd")
    first = begin(file, "step-003000")
    origin = {"schema_version": 1, "checkpoint": first.resume, "manifest_sha256": "0", "mlflow_run_id": "1"}
    publish_sealed(RunPaths("runs/long-anneal-3000").root / ORIGIN, origin)
    shutil.rmtree(first.resume)
    again = begin(file, "step-003000")
    assert again.resume == "auto" and again.config == first.config
    with pytest.raises(ConfigError, match="no such checkpoint"):
        begin(file, "step-003000", "run_dir=runs/another")
