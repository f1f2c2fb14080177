"""`run.json`: which MLflow run a run directory logs to, and what is needed to make that run when MLflow is away.

A run has two names. The local one (`local-…`) is drawn here before MLflow is asked, so that a run can begin while the
server is down; MLflow's own is in the record once the server has answered. The local name is a tag of the MLflow run:
whoever creates the run looks for the tag first, so that it is created once, whatever is killed in between.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.checkpoint.format import committed, verify
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.errors import UserError
from pipeline.io import storage
from pipeline.io.urls import is_local, join, local_path
from pipeline.tracking.client import client, tracking_uri

RUN_FILE = "run.json"
LOCAL_PREFIX = "local-"
RUN_DIR_TAG, LOCAL_TAG, PLACE_TAG = "pldr.run_dir", "pldr.local_id", "pldr.publish_to"
VERDICT_TAG = "pldr.verdict"
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own name: its page shows the run below that one
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """A run's names and how it was begun. `run_id` is None until MLflow has made it.

    params: the configuration that the run was begun with, flat; empty where only MLflow knows it.
    """

    tracking_uri: str
    run_id: str | None = None
    local_id: str | None = None
    name: str = ""
    experiment: str = ""
    artifact_location: str | None = None
    started_ms: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """MLflow's name, or the local one as long as there is no other."""
        return self.run_id or self.local_id or ""

    @property
    def folder(self) -> str:
        """The name that never changes: of the spool, and of the folder below `train.publish_to`."""
        return self.local_id or self.run_id or ""

    def answers_to(self, run_id: str) -> bool:
        """Whether this is a name of the run."""
        return run_id in (self.run_id, self.local_id)


def new_record(config: RunConfig, *, local_id: str | None = None) -> RunRecord:
    """A run that MLflow does not know yet."""
    root = RunPaths(config.run_dir).root
    record = RunRecord(
        tracking_uri=tracking_uri(config),
        local_id=local_id or LOCAL_PREFIX + uuid.uuid4().hex,
        name=config.name,
        experiment=config.tracking.experiment,
        artifact_location=_location(config),
        started_ms=int(time.time() * 1000),
        params={key: value[:6000] for key, value in config.flat().items()},
    )
    tags = {RUN_DIR_TAG: str(root), LOCAL_TAG: record.folder}
    if config.tracking.parent_run is not None:
        tags[PARENT_TAG] = config.tracking.parent_run
    place = place_url(config, record)
    return replace(record, tags=tags if place is None else {**tags, PLACE_TAG: place})


def _location(config: RunConfig) -> str | None:
    """A SQLite store keeps artifacts beside the database and not in the working directory."""
    return (RunPaths(config.run_dir).root / "mlartifacts").as_uri() if config.tracking.uri is None else None


def place_url(config: RunConfig, record: RunRecord) -> str | None:
    """Where the run's checkpoints are published; None: among its MLflow artifacts."""
    where = config.train.publish_to
    if where is None:
        return None
    return join(str(local_path(where).expanduser().absolute()) if is_local(where) else where, record.folder)


def remembered(config: RunConfig) -> RunRecord | None:
    """The run this directory logs to: by its run.json, or, when that is damaged, by its newest checkpoint. None: no run, or
    one of another server."""
    record, uri = written(config), tracking_uri(config)
    if record is None or record.tracking_uri == uri:
        return record
    # MLflow never made it, so it is not bound to a server: that may have been a mistyped one.
    return replace(record, tracking_uri=uri, artifact_location=_location(config)) if record.run_id is None else None


def written(config: RunConfig) -> RunRecord | None:
    """The run that run.json names, at whichever server; when it is damaged, that of the newest checkpoint."""
    file = RunPaths(config.run_dir).root / RUN_FILE
    if not file.exists():
        return None
    try:
        known = storage.read_json(file)
        record = RunRecord(**{key: known[key] for key in RunRecord.__dataclass_fields__ if key in known})
        if not record.id or not isinstance(record.id, str):
            raise KeyError("run_id")
        return record
    except (UserError, TypeError, KeyError):
        log.warning("%s is damaged; going by the newest checkpoint", file)
    name = run_of_checkpoints(config)
    if name is None:
        return None
    return (
        new_record(config, local_id=name)
        if name.startswith(LOCAL_PREFIX)
        else RunRecord(tracking_uri(config), run_id=name)
    )


def run_of_checkpoints(config: RunConfig) -> str | None:
    """The id that the newest whole checkpoint of the run directory holds."""
    for checkpoint in reversed(committed(RunPaths(config.run_dir).checkpoints)):
        with contextlib.suppress(UserError):
            return str(verify(checkpoint)["mlflow_run_id"])
    return None


@contextlib.contextmanager
def forgotten_when_refused(config: RunConfig) -> Iterator[None]:
    """run.json as it was, when what is inside is refused: else the next start would go on with a run that was not accepted."""
    file = RunPaths(config.run_dir).root / RUN_FILE
    before = file.read_bytes() if file.exists() else None
    try:
        yield
    except UserError:
        if before is None:
            file.unlink(missing_ok=True)
        else:
            storage.publish_bytes(file, before)
        raise


def remember(config: RunConfig, record: RunRecord) -> None:
    """Write run.json."""
    storage.publish_json(RunPaths(config.run_dir).root / RUN_FILE, asdict(record))


def record_of(config: RunConfig, run_id: str) -> RunRecord:
    """The run directory's record when it is about this run, else one that knows the name only."""
    record = remembered(config)
    return record if record is not None and record.answers_to(run_id) else RunRecord(tracking_uri(config), run_id)


def create(config: RunConfig, record: RunRecord) -> RunRecord:
    """The record with MLflow's name in it, also in run.json: the run is made unless it was made before.

    Raises what MLflow raises, and may then be called again.
    """
    if record.run_id is not None:
        return record
    from mlflow.entities import Param

    mlflow = client(record.tracking_uri)
    experiment_id = experiment(mlflow, record.experiment, record.artifact_location)
    made = mlflow.search_runs([experiment_id], f"tags.`{LOCAL_TAG}` = '{record.local_id}'")
    run = (
        made[0]
        if made
        else mlflow.create_run(experiment_id, start_time=record.started_ms, run_name=record.name, tags=record.tags)
    )
    params = [Param(key, value) for key, value in record.params.items() if key not in run.data.params]
    for start in range(0, len(params), 100):
        mlflow.log_batch(run.info.run_id, params=params[start : start + 100])
    known = replace(record, run_id=str(run.info.run_id))
    remember(config, known)
    return known


def experiment(mlflow: Any, name: str, artifact_location: str | None) -> str:
    """The experiment's id; it is made when it does not exist."""
    found = mlflow.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    return str(mlflow.create_experiment(name, artifact_location=artifact_location))
