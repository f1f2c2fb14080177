"""The one seam to MLflow while a run trains: one run per job, written by rank 0; metrics are never waited for.

Oddities explained once (MLflow 3.17, measured): with a dead server one call with default settings blocks for minutes, and
asynchronous logging then drops metrics with only a line in the log. So the loop appends points to a JSONL spool on local
disk and a daemon thread sends them in batches, without retries and with a short timeout; what could not be sent stays in
the spool and is sent later. Logging a step twice stores it twice: the sender remembers how much of the spool is sent, and
a resumed run leaves out points up to the last step that MLflow has.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.checkpoints import COMMITTED, committed, verify
from pipeline.config import RunConfig, RunPaths
from pipeline.errors import ConfigError, UserError, first_line

log = logging.getLogger(__name__)

SEND_EVERY_S = 1.0
BATCH = 500  # MLflow takes at most 1000 points a call
RUN_FILE = "run.json"
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
# Settings that may change on resume without making it another run. Everything else must be equal.
MAY_CHANGE = ("name", "run_dir", "tracking.", "post.", "data.workers", "tokens.workers", "train.ranks", "train.log_every",
              "train.validate_every", "train.checkpoint_every", "train.keep_checkpoints", "train.timeout_s",
              "train.max_restarts", "train.max_skipped_steps", "train.on_spike", "train.spike_",
              "train.deepspeed", "train.compile", "train.peak_tflops", "train.val_sequences")  # fmt: skip


def tracking_uri(config: RunConfig) -> str:
    """The configured server, or a SQLite file in the run directory."""
    return config.tracking.uri or f"sqlite:///{RunPaths(config.run_dir).root / 'mlflow.db'}"


def client(uri: str) -> Any:
    """An MLflow client that fails fast. Imported here: the import takes seconds."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault(TIMEOUT, "3")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def open_run(config: RunConfig, *, run_id: str | None = None) -> str:
    """The id of the run to log to: `run_id` when given, the run directory's own, or a new one.

    Raises ConfigError when that run was made by another configuration (naming the first differing key), UserError when
    MLflow does not answer.
    """
    paths = RunPaths(config.run_dir)
    uri = tracking_uri(config)
    record = paths.root / RUN_FILE
    try:
        mlflow = client(uri)
        run_id = run_id or _remembered_run(paths, uri)
        if run_id is None:
            run_id = _create(mlflow, config, paths)
        else:
            _check_same(mlflow, run_id, config)
            mlflow.update_run(run_id, status="RUNNING")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"MLflow at {uri}: {first_line(error)}; {mend_for(uri)}") from error
    storage.publish_json(record, {"run_id": run_id, "tracking_uri": uri})
    return run_id


def mend_for(uri: str) -> str:
    """What to do about a store that does not answer."""
    if uri.startswith("sqlite:///"):
        return (
            f"restore {uri.removeprefix('sqlite:///')}, or remove it and {RUN_FILE} beside it to begin a new MLflow run"
        )
    return "start the server, or set tracking.uri=null"


def _remembered_run(paths: RunPaths, uri: str) -> str | None:
    """The run this directory logs to: by its run.json, or, when that is damaged, by its newest checkpoint."""
    record = paths.root / RUN_FILE
    try:
        known = storage.read_json(record) if record.exists() else {"tracking_uri": None}
        return str(known["run_id"]) if known["tracking_uri"] == uri else None
    except (UserError, TypeError, KeyError):
        log.warning("%s is damaged; going by the newest checkpoint", record)
        for checkpoint in reversed(committed(paths.checkpoints)):
            return str(verify(checkpoint)["mlflow_run_id"])
        return None


def _experiment(mlflow: Any, config: RunConfig) -> str:
    """The experiment's id; it is made when it does not exist."""
    experiment = mlflow.get_experiment_by_name(config.tracking.experiment)
    if experiment is not None:
        return str(experiment.experiment_id)
    # A SQLite store keeps artifacts beside the database and not in the working directory.
    location = (RunPaths(config.run_dir).root / "mlartifacts").as_uri() if config.tracking.uri is None else None
    return str(mlflow.create_experiment(config.tracking.experiment, artifact_location=location))


def _create(mlflow: Any, config: RunConfig, paths: RunPaths) -> str:
    experiment_id = _experiment(mlflow, config)
    run = mlflow.create_run(experiment_id, run_name=config.name, tags={"pldr.run_dir": str(paths.root)})
    from mlflow.entities import Param

    flat = config.flat()
    params = [Param(key, value[:6000]) for key, value in flat.items()]
    for start in range(0, len(params), 100):
        mlflow.log_batch(run.info.run_id, params=params[start : start + 100])
    return str(run.info.run_id)


