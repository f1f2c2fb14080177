"""Rank 0's metrics on their way to MLflow: a spool on local disk and a thread that sends it; training never waits.

Asynchronous logging of MLflow drops metrics when the server is unreachable, with only a line in its log. So the loop appends
points to a JSONL spool and a daemon thread sends them in batches, without retries and with a short timeout; what could not
be sent stays in the spool and is sent later, in order. Each point is sent once:

- `.sent` holds how many bytes of the spool MLflow has, and how many there were when the last start ended. A batch whose
  answer was lost is sent again; an equal point (same time, step and value) is stored only once.
- A resumed run leaves out points that its spool already holds for that step.
- Another machine may have continued the run, before this one or since: at the first contact MLflow is asked how far the
  run came (`floor`), and points up to that step are not sent. What is still pending in the spool from an earlier start may be
  older than that and still be missing: for those metrics MLflow is asked which steps it has.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, first_line
from pipeline.io import locks, storage
from pipeline.io.sealed import is_intact, publish_sealed
from pipeline.tracking.client import client, import_mlflow, is_unreachable, latest_points
from pipeline.tracking.clock import now_ms

log = logging.getLogger(__name__)

SEND_EVERY_S = 1.0
BATCH = 500  # MLflow takes at most 1000 points a call
CLOSE_S = 10.0


class Tracker:
    """Sends rank 0's metrics to MLflow. `log` costs an append to a file; everything else happens in a thread.

    identify: returns MLflow's id of the run, making the run where it does not exist yet; called in the thread, and again
    if it raised. running: mark the run RUNNING at the first contact.
    """

    def __init__(
        self,
        uri: str,
        run_id: str,
        spool: Path,
        *,
        identify: Callable[[], str] | None = None,
        running: bool = False,
    ) -> None:
        self._uri, self.run_id = uri, run_id
        self._identify = identify or (lambda: run_id)
        self._running = running
        self._spool, self._sent_file = spool, spool.with_suffix(".sent")
        spool.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(spool)
        self._last = last_steps(spool)
        self._stream = open(spool, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._unwritten: list[bytes] = []  # lines not in the spool yet: the disk is full
        self._sent, self._floor = read_sent(spool), dict[str, int]()
        self._written = _read_written(spool)
        self._held: dict[str, set[int]] = {}  # metric -> the steps that MLflow has, where the floor is not enough
        self._client: Any = None
        self._began = 0  # ms of the epoch, as MLflow has it
        self.mlflow_id: str | None = None  # None until MLflow has answered
        self.tried = threading.Event()  # set after the first attempt to reach MLflow
        self.points_sent = 0
        self._stop = threading.Event()
        self._warned = False
        import_mlflow()  # here, and not beside the first steps
        self._thread = threading.Thread(target=self._send_forever, name="mlflow-sender", daemon=True)
        self._thread.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record metrics of a step. A metric that already has this step (a resumed run) is left out."""
        new = {key: value for key, value in values.items() if step > self._last.get(key, -1)}
        if not new:
            return
        self._last.update(dict.fromkeys(new, step))
        point = {"step": step, "time": now_ms(), "values": new}
        self._unwritten.append(_line(point))
        self._write()

    def _write(self) -> None:
        """Append what is not in the spool yet, complete lines or nothing: a full disk must not end a run."""
        data, size = b"".join(self._unwritten), os.fstat(self._stream.fileno()).st_size
        try:
            if self._stream.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._stream.fileno(), size)
            if len(self._unwritten) == 1:
                log.warning("%s: %s; metrics stay in memory until it can be written", self._spool, first_line(error))
        else:
            self._unwritten.clear()

    def close(self, status: str | None = None, *, wait_s: float = CLOSE_S) -> bool:
        """Send what is left, `wait_s` at most. Returns whether everything arrived, the run's status included."""
        if self._unwritten:
            self._write()
        self._stop.set()
        self._thread.join(timeout=wait_s)
        self._stream.close()
        self._written = max(self._written, self._spool.stat().st_size)
        with contextlib.suppress(UserError):  # a full disk
            self._write_sent()
        if self.mlflow_id is None or self._sent < self._spool.stat().st_size:
            log.warning(
                "MLflow at %s did not take all metrics; they are kept in %s, `pldr track replay` sends them",
                self._uri,
                self._spool,
            )
            return False
        if status is not None:
            try:
                ended = max(now_ms(), self._began)
                self._client.set_terminated(self.mlflow_id, status=status, end_time=ended)
            except Exception as error:
                log.warning("MLflow run %s could not be marked %s: %s", self.mlflow_id, status, first_line(error))
                return False
        return True

    def _send_forever(self) -> None:
        # One sender per spool: a replay in another process and this one must not send the same points.
        with open(self._spool.with_suffix(".lock"), "a+", encoding="utf-8") as lock:
            while not locks.lock(lock):
                if self._stop.wait(0.2):
                    return
            stopped = False
            while not stopped:
                stopped = self._stop.is_set()
                try:
                    if self.mlflow_id is None:
                        self._first_contact()
                    self._send_pending()
                    self._warned = False
                except Exception as error:
                    if not self._warned:
                        how = "is unreachable" if is_unreachable(self._uri, error) else "takes no metrics"
                        log.warning(
                            "MLflow at %s %s (%s); metrics wait in %s", self._uri, how, first_line(error), self._spool
                        )
                    self._warned = True
                self.tried.set()
                self._stop.wait(SEND_EVERY_S)

    def _first_contact(self) -> None:
        """Find out which run it is, and how far MLflow has it."""
        run_id = self._identify()
        self._client = client(self._uri)
        if self._running:
            self._client.update_run(run_id, status="RUNNING")
        run = self._client.get_run(run_id)
        points, self._began = latest_points(run), run.info.start_time or 0
        self._floor = {key: step for key, (step, _) in points.items()}
        self._sent = read_sent(self._spool)
        with open(self._spool, "rb") as stream:
            stream.seek(self._sent)
            complete = (line for line in stream if line.endswith(b"\n"))  # the loop may be writing one
            doubtful = {
                key
                for point in _points(complete)
                for key in point["values"]
                if point["step"] <= self._floor.get(key, -1)
            }
        self._held = {key: {p.step for p in self._client.get_metric_history(run_id, key)} for key in sorted(doubtful)}
        self._write_sent()
        self.mlflow_id = run_id

    def _write_sent(self) -> None:
        publish_sealed(self._sent_file, {"sent": self._sent, "written": self._written})

    def _is_new(self, key: str, step: int) -> bool:
        """Whether MLflow lacks a point."""
        return step not in self._held[key] if key in self._held else step > self._floor.get(key, -1)

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
            metrics = [
                Metric(key, value, point["time"], point["step"])
                for point in _points(lines)
                for key, value in point["values"].items()
                if self._is_new(key, point["step"])
            ]
            for start in range(0, len(metrics), BATCH):
                self._client.log_batch(self.mlflow_id, metrics=metrics[start : start + BATCH])
            self.points_sent += len(metrics)
            self._sent += sum(len(line) for line in lines)
            self._write_sent()


