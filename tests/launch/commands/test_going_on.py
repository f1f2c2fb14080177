"""The command that a refused "train longer" names, and the options that begin a run."""

import shlex
from types import SimpleNamespace

import pytest

from launch.cli import main, parse
from launch.commands.going_on import with_command
from pipeline.config.load import load_config
from pipeline.config.paths import RunPaths
from pipeline.errors import AnotherRunError, ConfigError
from pipeline.io import storage
from tests.helpers.stages import trained


def refused(config, *words, key="train.steps"):
    arguments = parse(["run", str(config), *words])
    pipeline = SimpleNamespace(config=load_config(config, arguments.overrides))
    pipeline.paths = RunPaths(pipeline.config.run_dir)
    with pytest.raises(ConfigError) as error, with_command(pipeline, arguments):
        raise AnotherRunError("MLflow run 1 was made otherwise", key=key)
    return str(error.value)


def test_another_recipe_is_refused_with_the_command_that_goes_on(make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_run(tmp_path, steps=50)
    where = f"run_dir={tmp_path}/my runs/a"
    assert refused(config, where, "train.steps=60") == "MLflow run 1 was made otherwise"  # nothing to go on from
    trained(tmp_path / "my runs" / "a", step=50)
    command = refused(config, where, "train.steps=60").partition("with the same data: ")[2]
    old = f"{tmp_path}/my runs/a"
    expected = ["pldr", "run", str(config), "train.steps=60", f"run_dir={old}-60", "--resume", old]
    assert shlex.split(command) == expected
    for taken in ("a-60", "a-2"):
        (tmp_path / "my runs" / taken).mkdir()
    assert f"run_dir={old}-60-2" in shlex.split(refused(config, where, "train.steps=60"))
    assert f"run_dir={old}-3" in shlex.split(refused(config, where, "seed=5", key="seed"))


def test_a_wsd_run_goes_on_from_its_stable_part(make_run, tmp_path):
    config = make_run(tmp_path, steps=50, schedule="wsd", warmup_steps=5)
    for step in (20, 40, 50):
        checkpoint = RunPaths(tmp_path / "run").checkpoints / f"step-{step:06d}"
        state = {"schema_version": 2, "step": step, "config": load_config(config).as_dict()}
        storage.publish_json(checkpoint / "state.json", state)
        (checkpoint / "COMMITTED").write_text("x")
    said = refused(config, "train.steps=100")
    assert "of the stable part" in said and said.endswith(f"--resume {tmp_path}/run/checkpoints/step-000040")
    assert said.count("step-0000") == 1
    assert refused(config, "train.steps=100", "train.schedule=cosine").endswith(f"--resume {tmp_path}/run")


def test_another_decay_is_refused_with_the_command_that_decays(make_run, tmp_path):
    config = make_run(tmp_path, steps=50, warmup_steps=5)
    old = f"{tmp_path}/run-anneal-20"
    trained(tmp_path / "run-anneal-20", step=50)
    said = refused(config, "train.steps=30", f"run_dir={old}", "--anneal-from", "step-000020")
    command = ["pldr", "run", str(config), "train.steps=30", f"run_dir={old}-30", "--anneal-from", "step-000020"]
    assert shlex.split(said.partition("once more: ")[2]) == command


def test_a_run_begins_at_one_place(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "x.yaml", "--resume", "runs/old", "--anneal-from", "step-000500"])
    assert stop.value.code == 2 and "not allowed with" in capsys.readouterr().err
