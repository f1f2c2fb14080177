"""A training run in MLflow: `TrackedRun`, made once by a process and handed down, and how it is opened. One run per job.

MLflow may be unreachable at any time. A new run then gets a local name and is made in MLflow later (run_record.py); metrics
wait in a spool (metrics.py), checkpoints in the run directory (publish.py), and the run's files, tags and end wait in
`logs/pending.json` (outbox.py).
"""

from __future__ import annotations

import contextlib
import logging
import shlex
from dataclasses import replace
from typing import Any

from pipeline.checkpoint.format import committed
from pipeline.config.keys import added_defaults, on_resume_in
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig, flatten
from pipeline.errors import AnotherRunError, ConfigError, UserError, first_line
from pipeline.io.locks import locked
from pipeline.io.urls import without_secrets
from pipeline.tracking.client import (
    client,
    fix_for,
    from_checkpoints,
    is_named,
    is_unreachable,
    report_store,
    tracking_uri,
    why,
)
from pipeline.tracking.default_store import RUN_DIR_TAG, VARIABLE
from pipeline.tracking.run_record import (
    LOCAL_PREFIX,
    LOCAL_TAG,
    RunRecord,
    new_record,
    original_of,
    publish_url,
    read_any_record,
    read_record,
    run_of_checkpoints,
    write_record,
)
from pipeline.tracking.sqlite_store import RUN_FILE, file_of, keep_home

KIND_TAG, KIND = (
    "mlflow.experimentKind",
    "custom_model_development",
)  # MLflow's own, for its page of the experiment
MAKING = ".run.lock"  # in the run directory: held by whoever makes its run in MLflow
log = logging.getLogger(__name__)


class TrackedRun:
    """A run as this process knows it: its configuration, its directory, its record.

    Another process may make the run in MLflow meanwhile (rank 0 of a training does): `reload` picks that up.
    """

    def __init__(self, config: RunConfig, paths: RunPaths, record: RunRecord) -> None:
        self.config, self.paths, self.record = config, paths, record
        self.uri = tracking_uri(config)

    @property
    def id(self) -> str:
        """MLflow's id, or the local one while MLflow has not made the run."""
        return self.record.id

    @property
    def publish_url(self) -> str | None:
        """Where the run's checkpoints are published; None: among its MLflow artifacts."""
        return publish_url(self.config, self.record)

    def page(self, server: str) -> str:
        """The address of the experiment's training runs at an MLflow server; that of the run where the experiment is not known.

        MLflow's pages (3.17) open on those for LLM apps unless the address, or a switch that the browser keeps, says otherwise.
        """
        if self.record.experiment_id is None:
            return f"{server.rstrip('/')}/#/runs/{self.id}"
        return f"{server.rstrip('/')}/#/experiments/{self.record.experiment_id}?workflowType=machine_learning"

    def write(self) -> None:
        """Write run.json."""
        write_record(self.paths, self.record)

    def reload(self) -> None:
        """Read run.json again, as far as it is about this run."""
        record = read_record(self.config, self.paths)
        if record is not None and record.answers_to(self.id):
            self.record = record

    def require_store(self) -> None:
        """Set right where a store that was moved has its artifacts. Raises UserError where there is none, too."""
        keep_home(self.uri)
        self.require_store_exists()

    def require_store_exists(self) -> None:
        """Raise UserError where a SQLite store that has the run is gone: MLflow would make an empty one, in which there is no
        run."""
        file = file_of(self.uri)
        if self.record.run_id is not None and file is not None and not file.exists():
            raise UserError(
                f"{file}: no such file, and {self.paths.root / RUN_FILE} names MLflow run {self.id} in it; put the database "
                f"back, or set tracking.uri to where it is now. {from_checkpoints(self.paths.root)}"
            )

    def require_alive(self) -> None:
        """Raise ConfigError where the run, or its experiment, was deleted in MLflow (it keeps both until they are restored or
        purged), and what MLflow raises."""
        mlflow = client(self.uri)
        info = mlflow.get_run(self.id).info
        experiment = mlflow.get_experiment(info.experiment_id)
        _require_not_deleted(experiment, self.uri)
        if info.lifecycle_stage == "deleted":
            raise ConfigError(
                f"MLflow run {self.id} at {without_secrets(self.uri)} was deleted there; restore it with "
                f"`{_mlflow(self.uri)} runs restore --run-id {self.id}`, or use another run_dir for a new run"
            )

    def create(self) -> str:
        """MLflow's id of the run, which is made unless it was made before; run.json then has the id.

        Raises what MLflow raises, and may then be called again.
        """
        if self.record.run_id is None:
            with locked(self.paths.root / MAKING):
                self.reload()  # another process of this run directory may have made it
                if self.record.run_id is None:
                    return self._create()
        self.require_store()
        return self.id

    def _create(self) -> str:
        from mlflow.entities import Param

        record = self.record

        mlflow = client(self.uri)
        experiment_id = _experiment(mlflow, self.uri, record.experiment, record.artifact_location)
        found = mlflow.search_runs([experiment_id], f"tags.`{LOCAL_TAG}` = '{record.local_id}'")
        run = (
            found[0]
            if found
            else mlflow.create_run(experiment_id, start_time=record.started_ms, run_name=record.name, tags=record.tags)
        )
        params = [Param(key, value) for key, value in record.params.items() if key not in run.data.params]
        for start in range(0, len(params), 100):
            mlflow.log_batch(run.info.run_id, params=params[start : start + 100])
        self.record = replace(record, run_id=str(run.info.run_id), experiment_id=experiment_id)
        self.write()
        return str(run.info.run_id)


