"""How we talk to MLflow: a client that fails fast, and what its failures mean.

Oddities explained once (MLflow 3.17, measured): with a dead server one call with default settings blocks for minutes, so
there are no retries and a timeout of 3 seconds; artifacts get `patience`. The timeout is an environment variable that MLflow
reads at each request, and threads share it: `patience` counts who needs it.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig, TrackingConfig
from pipeline.errors import ConfigError, UserError, first_line
from pipeline.tracking.default_store import VARIABLE, default_uri, report_inside, why_inside
from pipeline.tracking.sqlite_check import SUSPECT, is_damaged
from pipeline.tracking.sqlite_store import file_of, make_store, merge_log, require_usable, uri_of

TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
SHORT_S, PATIENT_S = "3", "600"
OURS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    TIMEOUT: SHORT_S,
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
TRANSIENT = (
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "REQUEST_LIMIT_EXCEEDED",
)
LOCKED = ("database is locked", "table is locked")
CONTENDED = (*LOCKED, "unique", "duplicate", "giving up after")  # another process was faster
OLDER_SERVER = ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED")  # a call that a server of another version has not got
ATTEMPTS, WAIT_S = 8, 0.1  # the first wait; it doubles
OTHER_VERSION = ("out-of-date", "can't locate revision", "no such column", "no such table")
Result = TypeVar("Result")
_used: set[Path] = set()  # stores of this process
_lock, _patient = threading.Lock(), 0
_before: str | None = None  # TIMEOUT before the first of those who are patient


def tracking_uri(config: RunConfig) -> str:
    """The store of a run: `tracking.uri`, else MLFLOW_TRACKING_URI, else what default_store.py decides. Of a SQLite file the
    path is absolute. Raises ConfigError for a variable that is no URI of ours."""
    uri = config.tracking.uri or variable()
    if uri is None:
        return default_uri(RunPaths(config.run_dir).root)
    file = file_of(uri)
    return uri if file is None or "?" in uri else uri_of(file)


def is_named(config: RunConfig) -> bool:
    """Whether the user names the store."""
    return config.tracking.uri is not None or variable() is not None


def report_store(config: RunConfig, paths: RunPaths) -> None:
    """A warning where a new run's store lies in its run directory because it cannot lie beside it."""
    if not is_named(config) and (reason := why_inside(paths.root)):
        report_inside(paths.root, reason)


def variable() -> str | None:
    """MLFLOW_TRACKING_URI, checked as `tracking.uri` is; None where it is not set."""
    uri = os.environ.get(VARIABLE) or None
    try:
        return TrackingConfig(uri=uri).uri
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{VARIABLE}: {reason}; or unset it") from None


def import_mlflow() -> Any:
    """The module, silent and without telemetry. The import takes seconds, so it is nowhere at the top of a file."""
    for name, value in OURS.items():
        if not os.environ.get(name):  # what the user has set holds
            os.environ[name] = value
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    import mlflow

    return mlflow


def client(uri: str) -> Any:
    """An MLflow client that fails fast. Raises sqlite3.Error at once for a SQLite file that cannot be used."""
    mlflow, file = import_mlflow(), file_of(uri)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        make_store(file)
        require_usable(file)
        if file not in _used:
            _used.add(file)
            atexit.register(merge_log, file)
        if "%" in uri:  # MLflow would also make a folder of the quoted name
            from mlflow.store.db import utils

            utils._make_parent_dirs_if_sqlite = lambda db_uri: None
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def is_unreachable(uri: str, error: Exception) -> bool:
    """Whether a call failed because MLflow is unreachable, overloaded or locked, so that it may work later.

    What the server refuses (a run that is not there, credentials) is a mistake, and so is any other failure of a SQLite file;
    but one that is called damaged and is not may work in the next process.
    """
    if isinstance(error, UserError):
        return False
    if uri.startswith("sqlite"):
        file = file_of(uri)
        return _says(error, *LOCKED) or (_says(error, *SUSPECT) and file is not None and not is_damaged(file))
    code = getattr(error, "error_code", None)
    if type(error).__name__ == "InvalidUrlException":
        return False
    return (
        code in TRANSIENT if code is not None else isinstance(error, OSError) or "sqlalchemy" in type(error).__module__
    )


def contended(action: Callable[[], Result]) -> Result:
    """The result of changing something that several jobs share, such as an alias. MLflow checks first and writes afterwards,
    so of several jobs at once all but one are refused; those are retried."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return action()
        except Exception as error:
            if not _says(error, *CONTENDED):
                raise
        time.sleep(WAIT_S * 2**attempt * random.uniform(0.5, 1))
    return action()


def fix_for(uri: str, error: Exception) -> str:
    """What to do about a store that failed, by what is wrong with it. A store may hold other people's runs, so no fix here
    loses any."""
    file = file_of(uri)
    if file is None:
        if is_unreachable(uri, error):
            return "start the server, or log elsewhere: tracking.uri, MLFLOW_TRACKING_URI"
        return "look at tracking.uri, and at the user's rights there"
    if _says(error, *LOCKED):
        return f"another program holds {file}: wait until it is done (`fuser {file}` names it), then start again"
    if _says(error, *SUSPECT) and not is_damaged(file):
        return (
            f"{file} is intact (integrity_check): a log that was replaced under an open connection, or a disk that failed for "
            f"a moment; end the programs that have the file open (`fuser {file}` names them), then start again"
        )
    if _says(error, *SUSPECT):
        return (
            f"{file} is damaged, or no database; it may hold other runs too, so keep it, and {file.name}-wal: put in their "
            f"place a backup, or what `sqlite3 {file} .recover | sqlite3 NEW.db` saves. {from_checkpoints('RUN_DIR')}"
        )
    if _says(error, *OTHER_VERSION):
        return f"copy {file} as a backup, then `mlflow db upgrade {uri}`, or use the version of MLflow that made it"
    if _says(error, "is full"):
        return f"free some space on the disk of {file}, then start again"
    if _says(error, "unable to open", "readonly", "permission"):
        return f"make {file} and its folder readable and writable for this user"
    return f"look at {file} and tracking.uri"


def from_checkpoints(run_dir: object) -> str:
    """How to go on where MLflow has lost the run."""
    return f"A new run can begin with the checkpoints of this one: `pldr train CONFIG run_dir=NEW --resume {run_dir}`"


def why(uri: str, error: Exception) -> str:
    """What failed, and what to do: for one line."""
    return f"{first_line(error)}; {fix_for(uri, error)}"


def _says(error: Exception, *words: str) -> bool:
    text = str(error).lower()
    return any(word in text for word in words)


def latest_points(run: Any) -> dict[str, tuple[int, float]]:
    """`metric -> (last step, its value)` of an MLflow run."""
    return {point.key: (int(point.step), float(point.value)) for point in run.data.to_proto().metrics}


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Artifacts may take long: the short timeout is for metrics. Afterwards the timeout is what it was before."""
    global _patient, _before
    with _lock:
        if not _patient:
            _before = os.environ.get(TIMEOUT)
            os.environ[TIMEOUT] = _longer(_before)
        _patient += 1
    try:
        yield
    finally:
        with _lock:
            _patient -= 1
            if not _patient and _before is None:
                os.environ.pop(TIMEOUT, None)
            elif not _patient:
                os.environ[TIMEOUT] = str(_before)


def _longer(timeout: str | None) -> str:
    """A timeout that is long enough for artifacts: the user's, where that is longer or no number."""
    try:
        return PATIENT_S if not timeout or 0 < float(timeout) < float(PATIENT_S) else timeout
    except ValueError:
        return timeout or PATIENT_S
