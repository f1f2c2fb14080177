"""What a run still owes MLflow: metrics, files, tags and its end, sent when MLflow answers."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.checkpoint.format import committed, step_of
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.errors import UserError, first_line
from pipeline.io import storage
from pipeline.tracking.client import client, mend_for, tracking_uri
from pipeline.tracking.metrics import CLOSE_S, Tracker, take_over
from pipeline.tracking.publish import open_publisher
from pipeline.tracking.run import log
from pipeline.tracking.run_record import (
    RUN_FILE,
    create,
    record_of,
    remembered,
)

OWED = "owed.json"  # in logs/: {"status", "files": {path: folder}, "tags"} that MLflow has not taken yet

LOG_TAIL = 100  # lines of the log that go with a failure

MOST_TRACEBACK = 200_000  # characters

_TRACEBACK = re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)+\S.*$", re.MULTILINE)


def begin(config: RunConfig) -> None:
    """A start was accepted: the run is not over, so an end that is still owed is dropped. Rank 0's tracker marks it RUNNING."""
    _owe(config, status=None)


def open_tracker(config: RunConfig, run_id: str, *, running: bool = False) -> Tracker:
    """The line to the run's metrics; it makes the run in MLflow where it does not exist yet."""
    record, spool = record_of(config, run_id), spool_of(config, run_id)
    if record.run_id is not None:  # its name as long as the local one was not known
        take_over(spool.with_name(f"metrics-{record.run_id}.jsonl"), spool)
    return Tracker(
        record.tracking_uri,
        record.id,
        spool,
        identify=lambda: create(config, record).id,
        running=running,
    )


def settle(
    config: RunConfig, run_id: str, *, status: str | None = None, wait_s: float = CLOSE_S, checkpoints: bool = False
) -> dict[str, Any]:
    """Send what an outage left: metrics, status, files, tags, and with `checkpoints` those too; `wait_s` for each at most.

    Returns {"run_id", "complete", "points_sent", "unpublished"}. What MLflow does not take now stays owed.
    """
    tracker = open_tracker(config, run_id)
    unpublished: list[str] = []
    if checkpoints and committed(RunPaths(config.run_dir).checkpoints):
        unpublished = open_publisher(config, tracker).close(wait_s)
    complete = tracker.close(wait_s=wait_s)
    if status is not None:
        _owe(config, status=status)
    if tracker.mlflow_id is not None:
        complete = _pay(config, tracker.mlflow_id) and complete
    return {
        "run_id": tracker.mlflow_id or run_id,
        "complete": complete and not unpublished,
        "points_sent": tracker.points_sent,
        "unpublished": unpublished,
    }


def finish(config: RunConfig, run_id: str) -> str:
    """The run has come to its end: send what is left, mark it finished. Returns MLflow's id, where it has one by now."""
    return str(settle(config, run_id, status="FINISHED")["run_id"])


def mark(config: RunConfig, run_id: str, status: str) -> None:
    """Set a run's status; in an outage that is owed. What is left in the spool is sent with it."""
    settle(config, run_id, status=status)


def set_tags(config: RunConfig, run_id: str, tags: dict[str, str]) -> None:
    """Set a run's tags; in an outage they are owed."""
    _owe(config, tags={key: value[:5000] for key, value in tags.items()})
    record = record_of(config, run_id)
    if record.run_id is not None:
        _pay(config, record.run_id)


def fail(config: RunConfig, run_id: str, error: BaseException, *, log_from: int) -> None:
    """The run failed: mark it so, with the tracebacks of its log from byte `log_from` on as an artifact."""
    logs = RunPaths(config.run_dir).logs
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    target = logs / "failures" / f"{moment}-traceback.txt"
    try:
        text = read_log(logs / "train.log", log_from)
        reason = f"{type(error).__name__}: {first_line(error)}\n\n"
        storage.publish_bytes(target, (reason + tracebacks(text)).encode())
        _owe(config, files={str(target): "failure"})
    except (OSError, UserError) as problem:
        log.warning("the failure's traceback was not kept: %s", first_line(problem))
    settle(config, run_id, status="FAILED")


