"""Where a run's store lies when nothing names one, and that everything that happens to a run directory later finds it again."""

import contextlib
import shutil
import sqlite3
from collections import namedtuple
from pathlib import Path

import pytest

from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths
from pipeline.errors import ConfigError
from pipeline.io import mounts, storage
from pipeline.tracking import default_store, outbox
from pipeline.tracking.client import client, tracking_uri
from pipeline.tracking.default_store import default_uri, for_several_nodes, job_uri, stores_of
from pipeline.tracking.run import known_run, open_run
from pipeline.tracking.sqlite_store import make_store, uri_of

TREE = {
    "name": "t",
    "data": {"sources": [{"url": "x.txt"}]},
    "model": {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8},
}
Mount = namedtuple("Mount", "mountpoint fstype")


def configuration(folder, **sections):
    return parse_config({**TREE, "run_dir": str(folder), **sections}, where="test")


@pytest.fixture
def runs(tmp_path, empty_shared_store):
    """A folder of runs with their store."""
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_shared_store, tmp_path / "runs")
    return tmp_path / "runs"


def opened(folder, **options):
    config = configuration(folder)
    return open_run(config, RunPaths(config.run_dir), **options)


def noted(folder, text):
    """Log a small file with the run of a directory; returns where MLflow has put it."""
    run = opened(folder)
    storage.publish_bytes(run.paths.logs / f"{text}.txt", text.encode())
    outbox.log_files(run, {str(run.paths.logs / f"{text}.txt"): "notes"})
    return client(run.uri).get_run(run.id).info.artifact_uri


def test_runs_in_one_folder_share_a_store(runs):
    one, two = opened(runs / "a"), opened(runs / "b")
    assert one.uri == two.uri == uri_of(runs / "mlflow.db") and one.id != two.id
    assert {run.info.run_id for run in client(one.uri).search_runs(["1"])} == {one.id, two.id}
    assert noted(runs / "a", "one").startswith((runs / "mlartifacts" / one.id).as_uri())


def test_the_configuration_comes_first_then_the_variable_then_an_old_store_then_the_shared_one(tmp_path, monkeypatch):
    root = tmp_path / "runs" / "a"
    config = configuration(root)
    assert tracking_uri(config) == uri_of(tmp_path / "runs" / "mlflow.db")
    root.mkdir(parents=True)
    (root / "mlflow.db").touch()
    assert tracking_uri(config) == uri_of(root / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert tracking_uri(config) == "http://127.0.0.1:9"
    assert tracking_uri(configuration(root, tracking={"uri": "http://127.0.0.1:8"})) == "http://127.0.0.1:8"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///x.db")
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(config) == uri_of(tmp_path / "x.db")


@pytest.mark.parametrize("uri", ["file:/tmp/mlruns", "./mlruns", "http://user:secret@127.0.0.1:9"])
def test_a_variable_that_is_no_uri_of_ours_is_one_line(tmp_path, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match="^MLFLOW_TRACKING_URI: .*; or unset it$") as error:
        tracking_uri(configuration(tmp_path / "a"))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("root", "mounted", "reason"),
    [
        ("/work/runs/a", [("/", "ext4"), ("/work", "nfs4")], "network file system (nfs4)"),
        ("/work/runs/a", [("/", "ext4"), ("/work", "fuse.sshfs")], "network file system (fuse.sshfs)"),
        ("/work/runs/a", [("/", "nfs"), ("/", "overlay"), ("/work", "fuse.mergerfs"), ("/worker", "nfs")], None),
        ("/a", [("/", "ext4")], "run_dir lies in /"),
        (".", [("/", "ext4")], "run_dir is the working directory"),
    ],
)
def test_what_keeps_a_store_in_the_run_directory(monkeypatch, root, mounted, reason):
    monkeypatch.setattr(mounts.psutil, "disk_partitions", lambda all: [Mount(*mount) for mount in mounted])
    monkeypatch.setattr(mounts, "_existing", Path)  # nothing is asked about the paths themselves
    monkeypatch.setattr(Path, "resolve", lambda path: path)
    monkeypatch.setattr(default_store, "same_disk", lambda *_: True)
    monkeypatch.setattr(default_store, "writable", lambda _: True)
    root = RunPaths(root).root
    found = default_store.why_inside(root)
    assert (found is None) == (reason is None) and (reason or "") in (found or "")
    assert default_uri(root) == uri_of((root if reason else root.parent) / "mlflow.db")


def test_a_run_directory_on_another_disk_keeps_its_store(tmp_path):
    with contextlib.ExitStack() as stack:
        shared_memory = Path("/dev/shm") / tmp_path.name
        shared_memory.mkdir()
        stack.callback(shared_memory.rmdir)
        (tmp_path / "a").symlink_to(shared_memory)
        assert default_uri(tmp_path / "a") == uri_of(tmp_path / "a" / "mlflow.db")
        assert default_uri(tmp_path / "b") == uri_of(tmp_path / "mlflow.db")