def known_run(config: RunConfig, paths: RunPaths) -> TrackedRun | None:
    """The run of a run directory, by its run.json. None: no run, or one of another server."""
    record = read_record(config, paths)
    return None if record is None else TrackedRun(config, paths, record)


def run_named(config: RunConfig, paths: RunPaths, run_id: str) -> TrackedRun:
    """The run directory's run when that is its name (a checkpoint may hold the local one), else one known by name only."""
    keep_home(tracking_uri(config))
    record = read_record(config, paths)
    if record is None or not record.answers_to(run_id):
        record = RunRecord(tracking_uri(config), run_id)
    return TrackedRun(config, paths, record)


def open_run(config: RunConfig, paths: RunPaths, *, run_id: str | None = None, force: bool = False) -> TrackedRun:
    """The run to log to: `run_id` when given, the run directory's own, or a new one. Nothing of a run that exists is changed:
    `outbox.begin` does that.

    With the server unreachable a run that the directory knows is resumed, and a new one gets a local id until the server is
    back. Raises ConfigError when that run was made by another configuration (naming the first differing key; one that needs
    force passes with `force`) or at another server, UserError when MLflow refuses or would have to be asked.
    """
    uri, record = tracking_uri(config), read_record(config, paths)
    unknown = run_id is not None and (record is None or not record.answers_to(run_id))
    if run_id is not None and unknown:
        record = _record_named(config, paths, run_id)
    if record is None:
        _require_no_other(config, paths)
        record = new_record(config, paths)
        report_store(config, paths)
    run = TrackedRun(config, paths, record)
    if run_id is None:
        require_no_copy(run)
    if record.run_id is None:
        run.write()  # first: whatever is killed from here on, the run is made only once
    # A key that did not exist when the run was begun had its default's meaning.
    before = {**flatten(added_defaults()), **record.params} if record.params else {}
    _compare(before, run.id, config, force)
    try:
        run.create()
        tags = _check_same(run, force)
        run.record = replace(
            run.record,
            local_id=tags.get(LOCAL_TAG, run.record.local_id),
            tags={**run.record.tags, RUN_DIR_TAG: str(paths.root)},
        )
    except UserError:
        raise
    except Exception as error:
        reason = first_line(error)
        if not is_unreachable(uri, error):
            raise UserError(f"MLflow at {uri}: {why(uri, error)}") from error
        if unknown:
            raise UserError(
                f"MLflow at {uri} is unreachable ({reason}), and only it knows run {run_id}; {fix_for(uri, error)}"
            ) from error
        log.warning(
            "MLflow at %s is unreachable (%s); training continues as %s, and what it logs is sent when it can be reached",
            uri,
            reason,
            run.id,
        )
    run.write()
    return run


def _record_named(config: RunConfig, paths: RunPaths, run_id: str) -> RunRecord:
    """The record of a run that is named and is not this directory's at this server."""
    known = read_any_record(config, paths)
    if known is not None and known.answers_to(run_id):  # the server has moved, or the run to another one
        return replace(known, tracking_uri=tracking_uri(config))
    if run_id.startswith(LOCAL_PREFIX):
        raise ConfigError(
            f"--resume {run_id}: only the run directory where it began knows this name; give MLflow's id (the run has the tag "
            f"{LOCAL_TAG}), or the path of a checkpoint"
        )
    return RunRecord(tracking_uri(config), run_id)


