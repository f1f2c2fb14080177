"""A store that others have open: its log stays, and an error of one connection does not make it damaged. Real processes."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys

import pytest

from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths
from pipeline.tracking import outbox
from pipeline.tracking.client import fix_for
from pipeline.tracking.query import _copied
from pipeline.tracking.run import open_run
from pipeline.tracking.sqlite_check import is_damaged
from pipeline.tracking.sqlite_store import holds_run, merge_log, uri_of

NOTEBOOK = """
import shutil, sqlite3, sys
file = sys.argv[1]
database = sqlite3.connect(file, isolation_level=None)
database.execute("CREATE TABLE notes (text)")
for part in ("", "-wal", "-shm"):  # a backup; whoever closes a file loses SQLite's locks on it
    shutil.copy(file + part, file + part + ".backup")
print("open", flush=True)
sys.stdin.readline()
database.execute("INSERT INTO notes VALUES ('kept')")
print(database.execute("PRAGMA integrity_check").fetchone()[0], flush=True)
sys.stdin.readline()
"""
ANOTHER = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("CREATE TABLE others (text)")
database.close()
"""


@pytest.fixture
def store(tmp_path, empty_shared_store):
    return shutil.copy(empty_shared_store, tmp_path / "mlflow.db")


def log_of(store):
    return [os.stat(f"{store}{part}").st_ino for part in ("-wal", "-shm")]


def write(store, statement):
    """As MLflow does, but for what our client does first."""
    with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as database:
        return database.execute(statement).fetchall()


def test_our_processes_do_not_remove_a_log_that_somebody_has_open(store):
    notebook = subprocess.Popen(
        [sys.executable, "-c", NOTEBOOK, str(store)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert notebook.stdout.readline() == "open\n"
        before = log_of(store)
        assert not holds_run(uri_of(store), "any")
        write(store, "CREATE TABLE ours (text)")
        merge_log(store)
        assert log_of(store) == before
        notebook.stdin.write("\n")
        notebook.stdin.flush()
        assert notebook.stdout.readline() == "ok\n"
        assert write(store, "SELECT text FROM notes") == [("kept",)]
    finally:
        notebook.communicate("\n")


def test_nobody_removes_a_log_that_our_process_has_open(store):
    assert not holds_run(uri_of(store), "any")
    with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as database:
        database.execute("CREATE TABLE ours (text)")
        before = log_of(store)
        for part in ("", "-wal", "-shm"):
            shutil.copy(f"{store}{part}", f"{store}{part}.backup")
        subprocess.run([sys.executable, "-c", ANOTHER, str(store)], check=True)
        assert log_of(store) == before
        assert database.execute("SELECT count(*) FROM others").fetchall() == [(0,)]
        assert write(store, "INSERT INTO ours VALUES (1)") == []


def test_a_store_of_one_run_is_not_kept_from_its_writers(empty_store, tmp_path):
    """It has no log, and readers and writers exclude one another."""
    file = shutil.copy(empty_store, tmp_path)
    assert not holds_run(uri_of(file), "any")
    subprocess.run([sys.executable, "-c", ANOTHER, str(file)], check=True)


@pytest.fixture
def broken_connection(store):
    """A connection of this process under which the log was replaced: no lock of ours guards it."""
    with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as database:
        database.execute("CREATE TABLE ours (text)")
        for part in ("", "-wal", "-shm"):
            shutil.copy(f"{store}{part}", f"{store}{part}.backup")
        subprocess.run([sys.executable, "-c", ANOTHER, str(store)], check=True)
        database.execute("CREATE TABLE lost (text)")  # in the log without a name
        yield database


def test_an_intact_store_is_not_called_damaged(store, broken_connection):
    with pytest.raises(sqlite3.OperationalError, match="disk I/O error") as caught:
        write(store, "SELECT count(*) FROM sqlite_master")
    text = fix_for(uri_of(store), caught.value)
    assert f"{store} is intact (integrity_check)" in text and "fuser" in text and "recover" not in text


def test_a_run_in_an_intact_store_continues_and_sends_later(broken_connection, tmp_path, caplog):
    config = parse_config(
        {
            "name": "t",
            "run_dir": str(tmp_path / "run"),
            "data": {"sources": [{"url": "x.txt"}]},
            "model": {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8},
        },
        where="test",
    )
    run = open_run(config, RunPaths(config.run_dir))
    assert run.id.startswith("local-") and "is unreachable (disk I/O error); training continues" in caplog.text
    tracker = outbox.open_tracker(run)
    tracker.log(1, {"train/loss": 1.0})
    assert not tracker.close(wait_s=2)
    broken_connection.close()
    assert outbox.replay(config, run.paths)["points_sent"] == 1


def test_a_damaged_store_is_called_so(store, tmp_path):
    assert not is_damaged(store) and not is_damaged(tmp_path / "missing.db")
    with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        assert not is_damaged(store)
    data = bytearray(store.read_bytes())
    data[8192:12288] = b"x" * 4096  # a page
    store.write_bytes(data)
    assert is_damaged(store)
    error = sqlite3.DatabaseError("database disk image is malformed")
    assert "is damaged, or no database" in fix_for(uri_of(store), error)


WRITER = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("CREATE TABLE big (text)")
print("open", flush=True)
while True:
    database.execute("BEGIN")
    database.executemany("INSERT INTO big VALUES (?)", [("x" * 3000,)] * 300)
    database.execute("DELETE FROM big WHERE rowid % 20")
    database.execute("COMMIT")
"""


@pytest.mark.slow
def test_a_copy_of_a_store_at_work_is_intact(store):
    """`pldr runs` makes one where the folder cannot be written. Of copied files one in about thirty was damaged."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(store)], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "open\n"
        for _ in range(30):
            copy = _copied(store)
            assert not is_damaged(copy)
            copy.unlink()
    finally:
        writer.kill()
        writer.communicate()