def test_one_line_says_that_a_store_is_in_the_run_directory(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(default_store, "writable", lambda _: False)
    first = opened(tmp_path / "a")
    assert first.uri == uri_of(tmp_path / "a" / "mlflow.db")
    assert caplog.text.count("is not writable for this user; to compare runs in one place, set tracking.uri") == 1
    monkeypatch.undo()
    assert opened(tmp_path / "a").id == first.id and known_run(first.config, first.paths).uri == first.uri
    assert caplog.text.count("in the run directory") == 1


def test_a_run_of_several_nodes_keeps_its_store_when_one_node_goes_on(tmp_path, caplog):
    root = tmp_path / "a"
    config = for_several_nodes(configuration(root), 2)
    assert "the launch is on 2 nodes; to compare runs" in caplog.text and len(caplog.records) == 1
    run = open_run(config, RunPaths(root))
    assert run.uri == uri_of(root / "mlflow.db") and journal(root / "mlflow.db") == "delete"
    assert opened(root).id == run.id and opened(root).uri == run.uri
    assert tracking_uri(for_several_nodes(configuration(root), 2)) == run.uri and len(caplog.records) == 1


def test_a_run_of_one_node_keeps_its_store_when_several_go_on(runs, caplog):
    run = opened(runs / "a")
    config = for_several_nodes(configuration(runs / "a"), 2)
    assert open_run(config, run.paths).id == run.id and tracking_uri(config) == run.uri and not caplog.records


def journal(file):
    with contextlib.closing(sqlite3.connect(file)) as database:
        return database.execute("PRAGMA journal_mode").fetchone()[0]


def test_only_a_shared_store_on_a_local_disk_has_a_write_ahead_log(
    tmp_path, monkeypatch, empty_store, empty_shared_store
):
    assert (journal(empty_store), journal(empty_shared_store)) == ("delete", "wal")
    monkeypatch.setattr("pipeline.tracking.sqlite_store.network_file_system", lambda path: "nfs4")
    make_store(tmp_path / "mlflow.db")
    assert journal(tmp_path / "mlflow.db") == "delete"


def test_a_folder_of_runs_that_was_moved_goes_on_where_it_is(runs, empty_shared_store):
    run_id, home = opened(runs / "a").id, runs.parent / "elsewhere"
    noted(runs / "a", "one")
    runs.rename(home)
    runs.mkdir()
    shutil.copy(empty_shared_store, runs)
    opened(runs / "new")  # a store at the old place, with other runs
    run = opened(home / "a")
    assert (run.id, run.uri) == (run_id, uri_of(home / "mlflow.db"))
    assert noted(home / "a", "two").startswith((home / "mlartifacts").as_uri())


def test_a_copied_folder_of_runs_is_one_of_its_own(runs):
    run_id = opened(runs / "a").id
    shutil.copytree(runs, runs.parent / "copy")
    before = client(uri_of(runs / "mlflow.db")).get_run(run_id).to_dictionary()
    copy = opened(runs.parent / "copy" / "a")
    assert (copy.id, copy.uri) == (run_id, uri_of(runs.parent / "copy" / "mlflow.db"))
    outbox.set_tags(copy, {"only": "here"})
    assert noted(copy.paths.root, "two").startswith((runs.parent / "copy" / "mlartifacts").as_uri())
    assert client(uri_of(runs / "mlflow.db")).get_run(run_id).to_dictionary() == before


@pytest.mark.parametrize("target", ["runs/b", "other/a", "with_a_store/a"])
@pytest.mark.parametrize("way", ["moved", "copied"])
def test_a_run_without_its_store_stays_in_it(runs, empty_shared_store, target, way):
    run_id, target = opened(runs / "a").id, runs.parent / target
    (runs.parent / "with_a_store").mkdir()
    shutil.copy(empty_shared_store, runs.parent / "with_a_store")
    if way == "moved":
        target.parent.mkdir(exist_ok=True)
        (runs / "a").rename(target)
        assert (opened(target).id, opened(target).uri) == (run_id, uri_of(runs / "mlflow.db"))
        assert default_uri(target.with_name("new")) == uri_of(target.parent / "mlflow.db")
    else:
        shutil.copytree(runs / "a", target)
        with pytest.raises(ConfigError, match=f"is a copy of .*, and both would write to MLflow run {run_id}"):
            opened(target)
        assert not (runs.parent / "other" / "mlflow.db").exists()


def test_a_run_of_a_server_stays_there(tmp_path):
    root = tmp_path / "runs" / "a"
    record = {"tracking_uri": "http://127.0.0.1:9", "run_id": "a" * 32, "tags": {}}
    storage.publish_json(root / "run.json", record)
    assert tracking_uri(configuration(root)) == "http://127.0.0.1:9"
    storage.publish_json(root / "run.json", {**record, "run_id": None})  # never made there: a mistyped server, maybe
    assert tracking_uri(configuration(root)) == uri_of(tmp_path / "runs" / "mlflow.db")


def test_a_job_finds_the_store_that_moved_along(runs):
    """A sweep's store lies above its children. Of a run that MLflow has not made, only the job knows the store."""
    child, store = Path("sweep/children/x"), runs / "mlflow.db"
    (runs / child).mkdir(parents=True)
    moved = runs.rename(runs.parent / "moved")
    assert job_uri(moved / child, uri_of(store), runs / child) == uri_of(moved / "mlflow.db")
    assert job_uri(moved / child, "http://127.0.0.1:9", runs / child) == "http://127.0.0.1:9"


def test_the_stores_of_a_folder_of_runs(tmp_path):
    for folder in ("runs/sweeps/old", "runs/old", "runs", "runs/sweeps", "runs/a/b/c"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "mlflow.db").touch()
    found = [uri.removeprefix(f"sqlite:///{tmp_path}/") for uri in stores_of(tmp_path / "runs")]
    assert found == [f"runs/{name}mlflow.db" for name in ("", "old/", "sweeps/", "sweeps/old/")]