def _require_no_other(config: RunConfig, paths: RunPaths) -> None:
    """Raise ConfigError when the directory belongs to a run already: a new one must not replace it."""
    uri, known = tracking_uri(config), read_any_record(config, paths)
    if known is not None:
        raise ConfigError(
            f"{_named_by(config)}={without_secrets(uri)}: {paths.root / RUN_FILE} names MLflow run {known.id} at "
            f"{without_secrets(known.tracking_uri)}; set that URI, or, if the run is now at the new one, --resume {known.id}, "
            "or use another run_dir"
        )
    owner = run_of_checkpoints(paths)
    if owner is not None:
        raise ConfigError(
            f"{committed(paths.checkpoints)[-1]}: belongs to MLflow run {owner}, and {RUN_FILE} is missing; use another "
            f"run_dir, or continue with --resume {owner}"
        )


def _named_by(config: RunConfig) -> str:
    """What names the store, for messages."""
    return VARIABLE if config.tracking.uri is None and is_named(config) else "tracking.uri"


def require_no_copy(run: TrackedRun, *, publishes: bool = True) -> None:
    """Raise ConfigError in a copy of a run directory that would write to the same store as the original."""
    original = original_of(run.config, run.paths, run.record, publishes=publishes)
    if original is not None:
        raise ConfigError(
            f"{run.paths.root}: is a copy of {original}, and both would write to MLflow run {run.id} at "
            f"{without_secrets(run.uri)}; continue there, or begin a run of its own: run_dir=NEW --resume {run.paths.root} "
            f"(`pldr train CONFIG --resume {run.id}` continues the same run here)"
        )


def _check_same(run: TrackedRun, force: bool) -> dict[str, str]:
    """The tags of a run that MLflow has, when it was not deleted and was made by this configuration."""
    try:
        run.require_alive()
        mlflow = client(run.uri)
        found = mlflow.get_run(run.id)
        _open_on_runs(mlflow, mlflow.get_experiment(found.info.experiment_id))
    except UserError:
        raise
    except Exception as error:
        if is_unreachable(run.uri, error):
            raise
        if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
            raise UserError(f"MLflow run {run.id} at {without_secrets(run.uri)}: {why(run.uri, error)}") from error
        raise ConfigError(
            f"MLflow run {run.id}: not found at {without_secrets(run.uri)}; give the id of a run there, or put back the store "
            f"that has it. {from_checkpoints(run.paths.root)}"
        ) from error
    _compare(found.data.params, run.id, run.config, force)
    return dict(found.data.tags)


def _compare(params: dict[str, str], run_id: str, config: RunConfig, force: bool) -> None:
    """Raise ConfigError at the first key that makes today's configuration another run than the one logged with `params`."""
    for key, value in config.flat().items():
        rule = on_resume_in(config, key)
        if rule != "may change" and key in params and params[key] != value[:6000]:
            if force and rule == "needs force":
                log.warning("forced: MLflow run %s was made with %s=%s, now %s", run_id, key, params[key], value)
                continue
            problem = f"MLflow run {run_id} was made with {key}={params[key]}, this configuration has {value}; "
            if rule == "needs force":
                raise ConfigError(f"{problem}use another run_dir for another run, or --force")
            raise AnotherRunError(f"{problem}use another run_dir for another run", key=key)


def _experiment(mlflow: Any, uri: str, name: str, artifact_location: str | None) -> str:
    """The experiment's id; it is made when it does not exist. Raises ConfigError for one that was deleted."""
    found = mlflow.get_experiment_by_name(name)
    if found is None:
        try:
            return str(mlflow.create_experiment(name, artifact_location=artifact_location, tags={KIND_TAG: KIND}))
        except Exception:
            found = mlflow.get_experiment_by_name(name)  # another job has made it meanwhile
            if found is None:
                raise
    _require_not_deleted(found, uri)
    _open_on_runs(mlflow, found)
    return str(found.experiment_id)


def _open_on_runs(mlflow: Any, experiment: Any) -> None:
    """Say that an experiment is one of training runs, on which its page then opens, unless somebody has said what it is."""
    if KIND_TAG not in experiment.tags:
        with contextlib.suppress(Exception):  # the user may not be allowed to
            mlflow.set_experiment_tag(experiment.experiment_id, KIND_TAG, KIND)


def _require_not_deleted(experiment: Any, uri: str) -> None:
    if experiment.lifecycle_stage == "deleted":
        raise ConfigError(
            f"MLflow's experiment {experiment.name} at {without_secrets(uri)} was deleted there; restore it with "
            f"`{_mlflow(uri)} experiments restore --experiment-id {experiment.experiment_id}`, or set tracking.experiment to "
            "another name"
        )


def _mlflow(uri: str) -> str:
    """MLflow's command line for a store."""
    return f"MLFLOW_TRACKING_URI={shlex.quote(without_secrets(uri))} mlflow"
