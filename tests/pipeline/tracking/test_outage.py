"""MLflow unreachable at the start, during and at the end of a run: real servers that are killed, restarted, or hang."""

import json
import socket
import time

import pytest

from launch.cli import main
from pipeline.checkpoint import format
from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths
from pipeline.errors import ConfigError, UserError
from pipeline.io import storage
from pipeline.tracking import outbox, publish
from pipeline.tracking.client import client, tracking_uri
from pipeline.tracking.publish import fetch_checkpoint, published_checkpoints
from pipeline.tracking.run import open_run

TREE = {
    "name": "t",
    "data": {"sources": [{"url": "x.txt"}]},
    "model": {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8},
    "train": {"steps": 40, "warmup_steps": 0, "publish_wait_s": 20},
}


def configuration(folder, **sections):
    return parse_config({**TREE, "run_dir": str(folder), **sections}, where="test")


def opened(config, **options):
    return open_run(config, RunPaths(config.run_dir), **options)


def history(config, run_id, key):
    points = client(tracking_uri(config)).get_metric_history(run_id, key)
    return [(p.step, p.value) for p in sorted(points, key=lambda p: (p.step, p.timestamp))]


def save(run, step):
    """A committed checkpoint as the run's own."""
    name = format.checkpoint_name(step)
    target = run.paths.checkpoints / name
    (target / name).mkdir(parents=True)
    (target / name / "rank_0.pt").write_bytes(bytes([step]) * 1000)
    storage.publish_json(
        target / "state.json", {"schema_version": 1, "step": step, "config": {}, "mlflow_run_id": run.id}
    )
    manifest = {"schema_version": 1, "files": storage.manifest_of(target)}
    storage.publish_json(target / storage.MANIFEST, manifest)
    (target / "COMMITTED").write_text(storage.sha256_file(target / storage.MANIFEST))


def log_steps(tracker, steps, every=0.0):
    slowest = 0.0
    for step in steps:
        started = time.monotonic()
        tracker.log(step, {"train/loss": float(step)})
        slowest = max(slowest, time.monotonic() - started)
        time.sleep(every)
    return slowest


