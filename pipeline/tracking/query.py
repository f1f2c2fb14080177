"""The runs of an experiment as MLflow has them: what `pldr runs` shows."""

from __future__ import annotations

import atexit
import logging
import shutil
import sqlite3
import tempfile
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, UserError, first_line
from pipeline.io.mounts import writable
from pipeline.tracking.client import client, latest_points, why
from pipeline.tracking.publish import CHECKPOINTS_TAG
from pipeline.tracking.run_record import CONTINUED_TAG, LOCAL_TAG, PUBLISH_TAG, VERDICT_TAG
from pipeline.tracking.sqlite_store import file_of, keep_home, uri_of
from pipeline.tracking.stores import MlflowStore, names_in

log = logging.getLogger(__name__)
COLUMNS = {  # metric -> key of a row
    "train/loss": "loss",
    "val/loss_cached": "val_loss_cached",
    "invariance/order_parameter_G": "order_parameter",
    "invariance/budget": "budget",
}


def list_all_runs(uris: list[str], experiment: str | None) -> list[dict[str, Any]]:
    """`list_runs` of several stores, newest first. One that fails is a warning, and an error only where all do."""
    rows: list[dict[str, Any]] = []
    failures: list[UserError] = []
    for uri in uris:
        try:
            rows += list_runs(uri, experiment)
        except UserError as error:
            failures.append(error)
    if len(failures) == len(uris):
        raise failures[0]
    for failure in failures:
        log.warning("%s", failure)
    return sorted(rows, key=lambda row: str(row["started"]), reverse=True)


def list_runs(uri: str, experiment: str | None) -> list[dict[str, Any]]:
    """One row per training run of an experiment (None: of all), newest first.

    Keys: uri, id, name, experiment, status, started, step, loss, val_loss_cached, order_parameter, budget, checkpoints (names),
    published_to, continued_from, verdict; None where a run has none. Raises ConfigError for an experiment that does not exist,
    UserError when MLflow is unreachable.
    """
    try:
        mlflow = _open(uri)
        found = mlflow.search_experiments()
        names = {e.experiment_id: e.name for e in found if experiment in (None, e.name)}
        if experiment is not None and not names:
            known = ", ".join(sorted(e.name for e in found))
            raise ConfigError(f"experiment {experiment}: not at {uri}; there are: {known}")
        verdicts = _verdicts(mlflow)
        return [
            _row(uri, run, names, verdicts) for run in _runs(mlflow, list(names)) if "train.steps" in run.data.params
        ]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"MLflow at {uri}: {why(uri, error)}") from error


def read_run(uri: str, run_id: str) -> tuple[dict[str, Any], Any, dict[str, list[tuple[int, float]]]]:
    """A run's row, as `list_runs` has it, MLflow's own data of it (params, tags), and each metric's (step, value) by step.

    Raises UserError when MLflow is unreachable or has no such run.
    """
    try:
        mlflow = _open(uri)
        run = mlflow.get_run(run_id)
        experiment = mlflow.get_experiment(run.info.experiment_id)
        row = _row(uri, run, {run.info.experiment_id: experiment.name}, _verdicts(mlflow))
        histories = {
            metric: sorted(
                ((point.step, point.value) for point in mlflow.get_metric_history(run_id, metric)),
                key=lambda point: point[0],  # MLflow's order is that of the clock, which may have been set back
            )
            for metric in run.data.metrics
        }
        return row, run.data, histories
    except UserError:
        raise
    except Exception as error:
        if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
            raise UserError(f"MLflow at {uri}: {first_line(error)}; look at the id (`pldr runs` lists them)") from error
        raise UserError(f"MLflow at {uri}: {why(uri, error)}") from error


def _open(uri: str) -> Any:
    """A client for reading: it makes no store. Raises UserError where there is none."""
    file = file_of(uri)
    if file is None:
        return client(uri)
    if not file.exists():
        raise UserError(f"{file}: no such file; nothing was logged there, or it was moved: name the store with --uri")
    if not writable(file.parent):  # where SQLite cannot make the files that reading needs
        return client(uri_of(_copied(file)))
    keep_home(uri)
    return client(uri)


def _copied(file: Path) -> Path:
    """A store in a temporary folder, which is removed with this process. While others write it, only SQLite's own copy is of
    one moment; where SQLite cannot read it there, nobody has it open, and its files are copied."""
    folder = tempfile.TemporaryDirectory(prefix="pldr-store-")
    atexit.register(folder.cleanup)
    copy = Path(folder.name) / file.name
    try:
        with (
            closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
    except sqlite3.Error:
        for part in file.parent.glob(f"{file.name}*"):
            shutil.copy(part, folder.name)
    return copy


def _runs(mlflow: Any, experiments: list[str]) -> list[Any]:
    runs: list[Any] = []
    token = None
    while experiments:
        page = mlflow.search_runs(experiments, order_by=["attributes.start_time DESC"], page_token=token)
        runs += page
        token = page.token
        if not token:
            break
    return runs


def _verdicts(mlflow: Any) -> dict[str, str]:
    """Run id -> verdict of its newest registered bundle: older runs have no tag for it."""
    versions = sorted(mlflow.search_model_versions(), key=lambda v: (v.name, int(v.version)))
    return {v.run_id: v.tags["verdict"] for v in versions if v.run_id and "verdict" in v.tags}


def _row(uri: str, run: Any, experiments: dict[str, str], verdicts: dict[str, str]) -> dict[str, Any]:
    info, tags, points = run.info, run.data.tags, latest_points(run)
    checkpoints = tags.get(CHECKPOINTS_TAG)
    if checkpoints is None and LOCAL_TAG not in tags:  # begun before runs had this tag
        checkpoints = ",".join(reversed(names_in(MlflowStore(uri, info.run_id))))
    return {
        "uri": uri,
        "id": info.run_id,
        "name": info.run_name,
        "experiment": experiments[info.experiment_id],
        "status": info.status,
        "started": datetime.fromtimestamp(info.start_time / 1000, UTC).isoformat(timespec="milliseconds"),
        "step": max((step for step, _ in points.values()), default=None),
        **{key: points[metric][1] if metric in points else None for metric, key in COLUMNS.items()},
        "checkpoints": [name for name in (checkpoints or "").split(",") if name],
        "published_to": tags.get(PUBLISH_TAG) or None,
        "continued_from": tags.get(CONTINUED_TAG),
        "verdict": (tags[VERDICT_TAG] or None) if VERDICT_TAG in tags else verdicts.get(info.run_id),
    }