def _check_same(mlflow: Any, run_id: str, config: RunConfig) -> None:
    try:
        params = mlflow.get_run(run_id).data.params
    except Exception as error:
        record = RunPaths(config.run_dir).root / RUN_FILE
        raise ConfigError(
            f"MLflow run {run_id}: not found at {tracking_uri(config)}; give the id of a run there, or, if {record} names it, "
            "restore the store or remove that file to begin a new run"
        ) from error
    for key, value in config.flat().items():
        if not key.startswith(MAY_CHANGE) and key in params and params[key] != value[:6000]:
            raise ConfigError(
                f"MLflow run {run_id} was made with {key}={params[key]}, this configuration has {value}; "
                "use another run_dir for another run"
            )


def mark(config: RunConfig, run_id: str, status: str) -> None:
    """Set a run's status, if MLflow answers: a run must not end because its log book is away."""
    try:
        client(tracking_uri(config)).set_terminated(run_id, status=status)
    except Exception as error:
        log.warning("MLflow run %s could not be marked %s: %s", run_id, status, first_line(error))


def spool_of(config: RunConfig, run_id: str) -> Path:
    """The run's metrics on local disk."""
    return RunPaths(config.run_dir).logs / f"metrics-{run_id}.jsonl"


def finish(config: RunConfig, run_id: str) -> None:
    """Send what an outage left in the spool, and mark the run finished."""
    Tracker(tracking_uri(config), run_id, spool_of(config, run_id)).close("FINISHED")


class Tracker:
    """Rank 0's line to MLflow. `log` costs an append to a file; everything else happens in a thread."""

    def __init__(self, uri: str, run_id: str, spool: Path) -> None:
        self._uri, self.run_id = uri, run_id
        self._spool, self._sent_file = spool, spool.with_suffix(".sent")
        spool.parent.mkdir(parents=True, exist_ok=True)
        self._sent = self._read_sent()
        self._cut_torn_line()
        self._client: Any = None
        self._last = self._last_steps()
        self._stream = open(spool, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._stop = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._send_forever, name="mlflow-sender", daemon=True)
        self._thread.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record metrics of a step. A metric that already has this step (a resumed run) is left out."""
        new = {key: value for key, value in values.items() if step > self._last.get(key, -1)}
        if not new:
            return
        self._last.update(dict.fromkeys(new, step))
        point = {"step": step, "time": int(time.time() * 1000), "values": new}
        self._stream.write(json.dumps(point) + "\n")
        self._stream.flush()

    def sync_checkpoints(self, kept: list[Path]) -> None:
        """Make the run's artifacts hold exactly these committed checkpoints: upload what is missing (COMMITTED last),
        remove older ones. Safe to repeat, so that what an outage left undone is done the next time."""
        mlflow = self._get_client()
        published = published_checkpoints(self._uri, self.run_id)
        with _patience():
            for checkpoint in kept:
                if checkpoint.name not in published:
                    _upload_checkpoint(mlflow, self.run_id, checkpoint)
        outdated = [name for name in published if name < kept[0].name]
        if outdated:
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

            repository = get_artifact_repository(mlflow.get_run(self.run_id).info.artifact_uri)
            for name in outdated:
                repository.delete_artifacts(f"checkpoints/{name}")

    def close(self, status: str | None = None) -> bool:
        """Send what is left (a few seconds at most). Returns whether everything arrived."""
        self._stop.set()
        self._thread.join(timeout=10)
        self._stream.close()
        sent_all = self._sent >= self._spool.stat().st_size
        if not sent_all:
            log.warning("MLflow at %s did not take all metrics; they are kept in %s", self._uri, self._spool)
        elif status is not None:
            try:
                self._get_client().set_terminated(self.run_id, status=status)
            except Exception as error:
                log.warning("MLflow run %s could not be marked %s: %s", self.run_id, status, first_line(error))
        return sent_all

    def _get_client(self) -> Any:
        if self._client is None:
            self._client = client(self._uri)
        return self._client

    def _read_sent(self) -> int:
        """Bytes of the spool that MLflow has. Unreadable: none; MLflow stores an equal point only once."""
        try:
            sent = int(self._sent_file.read_text())
        except (OSError, ValueError):
            return 0
        return sent if self._spool.exists() and sent <= self._spool.stat().st_size else 0

    def _cut_torn_line(self) -> None:
        """A process killed inside a write leaves half a line: it was never logged."""
        if self._spool.exists():
            data = self._spool.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole != len(data):
                os.truncate(self._spool, whole)

    def _last_steps(self) -> dict[str, int]:
        last: dict[str, int] = {}
        if self._spool.exists():
            with open(self._spool, "rb") as stream:
                for point in _points(stream):
                    last.update(dict.fromkeys(point["values"], point["step"]))
        else:  # the run goes on on another machine: MLflow knows how far it came
            mlflow = client(self._uri)
            for key in mlflow.get_run(self.run_id).data.metrics:
                history = mlflow.get_metric_history(self.run_id, key)
                last[key] = max(point.step for point in history)
        return last

    def _send_forever(self) -> None:
        while not self._stop.wait(SEND_EVERY_S):
            self._send_pending()
        self._send_pending()

    def _send_pending(self) -> None:
        from mlflow.entities import Metric

        while True:
            with open(self._spool, "rb") as stream:
                stream.seek(self._sent)
                lines: list[bytes] = []
                while len(lines) < BATCH // 10 and (line := stream.readline()).endswith(b"\n"):
                    lines.append(line)
            if not lines:
                return
            points = list(_points(lines))
            metrics = [
                Metric(key, value, point["time"], point["step"])
                for point in points
                for key, value in point["values"].items()
            ]
            try:
                for start in range(0, len(metrics), BATCH):
                    self._get_client().log_batch(self.run_id, metrics=metrics[start : start + BATCH])
            except Exception as error:
                if not self._warned:
                    log.warning(
                        "MLflow at %s does not answer (%s); metrics wait in %s",
                        self._uri,
                        first_line(error),
                        self._spool,
                    )
                    self._warned = True
                return
            self._warned = False
            self._sent += sum(len(line) for line in lines)
            storage.publish_bytes(self._sent_file, str(self._sent).encode())


def _points(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The points of spool lines; a damaged line is told and left out: the log book must not end a run."""
    for line in lines:
        try:
            point = json.loads(line)
            whole = isinstance(point["step"], int) and isinstance(point["values"], dict) and point["time"] > 0
        except (ValueError, TypeError, KeyError):
            whole = False
        if whole:
            yield point
        else:
            log.warning("a damaged line of the metrics spool is left out: %.60r", line)


