"""The clock of the host is set back by an hour: no time that MLflow gets goes back, and numbers are read in order."""

import os
import shutil
import time

import pytest

from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths
from pipeline.tracking import outbox
from pipeline.tracking.client import client
from pipeline.tracking.clock import now_ms
from pipeline.tracking.query import read_run
from pipeline.tracking.run import open_run

HOUR = 3600.0


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)` sets the wall clock by so much."""
    real, off = time.time, 0.0

    def set_clock(seconds):
        nonlocal off
        off += seconds

    monkeypatch.setattr(time, "time", lambda: real() + off)
    return set_clock


@pytest.fixture
def run(tmp_path, empty_store):
    model = {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8}
    tree = {"name": "t", "run_dir": str(tmp_path), "data": {"sources": [{"url": "x.txt"}]}, "model": model}
    config = parse_config(tree, where="test")
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return open_run(config, RunPaths(config.run_dir))


def test_the_time_goes_on_when_the_clock_is_set_back_and_follows_it_when_it_is_set_ahead(clock):
    first = now_ms()
    clock(-HOUR)
    time.sleep(0.02)
    second = now_ms()
    assert 20 <= second - first < 60_000
    clock(3 * HOUR)
    assert now_ms() - second > HOUR * 1000


def test_a_run_over_a_clock_that_was_set_back_keeps_its_order_and_its_duration(run, clock):
    tracker = outbox.open_tracker(run, running=True)
    for step in range(1, 11):
        tracker.log(step, {"train/loss": float(step)})
        if step == 5:
            clock(-HOUR)
    assert tracker.close("FINISHED")
    info = client(run.uri).get_run(run.id).info
    times = [point.timestamp for point in client(run.uri).get_metric_history(run.id, "train/loss")]
    assert info.start_time <= times[0] and times == sorted(times) and times[-1] <= info.end_time
    assert info.end_time - info.start_time < HOUR * 1000 / 2


def test_another_process_begins_after_the_clock_was_set_back(run, clock, monkeypatch):
    """It has only the host's clock: points are read by step all the same, and the end is not before the beginning."""
    for first in (1, 6):
        tracker = outbox.open_tracker(run, running=True)
        for step in range(first, first + 5):
            tracker.log(step, {"train/loss": float(step)})
        tracker.close(None)
        clock(-HOUR)
        monkeypatch.setattr("pipeline.tracking.clock._last", (0.0, 0.0))
    outbox.mark(run, "FINISHED")
    assert [value for _, value in read_run(run.uri, run.id)[2]["train/loss"]] == [float(step) for step in range(1, 11)]
    info = client(run.uri).get_run(run.id).info
    assert info.status == "FINISHED" and info.end_time >= info.start_time


def test_evidence_is_what_is_new_and_not_what_is_younger_than_a_clock(run, clock, tmp_path):
    folder = run.paths.memory
    folder.mkdir(parents=True)
    (folder / "rank-0.txt").write_text("of an earlier start")
    before = outbox.evidence(run.paths)
    clock(-HOUR)
    (folder / "rank-1.txt").write_text("new")
    os.utime(folder / "rank-1.txt", (time.time(), time.time()))
    outbox.keep_evidence(run.paths, before=before)
    assert list(outbox.Pending.read(run.paths).files) == ["logs/memory/rank-1.txt"]