@pytest.mark.slow
def test_a_new_run_begins_without_the_server_and_is_replayed_once(tmp_path, server, capsys):
    """Unreachable from start to end, over a kill and a resume; then `pldr track replay` on the run directory, twice."""
    config = configuration(tmp_path / "run", tracking={"uri": server.uri})
    started = time.monotonic()
    run = opened(config)
    run_id = run.id
    assert run_id.startswith("local-") and time.monotonic() - started < 20
    assert publish.available(run) == (None, [])
    with pytest.raises(ConfigError, match="was made with seed=1"):  # checked without the server
        opened(configuration(tmp_path / "run", tracking={"uri": server.uri}, seed=2))
    first = outbox.open_tracker(run, running=True)
    publisher = publish.open_publisher(run, first)
    assert log_steps(first, range(10, 31, 10)) < 0.5
    save(run, 20)
    publisher.saved(20)
    assert publisher.close(0) == ["step-000020"] and not first.close()
    assert opened(config).id == run_id  # a second start, resumed from step 20
    second = outbox.open_tracker(run, running=True)
    log_steps(second, range(30, 41, 10))
    save(run, 40)
    assert not second.close("FINISHED")
    assert outbox.finish(run) == run_id
    storage.publish_json(
        tmp_path / "run" / "logs" / "job.json", {"schema_version": 1, "config": config.as_dict(), "run_id": run_id}
    )
    assert main(["track", "replay", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pldr: error: MLflow at ") and "start the server" in error and "replay again" in error

    server.start()
    for points in (4, 0):  # the second replay has nothing to send
        assert main(["track", "replay", str(tmp_path / "run"), "--json"]) == 0
        result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        assert result["complete"] and result["points_sent"] == points and result["run_id"] != run_id
    real = result["run_id"]
    again = opened(config)
    assert again.id == real and again.record.answers_to(run_id)
    assert history(config, real, "train/loss") == [(10, 10.0), (20, 20.0), (30, 30.0), (40, 40.0)]
    assert published_checkpoints(server.uri, real) == ["step-000040", "step-000020"]
    fetched = fetch_checkpoint(server.uri, real, "step-000040", tmp_path / "elsewhere")
    assert format.verify(fetched)["mlflow_run_id"] == run_id
    mlflow = client(server.uri)
    runs = mlflow.search_runs([mlflow.get_experiment_by_name("pldr").experiment_id])
    assert [run.info.run_id for run in runs] == [real] and runs[0].info.run_name == "t"
    assert runs[0].data.params["model.head_dim"] == "4" and runs[0].data.tags["pldr.local_id"] == run_id
    # Another machine that is told MLflow's id takes the checkpoints that hold the local one for its own.
    other = configuration(tmp_path / "other", tracking={"uri": server.uri})
    elsewhere = opened(other, run_id=real)
    assert elsewhere.id == real and elsewhere.record.answers_to(run_id)


@pytest.mark.slow
def test_an_outage_in_the_middle_loses_nothing_and_never_blocks(tmp_path, server):
    server.start()
    config = configuration(tmp_path / "run", tracking={"uri": server.uri})
    run = opened(config)
    run_id = run.id
    assert not run_id.startswith("local-")
    tracker = outbox.open_tracker(run, running=True)
    publisher = publish.open_publisher(run, tracker)
    slowest = log_steps(tracker, range(1, 11), every=0.1)
    server.kill()
    slowest = max(slowest, log_steps(tracker, range(11, 21), every=0.1))
    save(run, 20)
    started = time.monotonic()
    publisher.saved(20)
    assert time.monotonic() - started < 1
    slowest = max(slowest, log_steps(tracker, range(21, 31), every=0.1))
    server.start()
    slowest = max(slowest, log_steps(tracker, range(31, 41), every=0.1))
    assert publisher.close(60) == [] and tracker.close("FINISHED")
    assert slowest < 0.5
    assert history(config, run_id, "train/loss") == [(step, float(step)) for step in range(1, 41)]
    assert published_checkpoints(server.uri, run_id) == ["step-000020"]
    assert client(server.uri).get_run(run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_a_known_run_continues_while_the_server_is_unreachable_and_its_end_is_sent_later(tmp_path, server):
    server.start()
    config = configuration(tmp_path / "run", tracking={"uri": server.uri})
    run = opened(config)
    run_id = run.id
    first = outbox.open_tracker(run, running=True)
    log_steps(first, (10, 20, 30))
    for step in (5, 10):
        save(run, step)
    assert publish.open_publisher(run, first).close(60) == []
    publisher = publish.open_publisher(run, first)
    save(run, 20)
    publisher.saved(20)
    assert publisher.close(60) == [] and first.close("FAILED")
    assert published_checkpoints(server.uri, run_id) == ["step-000020", "step-000010"]  # 5 is gone there too
    young = configuration(tmp_path / "young", tracking={"uri": server.uri})
    begun = opened(young)
    server.kill()
    assert opened(young).id == begun.id and publish.available(begun) == (None, [])  # step 0 is all there is
    assert opened(config).id == run_id
    with pytest.raises(UserError, match="start the server"):  # it has published, and cannot be asked what
        publish.available(run)
    second = outbox.open_tracker(run, running=True)  # resumed from step 20
    log_steps(second, (30, 40))
    assert not second.close("FINISHED")
    (tmp_path / "certificate.json").write_text("{}")
    outbox.log_files(run, {str(tmp_path / "certificate.json"): "certificate"}, tags={"pldr.verdict": "x"})
    assert outbox.finish(run) == run_id
    server.start()
    assert client(server.uri).get_run(run_id).info.status == "FAILED"
    assert outbox.settle(run)["complete"]
    assert [step for step, _ in history(config, run_id, "train/loss")] == [10, 20, 30, 40]
    stored = client(server.uri).get_run(run_id)
    assert stored.info.status == "FINISHED" and stored.data.tags["pldr.verdict"] == "x"
    names = [item.path for item in client(server.uri).list_artifacts(run_id, "certificate")]
    assert names == ["certificate/certificate.json"]


@pytest.mark.slow
def test_on_another_machine_nothing_is_logged_twice_when_the_server_goes_right_after_the_fetch(tmp_path, server):
    server.start()
    here = configuration(tmp_path / "here", tracking={"uri": server.uri})
    run = opened(here)
    run_id = run.id
    tracker = outbox.open_tracker(run)
    log_steps(tracker, (10, 20, 30))
    assert tracker.close()
    there = configuration(tmp_path / "there", tracking={"uri": server.uri})
    other = opened(there, run_id=run_id)
    assert other.id == run_id
    server.kill()
    for steps in ((20, 30), (30, 40)):  # no spool here, and no server to ask how far the run came; and killed once more
        tracker = outbox.open_tracker(other, running=True)
        log_steps(tracker, steps)
        assert not tracker.close()
    server.start()
    assert outbox.settle(other)["complete"]
    assert [step for step, _ in history(there, run_id, "train/loss")] == [10, 20, 30, 40]


@pytest.mark.slow
def test_a_batch_whose_answer_was_lost_is_stored_once(tmp_path, server):
    server.start()
    config = configuration(tmp_path / "run", tracking={"uri": server.uri})
    run = opened(config)
    run_id = run.id
    tracker = outbox.open_tracker(run)
    log_steps(tracker, (10, 20, 30))
    assert tracker.close()
    sent = outbox.spool_of(run).with_suffix(".sent")
    sent.write_text(json.dumps({**json.loads(sent.read_text()), "sent": 0}))  # as if killed before it was noted
    assert outbox.settle(run)["points_sent"] == 0  # MLflow says that it has them
    assert [step for step, _ in history(config, run_id, "train/loss")] == [10, 20, 30]


def test_a_server_that_hangs_holds_neither_the_start_nor_a_step_nor_the_end(tmp_path):
    """It accepts connections and never answers, the worst kind."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(50)
        config = configuration(tmp_path, tracking={"uri": f"http://127.0.0.1:{deaf.getsockname()[1]}"})
        started = time.monotonic()
        run = opened(config)
        tracker = outbox.open_tracker(run, running=True)
        publisher = publish.open_publisher(run, tracker)
        assert time.monotonic() - started < 20
        save(run, 20)
        started = time.monotonic()
        publisher.saved(20)
        assert log_steps(tracker, range(1, 200)) < 0.5 and time.monotonic() - started < 1
        started = time.monotonic()
        assert publisher.close(1) == ["step-000020"]
        assert not tracker.close("FINISHED", wait_s=1)
        assert time.monotonic() - started < 5
