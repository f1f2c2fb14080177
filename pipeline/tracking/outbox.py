"""What MLflow has not taken yet: metrics, files, tags, data sets and the run's end, kept in the run directory and sent later.

Metrics wait in the run's spool (metrics.py), checkpoints in `checkpoints/` (publish.py), and the rest in `logs/pending.json`.
`settle` sends all of it: at the end of every training, and as `pldr track replay`.
"""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.checkpoint.format import committed, step_of
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.errors import UserError, first_line
from pipeline.io import storage
from pipeline.io.locks import locked
from pipeline.io.sealed import publish_sealed, read_sealed
from pipeline.tracking.client import OLDER_SERVER, client, tracking_uri, why
from pipeline.tracking.clock import now_ms
from pipeline.tracking.metrics import CLOSE_S, Tracker, take_over, what_is_lost
from pipeline.tracking.publish import open_publisher
from pipeline.tracking.run import TrackedRun, known_run, require_no_copy
from pipeline.tracking.run_record import NOTE_BEGINS, NOTE_TAG
from pipeline.tracking.sqlite_store import RUN_FILE, keep_home

log = logging.getLogger(__name__)

CHANGING = ".pending.lock"  # in the run directory: held while pending.json is read or changed
PENDING = "pending.json"  # in logs/
DAMAGED = "pending.json.damaged"  # a damaged one, set aside
OLD_PENDING = "owed.json"  # its name until November 2026: still read, then replaced
SCHEMA_VERSION = 1
LOG_TAIL = 100  # lines of the log that go with a failure
MOST_TRACEBACK = 200_000  # characters
_TRACEBACK = re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)+\S.*$", re.MULTILINE)


@dataclass
class Pending:
    """What a run's MLflow side still lacks: artifacts (path, below the run directory relative to it -> artifact folder), tags,
    data sets (what each is for -> MLflow's fields of it), and its end: the status, and when (ms of the epoch)."""

    files: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    data_sets: dict[str, dict[str, str]] = field(default_factory=dict)
    status: str | None = None
    ended_ms: int | None = None

    @classmethod
    def read(cls, paths: RunPaths) -> Pending:
        """What is on disk; nothing when the file is missing or damaged (it is then set aside)."""
        pending = cls()
        for name, version in ((OLD_PENDING, None), (PENDING, SCHEMA_VERSION)):
            try:
                if (paths.logs / name).exists():
                    pending._add(read_sealed(paths.logs / name, schema_version=version))
            except (UserError, TypeError, ValueError, AttributeError):
                log.warning("%s is damaged and left out", paths.logs / name)
                (paths.logs / name).rename(paths.logs / DAMAGED)
        return pending

    def _add(self, known: dict[str, Any]) -> None:
        files, tags = dict(known.get("files", {})), dict(known.get("tags", {}))
        self.files, self.tags = {**self.files, **files}, {**self.tags, **tags}
        self.data_sets |= dict(known.get("data_sets", {}))
        self.status, self.ended_ms = known.get("status", self.status), known.get("ended_ms", self.ended_ms)

    def without(self, sent: Pending) -> Pending:
        """What was deferred since `sent` was read."""
        files = {path: folder for path, folder in self.files.items() if sent.files.get(path) != folder}
        tags = {key: value for key, value in self.tags.items() if sent.tags.get(key) != value}
        data_sets = {use: data_set for use, data_set in self.data_sets.items() if sent.data_sets.get(use) != data_set}
        ended = (self.status, self.ended_ms) == (sent.status, sent.ended_ms)
        return Pending(files, tags, data_sets, None if ended else self.status, None if ended else self.ended_ms)

    def write(self, paths: RunPaths) -> None:
        """Replace what is on disk; without anything pending there is no file."""
        if self.files or self.tags or self.data_sets or self.status:
            publish_sealed(paths.logs / PENDING, {"schema_version": SCHEMA_VERSION, **asdict(self)})
        else:
            (paths.logs / PENDING).unlink(missing_ok=True)
        (paths.logs / OLD_PENDING).unlink(missing_ok=True)


def begin(run: TrackedRun) -> None:
    """A start was accepted: the run is not over, so a pending end is dropped. Rank 0's tracker marks it RUNNING."""
    with locked(run.paths.root / CHANGING):
        pending = Pending.read(run.paths)
        pending.status = pending.ended_ms = None
        pending.write(run.paths)


def open_tracker(run: TrackedRun, *, running: bool = False) -> Tracker:
    """The sender of the run's metrics; it makes the run in MLflow where it does not exist yet."""
    spool, mlflow_id = spool_of(run), run.record.run_id
    if mlflow_id is not None:  # the spool's name as long as the local id was not known
        take_over(spool.with_name(f"metrics-{mlflow_id}.jsonl"), spool)
    return Tracker(run.uri, run.id, spool, identify=run.create, running=running)


def spool_of(run: TrackedRun) -> Path:
    """The run's metrics on local disk."""
    return run.paths.logs / f"metrics-{run.record.folder}.jsonl"


