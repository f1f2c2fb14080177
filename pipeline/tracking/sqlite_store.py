"""A SQLite file as MLflow's store: its name as a URI, whether it can be opened, and where its artifacts lie.

MLflow records artifacts by their absolute path, so a store that was copied or moved still names the old place. `keep_home` sets
that right: such artifacts lie in `mlartifacts/` beside the database, wherever that is now. Otherwise whoever works on a copy
would write into the original.

A store that several runs share is in WAL mode, so that those who read (`pldr runs`, MLflow's page) and the one who writes do
not wait for each other. The mode is in the file. Processes share memory for it, so that a store on a network file system, or
of one run, whose ranks may be on other machines, does without.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.errors import UserError, first_line
from pipeline.io.mounts import network_file_system, writable
from pipeline.tracking.sqlite_guard import keep_log

OWN = "mlflow.db"  # of a run directory, or beside several
RUN_FILE = "run.json"  # of a run directory: its MLflow run
ARTIFACTS = "mlartifacts"  # beside the database
WAIT_S = 5.0  # for a locked database, as long as SQLAlchemy waits
MERGE_S = 1.0  # for others who read at this moment
_SQLITE = re.compile(r"sqlite(?:\+\w+)?:///([^?]+)")
_PATHS = (  # what holds paths of artifacts in MLflow's schema (3.17)
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)


def uri_of(file: Path) -> str:
    """The URI of a database. In it `?` begins options and `%20` is decoded, so both characters are quoted."""
    return "sqlite:///" + str(file).replace("%", "%25").replace("?", "%3F")


def file_of(uri: str) -> Path | None:
    """The database of a URI; None for a server's, and for one in memory."""
    match = _SQLITE.match(uri)
    if match is None or match[1] == ":memory:":
        return None
    return Path(unquote(match[1])).absolute()


def artifacts_beside(file: Path) -> str:
    """Where the artifacts of a database lie, as MLflow takes it."""
    return (file.parent / ARTIFACTS).as_uri()


def same_store(one: str, other: str) -> bool:
    """Whether two URIs name the same store. A file is the same by whichever path it is reached."""
    a, b = file_of(one), file_of(other)
    if a is None or b is None:
        return one == other
    return a == b or _same_file(a, b)


def _same_file(a: Path, b: Path) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


@contextlib.contextmanager
def _opened(file: Path, *, wait_s: float | None = None) -> Iterator[sqlite3.Connection]:
    """An existing database. Not `mode=ro`: what a killed process left half-written must be rolled back first. In a folder
    where nothing can be written, and so by nobody else, it is read as it is."""
    mode = "mode=rw" if writable(file.parent) else "immutable=1"
    timeout = WAIT_S if wait_s is None else wait_s
    with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?{mode}", uri=True, timeout=timeout)) as database:
        if database.execute("PRAGMA journal_mode").fetchone() == ("wal",):
            keep_log(file)
        yield database


def require_usable(file: Path) -> None:
    """Raise sqlite3.Error at once for a database that is locked, damaged or may not be read: MLflow tries for minutes."""
    if file.exists():
        with _opened(file) as database:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if writable(file) and writable(file.parent):  # in WAL mode, reading does not show that another one writes
                database.execute("BEGIN IMMEDIATE")
                database.rollback()


def make_store(file: Path) -> None:
    """Make an empty store, unless there is a file: complete or not at all. MLflow's own way fails where several processes
    begin with one new file, and leaves half of the tables where one is killed."""
    log = file.with_name(f"{file.name}-wal")
    if (
        log.exists() and log.stat().st_size and not file.exists()
    ):  # in this order: who makes the file, makes its log later
        raise UserError(f"{log}: the end of a database that is gone; put {file.name} back, or move this file away")
    if file.exists():
        return
    import sqlalchemy
    from mlflow.store.db.utils import _initialize_tables

    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    engine = sqlalchemy.create_engine(uri_of(temporary))
    try:
        _initialize_tables(engine)
        engine.dispose()
        if not _is_of_one_run(file) and network_file_system(file) is None:
            with contextlib.closing(sqlite3.connect(temporary)) as database:
                database.execute("PRAGMA journal_mode = WAL")
        _name_unless_taken(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def merge_log(file: Path) -> None:
    """Write the log of a store into its file, as far as nobody else is at work there: somebody may copy only that. The log
    stays, empty."""
    with contextlib.suppress(sqlite3.Error), _opened(file, wait_s=MERGE_S) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _name_unless_taken(temporary: Path, file: Path) -> None:
    """Give a finished file its name, unless another process was faster."""
    try:
        os.link(temporary, file)
    except FileExistsError:
        return
    except OSError:  # a file system without links
        if not file.exists():
            os.replace(temporary, file)


def holds_run(uri: str, run_id: str) -> bool:
    """Whether a SQLite store has a run. False also where that cannot be found out."""
    file = file_of(uri)
    if file is None or not file.exists():
        return False
    try:
        with _opened(file) as database:
            return database.execute("SELECT 1 FROM runs WHERE run_uuid = ?", (run_id,)).fetchone() is not None
    except sqlite3.Error:
        return False


def keep_home(uri: str) -> None:
    """Where the store was copied or moved, set its paths to the artifacts beside it.

    Raises UserError when that cannot be written: nothing may then go on, because it would write into the original.
    """
    file = file_of(uri)
    if file is None or not file.exists():
        return
    try:
        with _opened(file) as database:
            moved = [home for home in _homes(database) if _is_elsewhere(home, file)]
    except sqlite3.Error:  # told by whoever opens it next
        return
    if not moved:
        return
    try:
        with _opened(file) as database, database:
            for home in moved:
                _move(database, home, artifacts_beside(file))
        if (mlflow := sys.modules.get("mlflow.tracking._tracking_service.utils")) is not None:
            mlflow._artifact_repos_cache.clear()  # by run id, with the old paths
    except sqlite3.Error as error:
        raise UserError(
            f"{file}: was copied or moved, and its paths to artifacts must be set right first ({first_line(error)}); make "
            "the file and its folder writable, or wait for the program that holds it"
        ) from error


def _homes(database: sqlite3.Connection) -> list[str]:
    """The folders of artifacts as we name them: `…/mlartifacts`. Other locations are somebody's decision and stay."""
    if not _has(database, "experiments", "artifact_location"):
        return []
    rows = database.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
    return [home for (home,) in rows if home and home.startswith("file://") and home.endswith(f"/{ARTIFACTS}")]


def _is_elsewhere(home: str, file: Path) -> bool:
    """Whether artifacts that should lie beside a database lie in another place.

    A database that is no run directory's own may keep them where it was told to, as long as that place is there and there are
    none beside it.
    """
    there, here = Path(unquote(urlsplit(home).path)), file.parent / ARTIFACTS
    if _same_file(there.parent, here.parent):
        return False
    return _is_of_one_run(file) or here.is_dir() or not there.exists()


def _is_of_one_run(file: Path) -> bool:
    """Whether it is the store in a run directory."""
    return file.name == OWN and (file.parent / RUN_FILE).exists()


def _has(database: sqlite3.Connection, table: str, column: str) -> bool:
    return column in {row[1] for row in database.execute(f"PRAGMA table_info({table})")}


def _move(database: sqlite3.Connection, old: str, new: str) -> None:
    """Replace the beginning of every path below a folder."""
    for table, column in _PATHS:
        if _has(database, table, column):
            database.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                (new, len(old) + 1, old, len(old) + 1, old + "/"),
            )
