"""The MLflow seam against a real store, a SQLite file. Servers that are away: test_outage.py."""

import json
import resource
import shutil
import subprocess
import sys

import pytest

from pipeline.config.load import parse_config
from pipeline.errors import ConfigError, UserError
from pipeline.tracking import outbox
from pipeline.tracking import run as tracking
from pipeline.tracking.client import client, tracking_uri
from pipeline.tracking.metrics import Tracker

TREE = {
    "name": "t",
    "data": {"sources": [{"url": "x.txt"}]},
    "model": {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8},
}


@pytest.fixture(scope="module", autouse=True)
def empty_store(tmp_path_factory):
    """MLflow takes seconds to make a SQLite file; the tests copy one."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    client(f"sqlite:///{file}").search_experiments()
    configuration.store = file


def configuration(folder, **sections):
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "mlflow.db").exists():
        shutil.copy(configuration.store, folder / "mlflow.db")
    return parse_config({**TREE, "run_dir": str(folder), **sections}, where="test")


def history(config, run_id, key):
    points = client(tracking_uri(config)).get_metric_history(run_id, key)
    return [(p.step, p.value) for p in sorted(points, key=lambda p: p.step)]


def test_one_run_without_gap_or_double_over_a_resume(tmp_path):
    config = configuration(tmp_path)
    run_id = tracking.open_run(config)
    assert tracking.open_run(config) == run_id  # the run directory remembers
    spool = tmp_path / "logs" / "m.jsonl"
    first = Tracker(tracking_uri(config), run_id, spool)
    for step in (10, 20, 30):
        first.log(step, {"train/loss": float(step)})
    first.log(30, {"val/loss_block": 1.0})
    assert first.close()
    spool.write_bytes(spool.read_bytes() + b'{"step": 40, "val')  # killed inside a write
    second = Tracker(tracking_uri(config), run_id, spool)
    for step in (20, 30, 40):  # resumed from step 10
        second.log(step, {"train/loss": float(step)})
    assert second.close("FINISHED")
    assert history(config, run_id, "train/loss") == [(10, 10.0), (20, 20.0), (30, 30.0), (40, 40.0)]
    assert history(config, run_id, "val/loss_block") == [(30, 1.0)]
    run = client(tracking_uri(config)).get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params["model.head_dim"] == "4"
    # On another machine the spool is not there: MLflow knows how far the run came.
    third = Tracker(tracking_uri(config), run_id, tmp_path / "elsewhere" / "m.jsonl")
    third.log(40, {"train/loss": 40.0})
    third.log(50, {"train/loss": 50.0})
    assert third.close()
    assert [step for step, _ in history(config, run_id, "train/loss")] == [10, 20, 30, 40, 50]


@pytest.mark.parametrize("content", ["{", "[]", '{"tracking_uri": 3}'])
def test_a_damaged_run_file_begins_a_new_run_where_nothing_was_trained(tmp_path, content):
    first = tracking.open_run(configuration(tmp_path))
    (tmp_path / "run.json").write_text(content)
    second = tracking.open_run(configuration(tmp_path))
    assert second != first and tracking.open_run(configuration(tmp_path)) == second


def test_a_damaged_spool_does_not_end_a_run(tmp_path):
    config = configuration(tmp_path)
    run_id = tracking.open_run(config)
    spool = tmp_path / "m.jsonl"
    first = Tracker(tracking_uri(config), run_id, spool)
    first.log(1, {"train/loss": 1.0})
    assert first.close()
    spool.write_bytes(b'{"step": 5, "va\n[]\n' + spool.read_bytes())
    spool.with_suffix(".sent").write_text("xx")
    second = Tracker(tracking_uri(config), run_id, spool)
    second.log(2, {"train/loss": 2.0})
    assert second.close("FINISHED")
    assert history(config, run_id, "train/loss") == [(1, 1.0), (2, 2.0)]


def test_a_run_of_another_configuration_is_refused(tmp_path):
    run_id = tracking.open_run(configuration(tmp_path))
    with pytest.raises(ConfigError, match=rf"run {run_id} was made with seed=1, this configuration has 2"):
        tracking.open_run(configuration(tmp_path, seed=2))
    with pytest.raises(ConfigError, match="not found"):
        tracking.open_run(configuration(tmp_path), run_id="0" * 32)
    tracking.open_run(configuration(tmp_path, train={"log_every": 7}))  # changes nothing of the run


CRASH = """
def deep():
    try:
        [][1]
    except IndexError as error:
        raise RuntimeError("two lines\\nof message") from error
def main():
    deep()
