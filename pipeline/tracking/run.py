"""A training run in MLflow: begun, marked, ended, and caught up with after an outage. One run per job.

MLflow may be away at any time. A new run then gets a local name and is made in MLflow later (run_record.py); metrics wait
in a spool (metrics_spool.py), checkpoints in the run directory (publish.py), and what a run should be told at its end
waits in `logs/owed.json`. `settle` pays all of it: at the end of every training, and as `pldr track replay`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.checkpoint.format import committed
from pipeline.config.keys import on_resume
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, UserError, first_line
from pipeline.io.urls import without_secrets
from pipeline.tracking.client import client, is_away, mend_for, patience, tracking_uri
from pipeline.tracking.run_record import (
    LOCAL_PREFIX,
    LOCAL_TAG,
    RUN_DIR_TAG,
    RUN_FILE,
    RunRecord,
    create,
    experiment,
    new_record,
    record_of,
    remember,
    remembered,
    run_of_checkpoints,
    written,
)

log = logging.getLogger(__name__)


def open_run(config: RunConfig, *, run_id: str | None = None, force: bool = False) -> str:
    """The id of the run to log to: `run_id` when given, the run directory's own, or a new one. Nothing of a run that exists is
    changed: `begin` does that.

    With the server away a run that the directory knows goes on, and a new one gets a local id until the server is back. Raises
    ConfigError when that run was made by another configuration (naming the first differing key; one that `needs force`
    passes with `force`) or at another server, UserError when MLflow refuses or would have to be asked.
    """
    uri = tracking_uri(config)
    record = remembered(config)
    unknown = run_id is not None and (record is None or not record.answers_to(run_id))
    if run_id is not None and unknown:
        record = _named(config, run_id)
    if record is None:
        _require_no_other(config)
        record = new_record(config)
    if record.run_id is None:
        remember(config, record)  # first: whatever is killed from here on, the run is made only once
    _compare(record.params, record.id, config, force)
    try:
        mlflow = client(uri)
        record = create(config, record)
        assert record.run_id is not None
        tags = _check_same(mlflow, record.run_id, config, force)
        record = replace(record, local_id=tags.get(LOCAL_TAG, record.local_id))
    except UserError:
        raise
    except Exception as error:
        if not is_away(uri, error):
            raise UserError(f"MLflow at {uri}: {first_line(error)}; {mend_for(uri)}") from error
        if unknown:
            raise UserError(
                f"MLflow at {uri} does not answer ({first_line(error)}), and only it knows run {run_id}: {mend_for(uri)}"
            ) from error
        log.warning(
            "MLflow at %s does not answer (%s); training goes on as %s, and what it logs is sent when the server is back",
            uri,
            first_line(error),
            record.id,
        )
    remember(config, record)
    return record.id


def _named(config: RunConfig, run_id: str) -> RunRecord:
    """The record of a run that is named and is not this directory's at this server."""
    known = written(config)
    if known is not None and known.answers_to(run_id):  # the server has moved, or the run to another one
        return replace(known, tracking_uri=tracking_uri(config))
    if run_id.startswith(LOCAL_PREFIX):
        raise ConfigError(
            f"--resume {run_id}: only the run directory where it began knows this name; give MLflow's id (the run has the tag "
            f"{LOCAL_TAG}), or the path of a checkpoint"
        )
    return RunRecord(tracking_uri(config), run_id)


def _require_no_other(config: RunConfig) -> None:
    """A new run must not take the place of one that the directory belongs to."""
    paths, uri, known = RunPaths(config.run_dir), tracking_uri(config), written(config)
    if known is not None:
        raise ConfigError(
            f"tracking.uri={without_secrets(uri)}: {paths.root / RUN_FILE} names MLflow run {known.id} at "
            f"{without_secrets(known.tracking_uri)}; set that URI, or, if the run is now at the new one, --resume {known.id}, "
            "or use another run_dir"
        )
    owner = run_of_checkpoints(config)
    if owner is not None:
        raise ConfigError(
            f"{committed(paths.checkpoints)[-1]}: belongs to MLflow run {owner}, and {RUN_FILE} is missing; use another "
            f"run_dir, or go on with --resume {owner}"
        )


def _check_same(mlflow: Any, run_id: str, config: RunConfig, force: bool) -> dict[str, str]:
    """The run's tags, when it was made by this configuration."""
    try:
        data = mlflow.get_run(run_id).data
    except Exception as error:
        if is_away(tracking_uri(config), error):
            raise
        record = RunPaths(config.run_dir).root / RUN_FILE
        raise ConfigError(
            f"MLflow run {run_id}: not found at {tracking_uri(config)}; give the id of a run there, or, if {record} names it, "
            "restore the store or remove that file to begin a new run"
        ) from error
    _compare(data.params, run_id, config, force)
    return dict(data.tags)


def _compare(params: dict[str, str], run_id: str, config: RunConfig, force: bool) -> None:
    for key, value in config.flat().items():
        rule = on_resume(key)
        if rule != "may change" and key in params and params[key] != value[:6000]:
            if force and rule == "needs force":
                log.warning("forced: MLflow run %s was made with %s=%s, now %s", run_id, key, params[key], value)
                continue
            raise ConfigError(
                f"MLflow run {run_id} was made with {key}={params[key]}, this configuration has {value}; "
                "use another run_dir for another run" + (", or --force" if rule == "needs force" else "")
            )


def same_run(config: RunConfig, one: str, other: str) -> bool:
    """Whether two ids name the same run: a checkpoint may hold the local one."""
    return record_of(config, other).answers_to(one)


def mlflow_id(config: RunConfig, run_id: str) -> str:
    """MLflow's id for an id that a checkpoint holds; the id itself while MLflow has not made the run."""
    return record_of(config, run_id).id


def log_report(config: RunConfig, report: Path) -> str | None:
    """Attach a data report to the run directory's run, or, before there is one, to a run of its own named `data-report`.

    The id of that run; None, with a warning, when MLflow does not answer: the report stays where it is.
    """
    uri = tracking_uri(config)
    try:
        mlflow = client(uri)
        record = remembered(config)
        # Not `create`: a training that goes on may be making its run at this moment.
        run_id = record.run_id if record is not None and record.run_id else _report_run(mlflow, config)
        with patience():
            mlflow.log_artifact(run_id, str(report), "data")
        return run_id
    except Exception as error:
        log.warning("MLflow did not take %s: %s", report, first_line(error))
        return None


def _report_run(mlflow: Any, config: RunConfig) -> str:
    """The run that this run directory's earlier reports went to, or a new one."""
    here = new_record(config)
    experiment_id, root = experiment(mlflow, here.experiment, here.artifact_location), here.tags[RUN_DIR_TAG]
    for run in mlflow.search_runs([experiment_id], "tags.`mlflow.runName` = 'data-report'"):
        if run.data.tags.get(RUN_DIR_TAG) == root:
            return str(run.info.run_id)
    run = mlflow.create_run(experiment_id, run_name="data-report", tags={RUN_DIR_TAG: root})
    mlflow.set_terminated(run.info.run_id)
    return str(run.info.run_id)
