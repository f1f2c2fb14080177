"""A store is known by its file, and what is wrong with it is told apart. All with real SQLite stores of MLflow."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths
from pipeline.errors import ConfigError, UserError
from pipeline.io import storage
from pipeline.stages.post import package
from pipeline.stages.validate import certify, require_own_run
from pipeline.tracking import outbox
from pipeline.tracking.client import TIMEOUT, client, import_mlflow, patience, tracking_uri
from pipeline.tracking.outbox import log_report
from pipeline.tracking.run import known_run, open_run
from pipeline.tracking.sqlite_store import file_of, make_store, merge_log, same_store, uri_of

TREE = {
    "name": "t",
    "data": {"sources": [{"url": "x.txt"}]},
    "model": {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8},
}
ODD = ["run%20x", "what?", "a#b", "a b", "ünïcode", "100%", "%3F", "a::b", "star*", "br[x]", "$HOME", "quote'\""]


@pytest.fixture
def make(empty_store):
    """A run with its store in its directory, as earlier versions made them."""

    def make_configuration(folder, *, store=None, **sections):
        folder.mkdir(parents=True, exist_ok=True)
        file = store or folder / "mlflow.db"
        if not file.exists():
            shutil.copy(empty_store, file)
        return parse_config({**TREE, "run_dir": str(folder), **sections}, where="test")

    return make_configuration


@pytest.fixture
def make_shared(empty_shared_store):
    """A run with its store beside its directory."""

    def make_configuration(folder, **sections):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder.parent / "mlflow.db").exists():
            shutil.copy(empty_shared_store, folder.parent)
        return parse_config({**TREE, "run_dir": str(folder), **sections}, where="test")

    return make_configuration


def opened(config, **options):
    return open_run(config, RunPaths(config.run_dir), **options)


def attach(config, text):
    """Log a small file with the run of a configuration; returns the files that lie below its run directory's artifacts."""
    run, paths = opened(config), RunPaths(config.run_dir)
    note = paths.logs / "note.txt"
    storage.publish_bytes(note, text.encode())
    outbox.log_files(run, {str(note): "notes"})
    return {p.read_text() for p in (paths.root / "mlartifacts").rglob("note.txt")}


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_name_of_a_run_directory_is_a_name(make, tmp_path, name):
    config = make(tmp_path / name)
    assert attach(config, "one") == {"one"}
    assert opened(config).id == opened(config).id
    assert file_of(tracking_uri(config)) == tmp_path / name / "mlflow.db"
    assert [p.name for p in tmp_path.iterdir()] == [name]  # nothing beside it


