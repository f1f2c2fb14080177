"""`run.json`: which MLflow run a run directory logs to, and what is needed to make that run while MLflow is unreachable.

A run has two names. The local one (`local-…`) is drawn here before MLflow is asked, so that a run can begin while the
server is down; MLflow's own is in the record once the server has answered. The local name is a tag of the MLflow run:
whoever creates the run looks for the tag first, so that it is created once, whatever is killed in between.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pipeline.checkpoint.format import committed, verify
from pipeline.config.paths import RunPaths, expanded
from pipeline.config.run import RunConfig
from pipeline.errors import UserError
from pipeline.io import storage
from pipeline.io.sealed import publish_sealed, read_sealed
from pipeline.io.urls import is_local, join, local_path
from pipeline.tracking.client import is_named, tracking_uri
from pipeline.tracking.clock import now_ms
from pipeline.tracking.default_store import FREE, RUN_DIR_TAG
from pipeline.tracking.origin import origin_tags
from pipeline.tracking.sqlite_store import RUN_FILE, artifacts_beside, file_of, holds_run, same_store

LOCAL_PREFIX = "local-"
LOCAL_TAG, PUBLISH_TAG = "pldr.local_id", "pldr.publish_to"
VERDICT_TAG, TIER_TAG = "pldr.verdict", "pldr.tier"
CONTINUED_TAG = "pldr.continued_from"  # the checkpoint of another run that this one began with
NOTE_TAG = "mlflow.note.content"  # MLflow's own name: a run's description
NOTE_BEGINS = "PLDR-LLM"  # one that begins otherwise is a user's, and stays
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own name: its page shows the run below that one
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """A run's names and how it was begun. `run_id` is None until MLflow has made it; `experiment_id` also of an older run.

    params: the configuration that the run was begun with, flat; empty where only MLflow knows it.
    """

    tracking_uri: str
    run_id: str | None = None
    local_id: str | None = None
    name: str = ""
    experiment: str = ""
    experiment_id: str | None = None
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
        """Whether this is a name of the run: a checkpoint may hold either."""
        return run_id in (self.run_id, self.local_id)


def new_record(
    config: RunConfig, paths: RunPaths, *, local_id: str | None = None, params: dict[str, str] | None = None
) -> RunRecord:
    """A run that MLflow does not know yet. params: what it is logged with (None: the whole configuration)."""
    record = RunRecord(
        tracking_uri=tracking_uri(config),
        local_id=local_id or LOCAL_PREFIX + uuid.uuid4().hex,
        name=config.name,
        experiment=config.tracking.experiment,
        artifact_location=_artifact_location(config),
        started_ms=now_ms(),
        params={key: value[:6000] for key, value in (config.flat() if params is None else params).items()},
    )
    tags = {**origin_tags(), RUN_DIR_TAG: str(paths.root), LOCAL_TAG: record.folder}
    if config.tracking.parent_run is not None:
        tags[PARENT_TAG] = config.tracking.parent_run
    url = publish_url(config, record)
    return replace(record, tags=tags if url is None else {**tags, PUBLISH_TAG: url})


def _artifact_location(config: RunConfig) -> str | None:
    """A SQLite store keeps artifacts beside the database and not in the working directory."""
    file = file_of(tracking_uri(config))
    return None if file is None else artifacts_beside(file)


def publish_url(config: RunConfig, record: RunRecord) -> str | None:
    """Where the run's checkpoints are published; None: among its MLflow artifacts."""
    where = config.train.publish_to
    if where is None:
        return None
    return join(str(expanded(local_path(where), "train.publish_to")) if is_local(where) else where, record.folder)


def read_record(config: RunConfig, paths: RunPaths) -> RunRecord | None:
    """The run this directory logs to at the configured server. None: no run, or one of another server."""
    record, uri = read_any_record(config, paths), tracking_uri(config)
    if record is None or record.tracking_uri == uri:
        return record
    if record.run_id is not None:
        # A database that is reached by another path, or was moved or copied with the run.
        before, now = file_of(record.tracking_uri), file_of(uri)
        if before is None or now is None:
            return None
        # Where the user names no store, run.json has been asked for it.
        if not is_named(config) or same_store(record.tracking_uri, uri) or holds_run(uri, record.run_id):
            return replace(record, tracking_uri=uri)
        return None
    # MLflow never made it, so it is not bound to a server: that may have been a mistyped one.
    return replace(record, tracking_uri=uri, artifact_location=_artifact_location(config))


def read_any_record(config: RunConfig, paths: RunPaths) -> RunRecord | None:
    """The run that run.json names, at whichever server; when the file is damaged, that of the newest checkpoint."""
    file = paths.root / RUN_FILE
    if not file.exists():
        return None
    try:
        known = read_sealed(file, free=FREE)
        record = RunRecord(**{key: known[key] for key in RunRecord.__dataclass_fields__ if key in known})
        if not record.id or not isinstance(record.id, str):
            raise KeyError("run_id")
        return record
    except (UserError, TypeError, KeyError):
        log.warning("%s is damaged; going by the newest checkpoint", file)
    name = run_of_checkpoints(paths)
    if name is None:
        return None
    if name.startswith(LOCAL_PREFIX):
        return new_record(config, paths, local_id=name)
    return RunRecord(tracking_uri(config), run_id=name)


def original_of(config: RunConfig, paths: RunPaths, record: RunRecord, *, publishes: bool = True) -> str | None:
    """The run directory that this one was copied from, where both would write to one store: another folder, still there, whose
    run.json names the same run. None where this is the run's directory, or the copy has a store of its own. publishes: whether
    the folder of published checkpoints is written to, too."""
    home = Path(record.tags.get(RUN_DIR_TAG, paths.root))
    known, theirs = read_any_record(config, paths), home / RUN_FILE
    if known is None or not theirs.exists() or os.path.realpath(home) == os.path.realpath(paths.root):
        return None
    if not same_store(known.tracking_uri, tracking_uri(config)) and not (publishes and config.train.publish_to):
        return None
    try:
        other = read_sealed(theirs, free=FREE)
        same = record.id in (other.get("run_id"), other.get("local_id"))
    except (UserError, AttributeError):
        return None
    return str(home) if same else None


def write_record(paths: RunPaths, record: RunRecord) -> None:
    """Write run.json."""
    publish_sealed(paths.root / RUN_FILE, asdict(record), free=FREE)


def run_of_checkpoints(paths: RunPaths) -> str | None:
    """The id that the newest intact checkpoint of the run directory holds."""
    for checkpoint in reversed(committed(paths.checkpoints)):
        with contextlib.suppress(UserError):
            return str(verify(checkpoint)["mlflow_run_id"])
    return None


@contextlib.contextmanager
def restored_when_refused(paths: RunPaths) -> Iterator[None]:
    """Put run.json back as it was when the body raises UserError: else the next start would resume a run that was refused."""
    file = paths.root / RUN_FILE
    before = file.read_bytes() if file.exists() else None
    try:
        yield
    except UserError:
        if before is None:
            file.unlink(missing_ok=True)
        else:
            storage.publish_bytes(file, before)
        raise