def keep_evidence(config: RunConfig, *, since: float) -> None:
    """What ranks wrote since then (seconds of the epoch) goes to the run with its end: rank 0's traces of
    `train.profile_steps`, every rank's memory when it ran out."""
    paths = RunPaths(config.run_dir)
    found = {file: f"profile/{file.parent.name}" for file in paths.profiles.glob("*/rank-0.*")}
    found |= {file: "failure" for file in paths.memory.glob("rank-*")}
    files = {str(file): folder for file, folder in found.items() if file.stat().st_mtime >= since}
    if files:
        _owe(config, files=files)


def read_log(file: Path, start: int) -> str:
    """A log from byte `start` on; empty when there is none."""
    try:
        with open(file, "rb") as stream:
            stream.seek(start)
            return stream.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def tracebacks(text: str) -> str:
    """The tracebacks in a log, in order (the first is nearest to the cause); without any the end of the log."""
    found = [match[0] for match in _TRACEBACK.finditer(text)]
    shown = "\n\n".join(found) if found else "\n".join(text.splitlines()[-LOG_TAIL:])
    return shown[:MOST_TRACEBACK] + "\n"


def replay(config: RunConfig) -> dict[str, Any]:
    """Send everything that an outage left in a run directory whose training is over. See `settle` for the result.

    Raises UserError when there is no run, or MLflow still does not take everything.
    """
    paths, uri = RunPaths(config.run_dir), tracking_uri(config)
    record = remembered(config)
    if record is None:
        raise UserError(
            f"{paths.root / RUN_FILE}: names no run at {uri}; nothing was logged here: `pldr train` begins one"
        )
    done = committed(paths.checkpoints)
    status = "FINISHED" if done and step_of(done[-1]) == config.train.steps else None
    result = settle(config, record.id, status=status, wait_s=config.train.publish_wait_s, checkpoints=True)
    if not result["complete"]:
        missing = f"; not published: {', '.join(result['unpublished'])}" if result["unpublished"] else ""
        raise UserError(f"MLflow at {uri} did not take everything{missing}; {mend_for(uri)} and replay again")
    return result


def log_files(config: RunConfig, run_id: str, files: dict[str, str], *, tags: dict[str, str] | None = None) -> None:
    """Attach local files to a run as artifacts, `path -> folder`, and set tags. In an outage that is owed."""
    _owe(config, files=files, tags=tags or {})
    record = record_of(config, run_id)
    try:
        _pay(config, create(config, record).id)
    except Exception as error:
        log.warning("MLflow did not take %s: %s", ", ".join(files), first_line(error))


def _owe(
    config: RunConfig,
    *,
    files: dict[str, str] | None = None,
    tags: dict[str, str] | None = None,
    status: str | bool | None = False,
) -> dict[str, Any]:
    """Write down what MLflow is to be told. status: None takes an owed one back, False leaves it."""
    file = RunPaths(config.run_dir).logs / OWED
    try:
        owed = dict(storage.read_json(file)) if file.exists() else {}
    except (UserError, TypeError, ValueError):
        owed = {}
    owed["files"] = {**owed.get("files", {}), **(files or {})}
    owed["tags"] = {**owed.get("tags", {}), **(tags or {})}
    if status is not False:
        owed["status"] = status
    if any(owed.values()):
        storage.publish_json(file, owed)
    else:
        file.unlink(missing_ok=True)
    return owed


def _pay(config: RunConfig, run_id: str) -> bool:
    """Tell MLflow what it is owed. Returns whether it took all."""
    file = RunPaths(config.run_dir).logs / OWED
    owed = _owe(config)
    try:
        mlflow = client(tracking_uri(config))
        for path, folder in owed["files"].items():
            if Path(path).exists():
                mlflow.log_artifact(run_id, path, folder)
        for key, value in owed["tags"].items():
            mlflow.set_tag(run_id, key, value)
        if owed.get("status"):
            mlflow.set_terminated(run_id, status=owed["status"])
    except Exception as error:
        log.warning("MLflow run %s is told later (%s)", run_id, first_line(error))
        return False
    file.unlink(missing_ok=True)
    return True


def spool_of(config: RunConfig, run_id: str) -> Path:
    """The run's metrics on local disk."""
    paths, record = RunPaths(config.run_dir), record_of(config, run_id)
    return paths.logs / f"metrics-{record.folder}.jsonl"