def read_sent(spool: Path) -> int:
    """Bytes of a spool that MLflow has; 0 where that is not known (points are then left out by step)."""
    try:
        known = storage.read_json(spool.with_suffix(".sent"))
        sent = int(known["sent"] if isinstance(known, dict) and is_intact(known) else known)
        return sent if 0 <= sent <= spool.stat().st_size else 0
    except (OSError, ValueError, TypeError, KeyError):
        return 0


def _read_written(spool: Path) -> int:
    """How long a spool was when a start ended: a shorter one has lost its end."""
    try:
        known = storage.read_json(spool.with_suffix(".sent"))
        return int(known["written"]) if is_intact(known) else 0
    except (OSError, ValueError, TypeError, KeyError):
        return 0


def take_over(old: Path, spool: Path) -> None:
    """Append the unsent points of a spool that was begun under another name of the run to this one, and remove the old spool.

    A point whose step this spool has reached is left out. If it is killed halfway, calling it again completes it.
    """
    if old == spool or not old.exists():
        return
    _cut_torn_line(spool)
    last, lines = last_steps(spool), list[bytes]()
    with open(old, "rb") as stream:
        stream.seek(read_sent(old))
        for point in _points(line for line in stream if line.endswith(b"\n")):
            new = {key: value for key, value in point["values"].items() if point["step"] > last.get(key, -1)}
            if new:
                lines.append(_line({**point, "values": new}))
    with open(spool, "ab") as stream:
        stream.write(b"".join(lines))
        stream.flush()
        os.fsync(stream.fileno())
    for suffix in (".jsonl", ".sent", ".lock"):
        old.with_suffix(suffix).unlink(missing_ok=True)


def _cut_torn_line(spool: Path) -> None:
    """Remove the half line that a process killed inside a write leaves: it was never logged."""
    if spool.exists():
        data = spool.read_bytes()
        end = data.rfind(b"\n") + 1
        if end != len(data):
            os.truncate(spool, end)


def last_steps(spool: Path) -> dict[str, int]:
    """Metric -> the last step that a spool holds."""
    last: dict[str, int] = {}
    if spool.exists():
        with open(spool, "rb") as stream:
            for point in _points(stream):
                for key in point["values"]:
                    last[key] = max(point["step"], last.get(key, -1))
    return last


def _points(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The points of spool lines; a damaged line is left out with a warning: a log must not end a run."""
    for line in lines:
        point = _point(line)
        if point is not None:
            yield point
        else:
            log.warning("a damaged line of the metrics spool is left out: %.60r", line)


def _line(point: dict[str, Any]) -> bytes:
    """A point as a line of the spool, with a checksum: a digit that changes must not become another loss."""
    text = json.dumps(point)
    return f'{text[:-1]}, "crc32": {zlib.crc32(text.encode())}}}\n'.encode()


def _point(line: bytes) -> dict[str, Any] | None:
    """The point of a line; None when it is damaged. Lines of before December 2026 have no checksum."""
    try:
        point = json.loads(line)
        crc32 = point.pop("crc32", None)
        intact = point.keys() == {"step", "time", "values"} and type(point["step"]) is int and point["time"] > 0
        intact = intact and all(type(value) in (int, float) for value in point["values"].values())
        return point if intact and crc32 in (None, zlib.crc32(json.dumps(point).encode())) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def what_is_lost(spool: Path) -> str | None:
    """What a spool no longer has of what was written to it; None for an intact one."""
    missing = _read_written(spool) - (spool.stat().st_size if spool.exists() else 0)
    if missing > 0:
        return f"its last {missing} bytes are lost"
    if not spool.exists():
        return None
    with open(spool, "rb") as stream:
        damaged = sum(1 for line in stream if _point(line) is None)
    return f"{damaged} damaged lines are left out" if damaged else None