def published_checkpoints(uri: str, run_id: str) -> list[str]:
    """Names of the committed checkpoints among a run's artifacts, newest first."""
    mlflow = client(uri)
    names = [Path(item.path).name for item in mlflow.list_artifacts(run_id, "checkpoints") if item.is_dir]

    def whole(name: str) -> bool:
        return any(Path(item.path).name == COMMITTED for item in mlflow.list_artifacts(run_id, f"checkpoints/{name}"))

    return sorted(filter(whole, names), key=lambda name: (len(name), name), reverse=True)


def fetch_checkpoint(uri: str, run_id: str, name: str, folder: Path) -> Path:
    """Bring a published checkpoint into `folder`. Its bytes are checked against its manifest by who loads it."""
    target = folder / storage.safe_member(name)
    staging = folder / f".{name}.download"
    staging.mkdir(parents=True, exist_ok=True)
    with _patience():
        downloaded = Path(client(uri).download_artifacts(run_id, f"checkpoints/{name}", str(staging)))
    storage.replace_dir(downloaded, target)
    shutil.rmtree(staging, ignore_errors=True)
    return target


def _upload_checkpoint(mlflow: Any, run_id: str, checkpoint: Path) -> None:
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != COMMITTED)
    for path in [*files, checkpoint / COMMITTED]:
        folder = Path("checkpoints") / checkpoint.name / path.parent.relative_to(checkpoint)
        mlflow.log_artifact(run_id, str(path), folder.as_posix())


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Artifacts may take long: the short timeout is for metrics."""
    before = os.environ.get(TIMEOUT)
    os.environ[TIMEOUT] = "600"
    try:
        yield
    finally:
        os.environ[TIMEOUT] = before or "3"


def log_files(config: RunConfig, run_id: str, files: dict[str, str]) -> None:
    """Attach local files to a run as artifacts, `path -> folder`. An outage is a warning: the files stay where they are."""
    try:
        mlflow = client(tracking_uri(config))
        for path, folder in files.items():
            mlflow.log_artifact(run_id, path, folder)
    except Exception as error:
        log.warning("MLflow did not take %s: %s", ", ".join(files), first_line(error))


def log_report(config: RunConfig, report: Path) -> str | None:
    """Attach a data report to the run directory's run, or, before there is one, to a run of its own named `data-report`.

    The id of that run; None, with a warning, when MLflow does not answer: the report stays where it is.
    """
    uri = tracking_uri(config)
    try:
        mlflow = client(uri)
        run_id = _remembered_run(RunPaths(config.run_dir), uri) or _report_run(mlflow, config)
        with _patience():
            mlflow.log_artifact(run_id, str(report), "data")
        return run_id
    except Exception as error:
        log.warning("MLflow did not take %s: %s", report, first_line(error))
        return None


def _report_run(mlflow: Any, config: RunConfig) -> str:
    """The run that this run directory's earlier reports went to, or a new one."""
    experiment_id, root = _experiment(mlflow, config), str(RunPaths(config.run_dir).root)
    for run in mlflow.search_runs([experiment_id], "tags.`mlflow.runName` = 'data-report'"):
        if run.data.tags.get("pldr.run_dir") == root:
            return str(run.info.run_id)
    run = mlflow.create_run(experiment_id, run_name="data-report", tags={"pldr.run_dir": root})
    mlflow.set_terminated(run.info.run_id)
    return str(run.info.run_id)
