"""How we talk to MLflow: a client that fails fast, and what its failures mean.

Oddities explained once (MLflow 3.17, measured): with a dead server one call with default settings blocks for minutes, so
there are no retries and a timeout of 3 seconds; artifacts get `patience`. The timeout is an environment variable that MLflow
reads at each request, and threads share it: `patience` counts who needs it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig

TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
SHORT_S, PATIENT_S = "3", "600"
TRANSIENT = (
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "REQUEST_LIMIT_EXCEEDED",
)
_lock, _patient = threading.Lock(), 0


def tracking_uri(config: RunConfig) -> str:
    """The configured server, or a SQLite file in the run directory."""
    return config.tracking.uri or f"sqlite:///{RunPaths(config.run_dir).root / 'mlflow.db'}"


def import_mlflow() -> Any:
    """The module, silent and without telemetry. The import takes seconds, so it is nowhere at the top of a file."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault(TIMEOUT, SHORT_S)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    import mlflow

    return mlflow


def client(uri: str) -> Any:
    """An MLflow client that fails fast."""
    mlflow = import_mlflow()
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def is_unreachable(uri: str, error: Exception) -> bool:
    """Whether a call failed because MLflow is unreachable or overloaded, so that it may work later.

    What the server refuses (a run that is not there, credentials) is a mistake, and so is every failure of a SQLite file.
    """
    if uri.startswith("sqlite:"):
        return False
    code = getattr(error, "error_code", None)
    if type(error).__name__ == "InvalidUrlException":
        return False
    return (
        code in TRANSIENT if code is not None else isinstance(error, OSError) or "sqlalchemy" in type(error).__module__
    )


def fix_for(uri: str) -> str:
    """What to do about a store that is unreachable."""
    if uri.startswith("sqlite:///"):
        return (
            f"restore {uri.removeprefix('sqlite:///')}, or remove it and run.json beside it to begin a new MLflow run"
        )
    return "start the server, or set tracking.uri=null"


def latest_points(run: Any) -> dict[str, tuple[int, float]]:
    """`metric -> (last step, its value)` of an MLflow run."""
    return {point.key: (int(point.step), float(point.value)) for point in run.data.to_proto().metrics}


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Artifacts may take long: the short timeout is for metrics."""
    global _patient
    with _lock:
        _patient += 1
        os.environ[TIMEOUT] = PATIENT_S
    try:
        yield
    finally:
        with _lock:
            _patient -= 1
            if not _patient:
                os.environ[TIMEOUT] = SHORT_S
