"""The MLflow seam against real stores: a SQLite file, and a server that is killed and comes back."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from pipeline import tracking
from pipeline.config import parse_config
from pipeline.errors import ConfigError, UserError

TREE = {
    "name": "t",
    "data": {"sources": [{"url": "x.txt"}]},
    "model": {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8},
}


def configuration(folder, **sections):
    return parse_config({**TREE, "run_dir": str(folder), **sections}, where="test")


def history(config, run_id, key):
    points = tracking.client(tracking.tracking_uri(config)).get_metric_history(run_id, key)
    return [(p.step, p.value) for p in sorted(points, key=lambda p: p.step)]


def test_one_run_without_gap_or_double_over_a_resume(tmp_path):
    config = configuration(tmp_path)
    run_id = tracking.open_run(config)
    assert tracking.open_run(config) == run_id  # the run directory remembers
    spool = tmp_path / "logs" / "m.jsonl"
    first = tracking.Tracker(tracking.tracking_uri(config), run_id, spool)
    for step in (10, 20, 30):
        first.log(step, {"train/loss": float(step)})
    first.log(30, {"val/loss_block": 1.0})
    assert first.close()
    spool.write_bytes(spool.read_bytes() + b'{"step": 40, "val')  # killed inside a write
    second = tracking.Tracker(tracking.tracking_uri(config), run_id, spool)
    for step in (20, 30, 40):  # resumed from step 10
        second.log(step, {"train/loss": float(step)})
    assert second.close("FINISHED")
    assert history(config, run_id, "train/loss") == [(10, 10.0), (20, 20.0), (30, 30.0), (40, 40.0)]
    assert history(config, run_id, "val/loss_block") == [(30, 1.0)]
    run = tracking.client(tracking.tracking_uri(config)).get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params["model.head_dim"] == "4"
    # On another machine the spool is not there: MLflow knows how far the run came.
    third = tracking.Tracker(tracking.tracking_uri(config), run_id, tmp_path / "elsewhere" / "m.jsonl")
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
    first = tracking.Tracker(tracking.tracking_uri(config), run_id, spool)
    first.log(1, {"train/loss": 1.0})
    assert first.close()
    spool.write_bytes(b'{"step": 5, "va\n[]\n' + spool.read_bytes())
    spool.with_suffix(".sent").write_text("xx")
    second = tracking.Tracker(tracking.tracking_uri(config), run_id, spool)
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


def test_a_server_that_does_not_answer_at_the_start_is_one_line(tmp_path):
    config = configuration(tmp_path, tracking={"uri": "http://127.0.0.1:9"})
    started = time.monotonic()
    with pytest.raises(UserError, match="start the server, or set tracking.uri=null") as error:
        tracking.open_run(config)
    assert "\n" not in str(error.value) and time.monotonic() - started < 60


def test_checkpoints_come_back_from_mlflow(tmp_path):
    config = configuration(tmp_path / "a")
    run_id = tracking.open_run(config)
    tracker = tracking.Tracker(tracking.tracking_uri(config), run_id, tmp_path / "m.jsonl")
    for step in (1, 2, 3):
        folder = tmp_path / f"step-{step:06d}"
        (folder / folder.name).mkdir(parents=True)
        (folder / folder.name / "weights.pt").write_bytes(bytes([step]) * 100)
        (folder / "MANIFEST.json").write_text("{}")
        if step < 3:
            (folder / "COMMITTED").write_text("x")
            tracker.sync_checkpoints([folder])
    # An upload that was cut before COMMITTED does not exist.
    tracker._get_client().log_artifact(
        run_id, str(tmp_path / "step-000003" / "MANIFEST.json"), "checkpoints/step-000003"
    )
    tracker.close()
    uri = tracking.tracking_uri(config)
    assert tracking.published_checkpoints(uri, run_id) == ["step-000002"]  # 1 was outdated, 3 was cut
    fetched = tracking.fetch_checkpoint(uri, run_id, "step-000002", tmp_path / "b" / "checkpoints")
    assert fetched == tmp_path / "b" / "checkpoints" / "step-000002"
    assert (fetched / "step-000002" / "weights.pt").read_bytes() == bytes([2]) * 100
    assert (fetched / "COMMITTED").exists()


def start_server(folder, port):
    log = open(folder / "server.log", "ab")  # noqa: SIM115
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
         "--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--artifacts-destination", str(folder / "artifacts")],
        stdout=log, stderr=log, start_new_session=True, env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )  # fmt: skip
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            return server
        except OSError:
            assert server.poll() is None, (folder / "server.log").read_text()[-2000:]
            time.sleep(0.1)
    raise AssertionError("the server did not start")


def stop_server(server):
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.mark.slow
def test_an_outage_loses_nothing_and_never_blocks(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = start_server(tmp_path, port)
    try:
        config = configuration(tmp_path, tracking={"uri": f"http://127.0.0.1:{port}"})
        run_id = tracking.open_run(config)
        tracker = tracking.Tracker(tracking.tracking_uri(config), run_id, tmp_path / "m.jsonl")
        slowest = 0.0
        for step in range(1, 41):
            if step == 10:
                stop_server(server)
            if step == 30:
                server = start_server(tmp_path, port)
            started = time.monotonic()
            tracker.log(step, {"train/loss": float(step)})
            slowest = max(slowest, time.monotonic() - started)
            time.sleep(0.1)
        assert tracker.close("FINISHED")
        assert slowest < 0.5
        assert history(config, run_id, "train/loss") == [(step, float(step)) for step in range(1, 41)]
        assert json.loads((tmp_path / "run.json").read_text())["run_id"] == run_id
    finally:
        stop_server(server)