def settle(
    run: TrackedRun, *, status: str | None = None, wait_s: float = CLOSE_S, checkpoints: bool = False
) -> dict[str, Any]:
    """Send what an outage left: metrics, status, files, tags, and with `checkpoints` those too; `wait_s` for each at most.

    Returns {"run_id", "complete", "points_sent", "unpublished"}. What MLflow does not take now stays pending.
    """
    tracker = open_tracker(run)
    unpublished: list[str] = []
    if checkpoints and committed(run.paths.checkpoints):
        unpublished = open_publisher(run, tracker).close(wait_s)
    complete = tracker.close(wait_s=wait_s)
    if status is not None:
        _defer(run.paths, status=status)
    if tracker.mlflow_id is not None:
        complete = _flush(run, tracker.mlflow_id) and complete
    return {
        "run_id": tracker.mlflow_id or run.id,
        "complete": complete and not unpublished,
        "points_sent": tracker.points_sent,
        "unpublished": unpublished,
    }


def finish(run: TrackedRun) -> str:
    """The run has come to its end: send what is left, mark it finished. Returns MLflow's id, where it has one by now."""
    return str(settle(run, status="FINISHED")["run_id"])


def mark(run: TrackedRun, status: str, *, tags: dict[str, str] | None = None) -> None:
    """Set a run's status, and tags; in an outage later. What is left in the spool is sent with it."""
    _defer(run.paths, tags=tags)
    settle(run, status=status)


def leave(config: RunConfig, paths: RunPaths) -> None:
    """A start was given up before ranks ran: a run that MLflow has made for it is not left RUNNING."""
    try:
        run = known_run(config, paths)
        if run is None or run.record.run_id is None:
            return
        if client(run.uri).get_run(run.record.run_id).info.status == "RUNNING":
            mark(run, "KILLED")
    except Exception as error:
        log.warning("the end of the run could not be reported to MLflow: %s", first_line(error))


def set_tags(run: TrackedRun, tags: dict[str, str]) -> None:
    """Set a run's tags; in an outage later."""
    _defer(run.paths, tags={key: value[:5000] for key, value in tags.items()})
    if run.record.run_id is not None:
        _flush(run, run.record.run_id)


def log_files(run: TrackedRun, files: dict[str, str], *, tags: dict[str, str] | None = None) -> None:
    """Attach local files to a run as artifacts, `path -> folder`, and set tags; in an outage later."""
    _defer(run.paths, files=files, tags=tags)
    try:
        _flush(run, run.create())
    except Exception as error:
        log.warning("MLflow did not take %s: %s", ", ".join(files), first_line(error))


def log_data_sets(run: TrackedRun, data_sets: dict[str, dict[str, str]]) -> None:
    """Show what a run trains on: `training` or `validation` -> the fields of MLflow's Dataset. Sent with what is sent next."""
    _defer(run.paths, data_sets=data_sets)


def log_report(config: RunConfig, paths: RunPaths, report: Path) -> str | None:
    """Attach a data report to the run directory's run; before MLflow has one, to the run that training begins here.

    The run's id in MLflow, None while there is none.
    """
    _defer(paths, files={str(report): "data"})
    run = known_run(config, paths)
    if run is None or run.record.run_id is None:  # not `create`: a training may be making its run at this moment
        return None
    keep_home(run.uri)
    _flush(run, run.record.run_id)
    return run.record.run_id


def fail(run: TrackedRun, error: BaseException, *, log_from: int) -> None:
    """The run failed: mark it so, with the tracebacks of its log from byte `log_from` on as an artifact."""
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    target = run.paths.logs / "failures" / f"{moment}-traceback.txt"
    try:
        text = read_log(run.paths.logs / "train.log", log_from)
        reason = f"{type(error).__name__}: {first_line(error)}\n\n"
        storage.publish_bytes(target, (reason + tracebacks(text)).encode())
        _defer(run.paths, files={str(target): "failure"})
    except (OSError, UserError) as problem:
        log.warning("the failure's traceback was not kept: %s", first_line(problem))
    settle(run, status="FAILED")


Evidence = dict[Path, tuple[int, int]]  # file -> size and time of its last change


def evidence(paths: RunPaths) -> Evidence:
    """What ranks wrote beside their log: rank 0's traces of `train.profile_steps`, every rank's memory when it ran out."""
    files = [*paths.profiles.glob("*/rank-0.*"), *paths.memory.glob("rank-*")]
    return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


def keep_evidence(paths: RunPaths, *, before: Evidence) -> None:
    """What is new in the evidence or was changed since `before` is sent with the run's end."""
    new = [file for file, facts in evidence(paths).items() if before.get(file) != facts]
    folders = {
        str(file): f"profile/{file.parent.name}" if file.is_relative_to(paths.profiles) else "failure" for file in new
    }
    if folders:
        _defer(paths, files=folders)


