"""Jobs that begin at once in one store: all start. Real processes, real stores of MLflow."""

import json
import os
import shutil
import sqlite3
import tempfile
from contextlib import closing

import pytest

from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths
from pipeline.inference import register
from pipeline.tracking import outbox
from pipeline.tracking.client import client, import_mlflow
from pipeline.tracking.outbox import Pending
from pipeline.tracking.run import TrackedRun, known_run, open_run
from pipeline.tracking.run_record import new_record
from pipeline.tracking.sqlite_store import make_store, uri_of

import_mlflow()
TREE = {
    "name": "t",
    "data": {"sources": [{"url": "x.txt"}]},
    "model": {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8},
}


def configuration(run_dir, uri=None, experiment="new"):
    tracking = {"uri": uri, "experiment": experiment}
    return parse_config({**TREE, "run_dir": str(run_dir), "tracking": tracking}, where="test")


@pytest.mark.parametrize("own_tmpdir", [False, True])  # a Slurm job has a TMPDIR of its own: MLflow's locks are there
@pytest.mark.slow
def test_all_start_with_one_new_sqlite_file(tmp_path, at_once, own_tmpdir):
    uri = f"sqlite:///{tmp_path}/shared.db"

    def start(turn, number):
        if own_tmpdir:
            os.environ["TMPDIR"], tempfile.tempdir = tempfile.mkdtemp(dir=tmp_path), None
        config = configuration(tmp_path / f"run{number}", uri)
        return open_run(config, RunPaths(config.run_dir)).record.run_id

    ids = at_once(start)
    assert len(set(ids)) == 5 and None not in ids
    assert [e.name for e in client(uri).search_experiments()].count("new") == 1
    assert not list(tmp_path.glob(".shared.db.*"))


@pytest.mark.slow
def test_a_new_store_is_complete_or_not_there(tmp_path, at_once, empty_store):
    """Made by several processes, of which some look at it as soon as it is there."""

    def tables(file):
        with closing(sqlite3.connect(file)) as database:
            return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}

    def make(turn, number):
        file = tmp_path / "new.db"
        if number:
            make_store(file)
        while not file.exists():
            pass
        return tables(file)

    assert at_once(make, processes=3) == [tables(empty_store)] * 3


@pytest.mark.slow
def test_models_versions_and_an_alias_of_several(tmp_path, at_once, empty_store):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    uri, mlflow = uri_of(tmp_path / "mlflow.db"), None

    def work(turn, number):
        nonlocal mlflow
        mlflow = mlflow or client(uri)  # in the first turn, in each process
        if turn == 0:
            for model in range(2 * number, 2 * number + 2):
                register._ensure_model(mlflow, f"model{model}")
        elif turn == 1:
            register._ensure_model(mlflow, "model0")
            return int(register._create_version(mlflow, "model0", f"file://{tmp_path}/{number}"))
        elif turn == 2 and number == 0:
            for model in range(1, 10):
                register._create_version(mlflow, f"model{model}", f"file://{tmp_path}")
        elif turn > 2:  # MLflow refuses one of several in about every second turn
            register._set_alias(mlflow, f"model{turn - 3}", "1")
        return None

    versions = at_once(work, rounds=13)
    assert sorted(versions[5:10]) == [1, 2, 3, 4, 5]
    models = client(uri).search_registered_models()
    assert {model.name: model.aliases for model in models} == {f"model{n}": {"certified": 1} for n in range(10)}


def test_a_run_is_made_once_by_the_processes_of_one_run_directory(tmp_path, at_once, empty_store):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    config = configuration(tmp_path)
    paths = RunPaths(config.run_dir)
    TrackedRun(config, paths, new_record(config, paths)).write()

    made = at_once(lambda turn, number: known_run(config, paths).create())
    assert len(set(made)) == 1, made
    mlflow = client(uri_of(tmp_path / "mlflow.db"))
    experiment = mlflow.get_experiment_by_name("new")
    assert [run.info.run_name for run in mlflow.search_runs([experiment.experiment_id])] == ["t"]


def test_what_is_deferred_while_something_is_sent_is_not_lost(tmp_path, at_once):
    config = configuration(tmp_path)
    paths = RunPaths(config.run_dir)

    def defer(turn, number):
        outbox._defer(paths, tags={f"{turn}.{number}": "x"}, files={str(tmp_path / f"{turn}.{number}"): "files"})

    at_once(defer, rounds=15)
    pending = Pending.read(paths)
    assert len(pending.tags) == len(pending.files) == 75


def test_a_flush_removes_only_what_it_sent(tmp_path, empty_store, monkeypatch):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    config = configuration(tmp_path)
    paths = RunPaths(config.run_dir)
    run = open_run(config, paths)

    def sent_slowly(uri):
        outbox._defer(paths, tags={"late": "1", "early": "2"}, status="FAILED")  # by another process, meanwhile
        return client(uri)

    outbox._defer(paths, tags={"early": "1"}, status="FINISHED")
    monkeypatch.setattr(outbox, "client", sent_slowly)
    assert outbox._flush(run, run.id)
    left = json.loads((paths.logs / "pending.json").read_text())
    assert (left["tags"], left["status"]) == ({"late": "1", "early": "2"}, "FAILED")
    monkeypatch.undo()
    assert outbox._flush(run, run.id) and not (paths.logs / "pending.json").exists()
    assert client(run.uri).get_run(run.id).data.tags["late"] == "1"


@pytest.mark.slow
def test_all_start_at_a_server_with_a_new_experiment(tmp_path, at_once, server):
    server.start()

    def start(turn, number):
        config = configuration(tmp_path / f"run{turn}.{number}", server.uri, f"new{turn}")
        run_id = open_run(config, RunPaths(config.run_dir)).record.run_id
        mlflow = client(server.uri)
        register._ensure_model(mlflow, f"model{turn}")
        source = f"{mlflow.get_run(run_id).info.artifact_uri}/bundle"
        version = register._create_version(mlflow, f"model{turn}", source, run_id=run_id)
        register._set_alias(mlflow, f"model{turn}", version)
        return run_id, int(version)

    made = at_once(start, rounds=4)
    assert len({run_id for run_id, _ in made}) == 20 and None not in {run_id for run_id, _ in made}
    assert sorted(version for _, version in made) == sorted([1, 2, 3, 4, 5] * 4)