def test_a_store_is_the_same_by_every_path(make, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    by_link = make(tmp_path / "link" / "run")
    first = opened(by_link).id
    by_name = make(tmp_path / "real" / "run")
    assert opened(by_name).id == first and attach(by_name, "one") == {"one"}
    (tmp_path / "link").unlink()
    (tmp_path / "real").rename(tmp_path / "renamed")
    moved = make(tmp_path / "renamed" / "run")
    assert opened(moved).id == first and attach(moved, "two") == {"two"}
    assert [p.name for p in tmp_path.iterdir()] == ["renamed"]
    assert same_store(uri_of(tmp_path / "100%"), f"sqlite:///{tmp_path}/100%")  # as it was written before


def test_a_copy_of_a_run_writes_into_itself(make, tmp_path):
    config = make(tmp_path / "run")
    attach(config, "one")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    before = tree(tmp_path / "run")
    copy = make(tmp_path / "copy")
    assert opened(copy).id == opened(config).id
    before |= {"run.json": (tmp_path / "run" / "run.json").read_bytes()}
    assert attach(copy, "two") == {"two"}
    storage.publish_bytes(tmp_path / "copy" / "report" / "data.html", b"x")
    assert log_report(copy, RunPaths(copy.run_dir), tmp_path / "copy" / "report" / "data.html")
    assert tree(tmp_path / "run") == before
    shutil.rmtree(tmp_path / "run")
    run = known_run(copy, RunPaths(copy.run_dir))
    assert {f.path for f in client(run.uri).list_artifacts(run.id)} == {"notes", "data"}


def test_a_store_whose_artifacts_were_put_elsewhere_is_left_alone(make, tmp_path):
    config = make(tmp_path / "run", store=tmp_path / "mine.db", tracking={"uri": f"sqlite:///{tmp_path}/mine.db"})
    elsewhere = (tmp_path / "big" / "mlartifacts").as_uri()
    (tmp_path / "big" / "mlartifacts").mkdir(parents=True)
    client(tracking_uri(config)).create_experiment("pldr", artifact_location=elsewhere)
    attach(config, "one")
    assert list((tmp_path / "big" / "mlartifacts").rglob("note.txt"))


def test_artifacts_lie_beside_a_relative_database(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make(tmp_path / "run", store=tmp_path / "shared.db", tracking={"uri": "sqlite:///shared.db"})
    attach(config, "one")
    assert list((tmp_path / "mlartifacts").rglob("note.txt")) and not (tmp_path / "mlruns").exists()
    monkeypatch.chdir("/")
    absolute = make(tmp_path / "run", store=tmp_path / "shared.db", tracking={"uri": uri_of(tmp_path / "shared.db")})
    assert known_run(absolute, RunPaths(absolute.run_dir)) is not None


def test_a_copy_does_not_write_to_the_store_of_the_original(make, tmp_path):
    shared = {"store": tmp_path / "shared.db", "tracking": {"uri": uri_of(tmp_path / "shared.db")}}
    run_id = opened(make(tmp_path / "run", **shared)).id
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    copy = make(tmp_path / "copy", **shared)
    with pytest.raises(ConfigError, match=f"copy: is a copy of .*run, and both would write to MLflow run {run_id}"):
        opened(copy)
    with pytest.raises(ConfigError, match="is a copy of"):
        outbox.replay(copy, RunPaths(copy.run_dir))
    for attached in (certify, partial(package, uncertified=True)):  # refused before anything is measured or packaged
        with pytest.raises(ConfigError, match="is a copy of"):
            attached(copy, RunPaths(copy.run_dir))
    assert opened(copy, run_id=run_id).id == run_id  # asked for by name
    assert opened(copy).id == run_id
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert opened(make(tmp_path / "moved", **shared)).id == run_id


def test_a_copy_with_a_store_of_its_own_may_still_publish_beside_the_original(make, tmp_path):
    opened(make(tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    own = make(tmp_path / "copy", train={"publish_to": str(tmp_path / "published")})
    require_own_run(own, RunPaths(own.run_dir))
    with pytest.raises(ConfigError, match="is a copy of"):
        opened(own)


def test_what_is_pending_is_found_after_a_move(make, tmp_path):
    config = make(tmp_path / "run")
    run = opened(config)
    storage.publish_bytes(tmp_path / "run" / "logs" / "failures" / "a.txt", b"new")
    storage.publish_bytes(tmp_path / "run" / "certificate" / "b.txt", b"old")
    outbox._defer(run.paths, files={str(tmp_path / "run" / "logs" / "failures" / "a.txt"): "failure"})
    pending = outbox.Pending.read(run.paths)
    pending.files[str(tmp_path / "run" / "certificate" / "b.txt")] = "certificate"  # as it was kept before
    pending.write(run.paths)
    (tmp_path / "run").rename(tmp_path / "moved")
    run = opened(make(tmp_path / "moved"))
    outbox.set_tags(run, {"any": "tag"})
    found = {p.read_text() for p in (tmp_path / "moved" / "mlartifacts").rglob("*.txt")}
    assert found == {"new", "old"} and not (tmp_path / "run").exists()


def test_a_run_that_was_deleted_in_mlflow_is_refused_until_it_is_restored(make, tmp_path):
    config = make(tmp_path / "run")
    run = opened(config)
    client(run.uri).delete_run(run.id)
    for refused in (lambda: opened(config), lambda: outbox.replay(config, run.paths)):
        with pytest.raises(ConfigError, match=f"was deleted there; restore it with .* runs restore --run-id {run.id}"):
            refused()
    client(run.uri).restore_run(run.id)
    assert opened(config).id == run.id


def test_an_experiment_that_was_deleted_in_mlflow_is_refused_until_it_is_restored(make, tmp_path):
    config = make(tmp_path / "run")
    run = opened(config)
    experiment = client(run.uri).get_run(run.id).info.experiment_id
    client(run.uri).delete_experiment(experiment)
    new = make(tmp_path / "new", tracking={"uri": run.uri})
    for one in (config, new):
        with pytest.raises(
            ConfigError, match=f"experiment pldr .* restore --experiment-id {experiment}`, or set tracking"
        ):
            opened(one)
    client(run.uri).restore_experiment(experiment)
    assert opened(config).id == run.id and opened(new).id != run.id


@contextlib.contextmanager
def locked(file):
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        yield


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_locked_store_is_waited_for_with_the_spool(make, make_shared, tmp_path, caplog, monkeypatch, is_shared):
    monkeypatch.setattr("pipeline.tracking.sqlite_store.WAIT_S", 0.1)
    config = (make_shared if is_shared else make)(tmp_path / "run")
    with locked(file_of(tracking_uri(config))):
        run = opened(config)
        assert run.id.startswith("local-") and "database is locked" in caplog.text
        tracker = outbox.open_tracker(run)
        tracker.log(1, {"train/loss": 1.0})
        assert not tracker.close(wait_s=2)
        with pytest.raises(UserError, match="another program holds .*mlflow.db: wait until it is done"):
            outbox.replay(config, run.paths)
    assert outbox.replay(config, run.paths)["points_sent"] == 1


def damage(file):
    file.write_bytes(b"no database at all" * 1000)


def cut(file):
    file.write_bytes(file.read_bytes()[:100_000])


def of_another_version(file):
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (damage, r"(not a database|malformed); .*is damaged, or no database; .*keep it.* \.recover .* --resume"),
        (cut, r"malformed; .*is damaged, or no database; .*keep it.* \.recover .* --resume"),
        (os.unlink, r"mlflow.db: no such file, and .*run.json names MLflow run .* put the database back.* --resume"),
        (of_another_version, r"out-of-date .*copy .*mlflow.db as a backup, then `mlflow db upgrade"),
    ],
)
def test_what_is_wrong_with_a_store_is_told_and_nothing_is_changed(
    make, make_shared, tmp_path, fault, message, is_shared
):
    run_dir = Path("a" if is_shared else "")
    config = (make_shared if is_shared else make)(tmp_path / "run" / run_dir)
    run_id, file = opened(config).id, tmp_path / "run" / "mlflow.db"
    merge_log(file)
    fault(file)
    (tmp_path / "run").rename(tmp_path / "moved")  # MLflow looks at the version of a store only once
    before = tree(tmp_path / "moved")
    config = config.model_copy(update={"run_dir": str(tmp_path / "moved" / run_dir)})
    for refused in (lambda: opened(config), lambda: opened(config, run_id=run_id)):
        with pytest.raises(UserError, match=message) as caught:
            refused()
        assert "remove" not in str(caught.value)
        after = tree(tmp_path / "moved")
        if fault is of_another_version:  # its paths were set right
            after["mlflow.db"] = before["mlflow.db"]
        for part in ("mlflow.db-wal", "mlflow.db-shm"):  # SQLite's own: the log was merged
            after.pop(part, None), before.pop(part, None)
        assert after == before and not (tmp_path / "run").exists()


def test_a_replay_with_nothing_to_send_changes_nothing(make, tmp_path):
    run = opened(make(tmp_path / "run"))
    outbox.finish(run)
    before = client(run.uri).get_run(run.id).info
    outbox.settle(run, status="FINISHED")  # as `track replay` calls it
    after = client(run.uri).get_run(run.id).info
    assert (before.status, before.end_time) == ("FINISHED", after.end_time) and after.status == "FINISHED"


def test_an_end_that_is_sent_later_keeps_its_time(make, tmp_path):
    config = make(tmp_path / "run")
    run = opened(config)
    outbox._defer(run.paths, status="FAILED")
    pending = outbox.Pending.read(run.paths)
    pending.ended_ms = client(run.uri).get_run(run.id).info.start_time + 1  # an end is never before the start
    pending.write(run.paths)
    outbox.set_tags(run, {"any": "tag"})
    assert client(run.uri).get_run(run.id).info.end_time == pending.ended_ms


@pytest.mark.parametrize(("before", "meanwhile"), [("30", "600"), ("900", "900"), (None, "600")])
def test_the_users_timeout_is_restored(monkeypatch, before, meanwhile):
    import_mlflow()
    monkeypatch.delenv(TIMEOUT, raising=False)
    if before is not None:
        monkeypatch.setenv(TIMEOUT, before)
    with patience():
        with patience():
            assert os.environ[TIMEOUT] == meanwhile
        assert os.environ[TIMEOUT] == meanwhile
    assert os.environ.get(TIMEOUT) == before


KILLED_IN_A_TRANSACTION = """
import os, signal, sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA cache_size = 1")  # so that pages are written before the commit
database.execute("BEGIN")
database.execute("CREATE TABLE half_written (text)")
database.executemany("INSERT INTO half_written VALUES (?)", [("x" * 5000,)] * 200)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("is_shared", [False, True])
def test_what_a_killed_process_left_half_written_is_rolled_back(make, make_shared, tmp_path, is_shared):
    config = (make_shared if is_shared else make)(tmp_path / "run")
    run = opened(config)
    file = file_of(tracking_uri(config))
    subprocess.run([sys.executable, "-c", KILLED_IN_A_TRANSACTION, str(file)])
    journal = file.with_name(f"{file.name}-{'wal' if is_shared else 'journal'}")
    assert journal.stat().st_size > 512  # hot: whoever opens the database next has to roll it back
    assert opened(config).id == run.id
    merge_log(file)
    assert not journal.exists() or journal.stat().st_size == 0
    with contextlib.closing(sqlite3.connect(file)) as database:
        assert not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'half_written'").fetchall()


@pytest.mark.slow
def test_the_file_of_a_shared_store_alone_is_a_copy_of_it(make_shared, tmp_path):
    """Once the processes that used it have ended: what is in the log, they write into the file."""
    make_shared(tmp_path / "run")
    script = "import sys; from pipeline.tracking.client import client; client(sys.argv[1]).create_experiment('late')"
    subprocess.run([sys.executable, "-c", script, uri_of(tmp_path / "mlflow.db")], check=True)
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "copy.db")
    assert client(uri_of(tmp_path / "copy.db")).get_experiment_by_name("late") is not None


def test_the_log_of_a_store_that_is_gone_is_not_given_to_a_new_one(tmp_path):
    (tmp_path / "mlflow.db-wal").write_bytes(b"frames")
    with pytest.raises(UserError, match="mlflow.db-wal: the end of a database that is gone; put mlflow.db back"):
        make_store(tmp_path / "mlflow.db")
    assert os.listdir(tmp_path) == ["mlflow.db-wal"]


READ_ONLY = """
import json, sys
from pipeline.tracking.query import list_runs, read_run
[row] = list_runs(sys.argv[1], None)
print(row["id"], read_run(sys.argv[1], row["id"])[0]["name"])
"""


@pytest.mark.slow
def test_a_shared_store_that_cannot_be_written_is_read(make_shared, tmp_path):
    """Also one that was moved; with nothing left beside it."""
    if subprocess.run(["unshare", "-U", "--map-user=54321", "true"], capture_output=True).returncode:
        pytest.skip("unshare -U is not possible here")
    run = opened(make_shared(tmp_path / "runs" / "a"))
    merge_log(tmp_path / "runs" / "mlflow.db")
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "runs" / "mlflow.db", tmp_path / "moved")
    (tmp_path / "moved").chmod(0o555)
    command = [
        "unshare",
        "-U",
        "--map-user=54321",
        sys.executable,
        "-c",
        READ_ONLY,
        uri_of(tmp_path / "moved/mlflow.db"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == [run.id, "t"], done.stderr
    assert os.listdir(tmp_path / "moved") == ["mlflow.db"]