def replay(config: RunConfig, paths: RunPaths) -> dict[str, Any]:
    """Send everything that an outage left in a run directory whose training is over. See `settle` for the result.

    Raises UserError when there is no run, or MLflow still does not take everything.
    """
    uri, run = tracking_uri(config), known_run(config, paths)
    if run is None:
        raise UserError(
            f"{paths.root / RUN_FILE}: names no run at {uri}; nothing was logged here: `pldr train` begins one"
        )
    try:
        run.require_store()
        require_no_copy(run)
        if run.record.run_id is not None:
            run.require_alive()
        else:
            client(uri).get_experiment_by_name(run.record.experiment)  # whether MLflow answers
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"MLflow at {uri}, run {run.id} of {paths.root / RUN_FILE}: {why(uri, error)}, and replay again"
        ) from error
    done = committed(paths.checkpoints)
    status = "FINISHED" if done and step_of(done[-1]) == config.train.steps else None
    result = settle(run, status=status, wait_s=config.train.publish_wait_s, checkpoints=True)
    if not result["complete"]:
        missing = f"; not published: {', '.join(result['unpublished'])}" if result["unpublished"] else ""
        raise UserError(f"MLflow at {uri} did not take everything{missing}; see the warnings above, and replay again")
    _require_intact(run)
    return result


def _require_intact(run: TrackedRun) -> None:
    """Raise UserError where some of what waited was damaged, so that MLflow will not get it."""
    spool, damaged = spool_of(run), run.paths.logs / DAMAGED
    if lost := what_is_lost(spool):
        raise UserError(
            f"{spool}: was damaged: {lost}, everything else was sent; to accept that, move it and {spool.stem}.sent away"
        )
    if damaged.exists():
        raise UserError(
            f"{damaged}: what waited in {PENDING} is lost (files, tags), everything else was sent; "
            "`pldr validate CONFIG --force` sends a certificate again; to accept the rest, remove it"
        )


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


def _defer(
    paths: RunPaths,
    *,
    files: dict[str, str] | None = None,
    tags: dict[str, str] | None = None,
    data_sets: dict[str, dict[str, str]] | None = None,
    status: str | None = None,
) -> None:
    """Write down, on top of what is pending, what is to be sent."""
    with locked(paths.root / CHANGING):
        pending = Pending.read(paths)
        pending.files |= {_below(paths, path): folder for path, folder in (files or {}).items()}
        pending.tags |= tags or {}
        pending.data_sets |= data_sets or {}
        if status is not None:
            pending.status, pending.ended_ms = status, now_ms()
        pending.write(paths)


def _below(paths: RunPaths, path: str) -> str:
    """A path as it is kept: relative to the run directory, which may be moved or copied before the file is sent."""
    return str(Path(path).relative_to(paths.root)) if Path(path).is_relative_to(paths.root) else path


def _file(paths: RunPaths, kept: str) -> Path:
    """Where a file to be sent is now. Of an absolute path, as they were kept until November 2026, the longest end that is in
    the run directory counts: it was moved or copied since."""
    file = paths.root / kept
    if file.is_relative_to(paths.root):
        return file
    ends = (paths.root.joinpath(*file.parts[i:]) for i in range(1, len(file.parts)))
    return next((end for end in ends if end.exists()), file)


def _flush(run: TrackedRun, mlflow_id: str) -> bool:
    """Send what is pending. Returns whether MLflow took all of it."""
    with locked(run.paths.root / CHANGING):  # reading sets a damaged file aside
        pending = Pending.read(run.paths)
    try:
        mlflow = client(run.uri)
        for path, folder in pending.files.items():
            if (file := _file(run.paths, path)).exists():
                mlflow.log_artifact(mlflow_id, str(file), folder)
        for key, value in pending.tags.items():
            if key != NOTE_TAG or _is_ours(mlflow.get_run(mlflow_id).data.tags.get(NOTE_TAG, "")):
                mlflow.set_tag(mlflow_id, key, value)
        if pending.data_sets:
            _send_data_sets(mlflow, mlflow_id, pending.data_sets)
        if pending.status and (info := mlflow.get_run(mlflow_id).info).status != pending.status:  # else it has its end
            ended = max(pending.ended_ms or now_ms(), info.start_time or 0)  # the clock may have been set back since
            mlflow.set_terminated(mlflow_id, status=pending.status, end_time=ended)
    except Exception as error:
        log.warning("MLflow run %s is updated later (%s)", mlflow_id, first_line(error))
        return False
    with locked(run.paths.root / CHANGING):
        Pending.read(run.paths).without(pending).write(run.paths)
    return True


def _is_ours(note: str) -> bool:
    """Whether a run's description is ours to replace, and not a user's."""
    return not note or note.startswith(NOTE_BEGINS)


def _send_data_sets(mlflow: Any, mlflow_id: str, data_sets: dict[str, dict[str, str]]) -> None:
    """Log data sets as inputs of the run; sent again they are the same inputs. A server that knows none goes without."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    inputs = [
        DatasetInput(Dataset(**fields), [InputTag(MLFLOW_DATASET_CONTEXT, use)]) for use, fields in data_sets.items()
    ]
    try:
        mlflow.log_inputs(mlflow_id, inputs)
    except Exception as error:
        if getattr(error, "error_code", None) not in OLDER_SERVER:
            raise
        log.warning("MLflow run %s shows no data sets: its server knows none (%s)", mlflow_id, first_line(error))