main()
"""


def test_a_failure_is_marked_with_the_tracebacks_of_this_start(tmp_path):
    """The log of two starts, with tracebacks as Python writes them; only the second start's are the failure's."""
    config = configuration(tmp_path)
    run_id = tracking.open_run(config)
    log = tmp_path / "logs" / "train.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text('Traceback (most recent call last):\n  File "old.py", line 1\nOldError: of an earlier start\n')
    start = log.stat().st_size
    crash = subprocess.run([sys.executable, "-c", CRASH], capture_output=True, text=True)
    with open(log, "a") as stream:
        stream.write("pldr-status| step 10/40\n" + crash.stderr + "[launch] exits with return code = 1\n" * 300)
    outbox.fail(config, run_id, UserError("training failed: rank 1"), log_from=start)
    mlflow = client(tracking_uri(config))
    assert mlflow.get_run(run_id).info.status == "FAILED"
    (artifact,) = mlflow.list_artifacts(run_id, "failure")
    with open(mlflow.download_artifacts(run_id, artifact.path, str(tmp_path))) as stream:
        text = stream.read()
    assert text.startswith("UserError: training failed: rank 1\n")
    assert "IndexError: list index out of range" in text and "RuntimeError: two lines" in text and "in deep" in text
    assert "OldError" not in text and "return code" not in text


def test_a_failure_without_a_traceback_keeps_the_end_of_the_log():
    text = "".join(f"line {number}\n" for number in range(500))
    kept = outbox.tracebacks(text).splitlines()
    assert kept[-1] == "line 499" and len(kept) == outbox.LOG_TAIL
    assert outbox.tracebacks("") == "\n"


def test_what_only_one_metric_lacks_is_logged_after_an_earlier_resume(tmp_path):
    """Resumed from step 10 of 30: what was logged stays once, a metric that is new there begins there."""
    config = configuration(tmp_path)
    run_id = tracking.open_run(config)
    first = outbox.open_tracker(config, run_id)
    for step in (10, 20, 30):
        first.log(step, {"train/loss": float(step)})
    assert first.close()
    second = outbox.open_tracker(config, run_id)
    for step in (20, 30, 40):
        second.log(step, {"train/loss": float(step), "train/new": 1.0})
    assert second.close("FINISHED")
    assert [step for step, _ in history(config, run_id, "train/loss")] == [10, 20, 30, 40]
    assert [step for step, _ in history(config, run_id, "train/new")] == [20, 30, 40]


def log_losses(config, run_id, steps):
    """Closed with MLflow's answer waited for; False when it does not answer."""
    tracker = outbox.open_tracker(config, run_id)
    for step in steps:
        tracker.log(step, {"train/loss": float(step)})
    return tracker.close()


@pytest.fixture
def machines(tmp_path):
    """Two run directories of one run."""
    here = configuration(tmp_path / "a")
    uri = tracking_uri(here)
    here = configuration(tmp_path / "a", tracking={"uri": uri})
    there = configuration(tmp_path / "b", tracking={"uri": uri})
    run_id = tracking.open_run(here)
    assert tracking.open_run(there, run_id=run_id) == run_id
    return here, there, run_id


def test_a_machine_that_the_run_comes_back_to_logs_no_step_twice(machines):
    """A to step 50, B to step 100, then A again from its own step 50."""
    here, there, run_id = machines
    assert log_losses(here, run_id, range(10, 51, 10)) and log_losses(there, run_id, range(60, 101, 10))
    assert log_losses(here, run_id, range(60, 121, 10))
    assert history(here, run_id, "train/loss") == [(step, float(step)) for step in range(10, 121, 10)]


def test_what_a_machine_still_owes_is_sent_although_the_run_is_further(machines):
    """A was killed before its last points were sent; B began at an earlier checkpoint and went past it."""
    here, there, run_id = machines
    spool = outbox.spool_of(here, run_id)
    assert log_losses(here, run_id, (10, 20, 30, 40, 50))
    owed = spool.read_bytes()
    mlflow = client(tracking_uri(here))
    experiment = mlflow.get_run(run_id).info.experiment_id
    fresh = mlflow.create_run(experiment).info.run_id  # a run that MLflow has nothing of yet
    spool.with_suffix(".sent").unlink()
    spool.rename(spool.with_name(f"metrics-{fresh}.jsonl"))
    assert log_losses(there, fresh, (40, 50, 60))
    assert outbox.spool_of(here, fresh).read_bytes() == owed
    assert outbox.settle(here, fresh)["points_sent"] == 3
    assert history(here, fresh, "train/loss") == [(step, float(step)) for step in (10, 20, 30, 40, 50, 60)]
    assert outbox.settle(here, fresh)["points_sent"] == 0


def test_a_spool_that_gets_another_name_loses_nothing(tmp_path):
    """Begun under MLflow's id, as long as the local one was not known; twice, and with half a line."""
    config = configuration(tmp_path)
    run_id = tracking.open_run(config)
    spool = outbox.spool_of(config, run_id)
    old = spool.with_name(f"metrics-{run_id}.jsonl")
    for steps in ((10, 20), (30, 40)):
        old.parent.mkdir(exist_ok=True)
        lines = [json.dumps({"step": s, "time": 1000 + s, "values": {"train/loss": float(s)}}) + "\n" for s in steps]
        old.write_text("".join(lines) + '{"step": 5')
        if 10 in steps:  # MLflow has the first of them
            client(tracking_uri(config)).log_metric(run_id, "train/loss", 10.0, 1010, 10)
            old.with_suffix(".sent").write_text(json.dumps({"sent": len(lines[0])}))
        assert log_losses(config, run_id, ())
        assert not old.exists() and not old.with_suffix(".sent").exists()
        spool.write_bytes(spool.read_bytes() + b'{"step": 50, "val')
    assert log_losses(config, run_id, (50,))
    assert history(config, run_id, "train/loss") == [(step, float(step)) for step in (10, 20, 30, 40, 50)]


def test_a_full_disk_costs_no_metric_and_no_run(tmp_path, caplog):
    """The kernel cuts a write in the middle of a line and refuses the next ones (a limit on file sizes, for a disk)."""
    config = configuration(tmp_path, tracking={"uri": "http://127.0.0.1:9"})
    tracker = outbox.open_tracker(config, tracking.open_run(config))
    tracker.log(1, {"train/loss": 1.0})
    spool = outbox.spool_of(config, tracker.run_id)
    whole = spool.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, hard))
    try:
        tracker.log(2, {"train/loss": 2.0})
        tracker.log(3, {"train/loss": 3.0})
        assert spool.read_bytes() == whole and caplog.text.count("metrics stay in memory") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tracker.log(4, {"train/loss": 4.0})
    tracker.close(wait_s=0)
    assert [json.loads(line)["step"] for line in spool.read_bytes().splitlines()] == [1, 2, 3, 4]
