"""A run in a real MLflow store, a SQLite file. Unreachable servers: test_outage.py."""

import dataclasses
import json
import resource
import shutil
import subprocess
import sys

import pytest

from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, UserError
from pipeline.io import storage
from pipeline.io.sealed import read_sealed
from pipeline.tracking import outbox
from pipeline.tracking.client import client, tracking_uri
from pipeline.tracking.metrics import Tracker
from pipeline.tracking.origin import command, git_commit
from pipeline.tracking.run import _experiment, open_run, run_named

TREE = {
    "name": "t",
    "data": {"sources": [{"url": "x.txt"}]},
    "model": {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8},
}


@pytest.fixture(scope="module", autouse=True)
def store(empty_store):
    configuration.store = empty_store


def configuration(folder, **sections):
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "mlflow.db").exists():
        shutil.copy(configuration.store, folder / "mlflow.db")
    return parse_config({**TREE, "run_dir": str(folder), **sections}, where="test")


def opened(config, **options):
    return open_run(config, RunPaths(config.run_dir), **options)


def history(config, run_id, key):
    points = client(tracking_uri(config)).get_metric_history(run_id, key)
    return [(p.step, p.value) for p in sorted(points, key=lambda p: p.step)]


def test_one_run_without_gap_or_double_over_a_resume(tmp_path):
    config = configuration(tmp_path)
    run = opened(config)
    run_id = run.id
    assert opened(config).id == run_id  # the run directory remembers
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
    first = opened(configuration(tmp_path)).id
    (tmp_path / "run.json").write_text(content)
    second = opened(configuration(tmp_path)).id
    assert second != first and opened(configuration(tmp_path)).id == second


def test_a_damaged_spool_does_not_end_a_run(tmp_path):
    config = configuration(tmp_path)
    run = opened(config)
    run_id = run.id
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


def test_a_changed_digit_in_the_spool_is_not_sent_and_told_by_a_replay(tmp_path):
    config = configuration(tmp_path)
    run = opened(config)
    first = outbox.open_tracker(run)
    first.log(1, {"train/loss": 1.5})
    first.log(2, {"train/loss": 2.5})
    assert first.close()
    spool = outbox.spool_of(run)
    outbox.replay(config, run.paths)
    intact = spool.read_bytes()
    spool.with_suffix(".sent").unlink()
    spool.write_bytes(intact.replace(b"2.5", b"3.5"))
    with pytest.raises(UserError, match=r"metrics-.*\.jsonl: was damaged: 1 damaged lines are left out"):
        outbox.replay(config, run.paths)
    assert history(config, run.id, "train/loss") == [(1, 1.5), (2, 2.5)]
    spool.write_bytes(intact)
    outbox.replay(config, run.paths)
    spool.write_bytes(intact[: intact.index(b"\n") + 1])  # cut at the end of a line
    with pytest.raises(UserError, match=r"metrics-.*\.jsonl: was damaged: its last \d+ bytes are lost"):
        outbox.replay(config, run.paths)


def test_a_damaged_pending_file_is_set_aside_and_told_by_a_replay(tmp_path):
    config = configuration(tmp_path)
    run = opened(config)
    run.create()
    outbox.Pending(tags={"pldr.verdict": "certified-1"}).write(run.paths)
    pending = tmp_path / "logs" / "pending.json"
    pending.write_text(pending.read_text().replace("certified-1", "certified-2"))
    with pytest.raises(UserError, match=r"pending.json.damaged: what waited in pending.json is lost"):
        outbox.replay(config, run.paths)
    assert "pldr.verdict" not in client(tracking_uri(config)).get_run(run.id).data.tags
    (tmp_path / "logs" / "pending.json.damaged").unlink()
    outbox.replay(config, run.paths)


def test_a_changed_digit_in_run_json_is_damage(tmp_path):
    run = opened(configuration(tmp_path))
    file = tmp_path / "run.json"
    file.write_text(file.read_text().replace('"seed": "1"', '"seed": "7"'))
    assert opened(configuration(tmp_path)).id != run.id  # no checkpoint names it


def test_a_run_of_another_configuration_is_refused(tmp_path):
    run = opened(configuration(tmp_path))
    run_id = run.id
    with pytest.raises(ConfigError, match=rf"run {run_id} was made with seed=1, this configuration has 2"):
        opened(configuration(tmp_path, seed=2))
    with pytest.raises(ConfigError, match="not found"):
        opened(configuration(tmp_path), run_id="0" * 32)
    opened(configuration(tmp_path, train={"log_every": 7}))  # changes nothing of the run


@pytest.mark.parametrize("where", ["run.json", "MLflow"])
def test_a_key_that_is_later_than_the_run_had_its_default(tmp_path, monkeypatch, where):
    flat = RunConfig.flat
    monkeypatch.setattr(
        RunConfig, "flat", lambda config: {k: v for k, v in flat(config).items() if k != "train.z_loss"}
    )
    run_id = opened(configuration(tmp_path)).id
    monkeypatch.undo()
    named = {"run_id": run_id} if where == "MLflow" else {}
    assert opened(configuration(tmp_path), **named).id == run_id
    with pytest.raises(ConfigError, match=r"made with train\.z_loss=0\.0, this configuration has 0\.1"):
        opened(configuration(tmp_path, train={"z_loss": 0.1}), **named)


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
    run = opened(config)
    run_id = run.id
    log = tmp_path / "logs" / "train.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text('Traceback (most recent call last):\n  File "old.py", line 1\nOldError: of an earlier start\n')
    start = log.stat().st_size
    crash = subprocess.run([sys.executable, "-c", CRASH], capture_output=True, text=True)
    with open(log, "a") as stream:
        stream.write("pldr-status| step 10/40\n" + crash.stderr + "[launch] exits with return code = 1\n" * 300)
    outbox.fail(run, UserError("training failed: rank 1"), log_from=start)
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
    run = opened(config)
    run_id = run.id
    first = outbox.open_tracker(run)
    for step in (10, 20, 30):
        first.log(step, {"train/loss": float(step)})
    assert first.close()
    second = outbox.open_tracker(run)
    for step in (20, 30, 40):
        second.log(step, {"train/loss": float(step), "train/new": 1.0})
    assert second.close("FINISHED")
    assert [step for step, _ in history(config, run_id, "train/loss")] == [10, 20, 30, 40]
    assert [step for step, _ in history(config, run_id, "train/new")] == [20, 30, 40]


def log_losses(run, steps):
    """Waits for MLflow when it closes; False when MLflow is unreachable."""
    tracker = outbox.open_tracker(run)
    for step in steps:
        tracker.log(step, {"train/loss": float(step)})
    return tracker.close()


@pytest.fixture
def machines(tmp_path):
    """One run, opened in two run directories."""
    here = configuration(tmp_path / "a")
    uri = tracking_uri(here)
    here = configuration(tmp_path / "a", tracking={"uri": uri})
    there = configuration(tmp_path / "b", tracking={"uri": uri})
    one = opened(here)
    other = opened(there, run_id=one.id)
    assert other.id == one.id
    return one, other


def test_a_machine_that_the_run_comes_back_to_logs_no_step_twice(machines):
    """A to step 50, B to step 100, then A again from its own step 50."""
    here, there = machines
    assert log_losses(here, range(10, 51, 10)) and log_losses(there, range(60, 101, 10))
    assert log_losses(here, range(60, 121, 10))
    assert history(here.config, here.id, "train/loss") == [(step, float(step)) for step in range(10, 121, 10)]


def test_what_is_pending_on_a_machine_is_sent_although_the_run_is_further(machines):
    """A was killed before its last points were sent; B began at an earlier checkpoint and went past it."""
    here, there = machines
    spool = outbox.spool_of(here)
    assert log_losses(here, (10, 20, 30, 40, 50))
    pending = spool.read_bytes()
    mlflow = client(here.uri)
    experiment = mlflow.get_run(here.id).info.experiment_id
    fresh_id = mlflow.create_run(experiment).info.run_id  # a run that MLflow has nothing of yet
    spool.with_suffix(".sent").unlink()
    spool.rename(spool.with_name(f"metrics-{fresh_id}.jsonl"))
    fresh_here, fresh_there = (run_named(run.config, run.paths, fresh_id) for run in (here, there))
    assert log_losses(fresh_there, (40, 50, 60))
    assert outbox.spool_of(fresh_here).read_bytes() == pending
    assert outbox.settle(fresh_here)["points_sent"] == 3
    assert history(here.config, fresh_id, "train/loss") == [(step, float(step)) for step in (10, 20, 30, 40, 50, 60)]
    assert outbox.settle(fresh_here)["points_sent"] == 0


def test_a_spool_that_gets_another_name_loses_nothing(tmp_path):
    """Begun under MLflow's id, as long as the local one was not known; twice, and with half a line."""
    config = configuration(tmp_path)
    run = opened(config)
    run_id = run.id
    spool = outbox.spool_of(run)
    old = spool.with_name(f"metrics-{run_id}.jsonl")
    for steps in ((10, 20), (30, 40)):
        old.parent.mkdir(exist_ok=True)
        lines = [json.dumps({"step": s, "time": 1000 + s, "values": {"train/loss": float(s)}}) + "\n" for s in steps]
        old.write_text("".join(lines) + '{"step": 5')
        if 10 in steps:  # MLflow has the first of them
            client(tracking_uri(config)).log_metric(run_id, "train/loss", 10.0, 1010, 10)
            old.with_suffix(".sent").write_text(json.dumps({"sent": len(lines[0])}))
        assert log_losses(run, ())
        assert not old.exists() and not old.with_suffix(".sent").exists()
        spool.write_bytes(spool.read_bytes() + b'{"step": 50, "val')
    assert log_losses(run, (50,))
    assert history(config, run_id, "train/loss") == [(step, float(step)) for step in (10, 20, 30, 40, 50)]


def test_a_full_disk_costs_no_metric_and_no_run(tmp_path, caplog):
    """The kernel cuts a write in the middle of a line and refuses the next ones (a limit on file sizes, for a disk)."""
    config = configuration(tmp_path, tracking={"uri": "http://127.0.0.1:9"})
    run = opened(config)
    tracker = outbox.open_tracker(run)
    tracker.log(1, {"train/loss": 1.0})
    spool = outbox.spool_of(run)
    before = spool.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        tracker.log(2, {"train/loss": 2.0})
        tracker.log(3, {"train/loss": 3.0})
        assert spool.read_bytes() == before and caplog.text.count("metrics stay in memory") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tracker.log(4, {"train/loss": 4.0})
    tracker.close(wait_s=0)
    assert [json.loads(line)["step"] for line in spool.read_bytes().splitlines()] == [1, 2, 3, 4]


def test_what_another_process_did_with_the_run_is_seen_after_a_reload(tmp_path):
    """Opened while the server was unreachable; then another process has made it in MLflow."""
    here = opened(configuration(tmp_path, tracking={"uri": "http://127.0.0.1:9"}))
    assert here.id.startswith("local-")
    other = run_named(here.config, here.paths, here.id)
    other.record = dataclasses.replace(other.record, run_id="a" * 32)
    other.write()
    assert here.id != other.id
    here.reload()
    assert here.id == other.id == "a" * 32 and here.record.local_id == other.record.local_id


@pytest.mark.parametrize("old", [True, False])
def test_what_is_pending_is_sent_with_the_next_contact(tmp_path, old):
    """Also what an older version left in logs/owed.json."""
    run = opened(configuration(tmp_path))
    artifact = tmp_path / "certificate.json"
    artifact.write_text("{}")
    pending = {"files": {str(artifact): "certificate"}, "tags": {"pldr.verdict": "certified"}, "status": "FINISHED"}
    file = tmp_path / "logs" / ("owed.json" if old else "pending.json")
    storage.publish_json(file, pending if old else {"schema_version": 1, **pending})
    assert outbox.settle(run)["complete"]
    stored = client(run.uri).get_run(run.id)
    assert stored.data.tags["pldr.verdict"] == "certified" and stored.info.status == "FINISHED"
    assert [file.path for file in client(run.uri).list_artifacts(run.id, "certificate")]
    assert not list((tmp_path / "logs").glob("*.json"))


def test_an_old_pending_file_is_kept_under_the_new_name_while_mlflow_is_unreachable(tmp_path):
    run = opened(configuration(tmp_path, tracking={"uri": "http://127.0.0.1:9"}))
    storage.publish_json(
        tmp_path / "logs" / "owed.json", {"files": {"/a": "x"}, "tags": {"one": "1"}, "status": "KILLED"}
    )
    outbox.set_tags(run, {"two": "2"})
    assert not (tmp_path / "logs" / "owed.json").exists()
    kept = {"schema_version": 1, "files": {"/a": "x"}, "tags": {"one": "1", "two": "2"}, "data_sets": {}}
    assert read_sealed(tmp_path / "logs" / "pending.json") == {**kept, "status": "KILLED", "ended_ms": None}
    outbox.begin(run)  # the run is resumed: its end is no longer pending
    assert read_sealed(tmp_path / "logs" / "pending.json") == {**kept, "status": None, "ended_ms": None}


def test_a_run_shows_who_began_it_and_its_experiment_opens_on_runs(tmp_path):
    config = configuration(tmp_path)
    mlflow = client(tracking_uri(config))
    old = mlflow.create_experiment("pldr")  # as an older version of pldr made it
    run = opened(config)
    tags = mlflow.get_run(run.id).data.tags
    assert tags["mlflow.user"] and tags["mlflow.source.type"] == "LOCAL" and tags["mlflow.source.name"]
    assert tags["mlflow.source.git.commit"] == git_commit()
    assert mlflow.get_experiment(old).tags == {"mlflow.experimentKind": "custom_model_development"}
    assert run.page("http://h:5000/") == f"http://h:5000/#/experiments/{old}?workflowType=machine_learning"
    mlflow.set_experiment_tag(old, "mlflow.experimentKind", "genai_development")  # somebody's decision
    assert opened(config).id == run.id
    assert mlflow.get_experiment(old).tags["mlflow.experimentKind"] == "genai_development"
    new = mlflow.get_experiment(_experiment(mlflow, run.uri, "new", str(tmp_path / "artifacts")))
    assert new.tags["mlflow.experimentKind"] == "custom_model_development"


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["/venv/bin/pldr", "run", "configs/quickstart.yaml", "train.steps=5", "--json"], "pldr run quickstart.yaml"),
        (["/x/launch/cli.py", "train", "a.yaml", "tracking.uri=http://me:secret@host"], "pldr train a.yaml"),
        (["/venv/bin/pldr", "train", "a.yaml", "--anneal-from", "runs/a/checkpoints/step-000016"], "pldr train a.yaml"),
        (["/venv/bin/pldr", "run", "--resume", "runs/a", "--force", "b/a.yaml", "seed=2"], "pldr run a.yaml"),
        (["/usr/bin/pytest"], "pytest"),
    ],
)
def test_a_runs_source_is_the_command_without_its_values(argv, shown):
    assert command(argv) == shown


FIELDS = {"name": "x train", "digest": "f00d", "source_type": "local", "source": "{}", "schema": "{}", "profile": "{}"}


def test_data_sets_and_description_arrive_after_an_outage_and_once(tmp_path):
    away = configuration(tmp_path, tracking={"uri": "http://127.0.0.1:9"})
    run = opened(away)
    outbox.log_data_sets(run, {"training": FIELDS, "validation": {**FIELDS, "name": "x val"}})
    outbox.set_tags(run, {"mlflow.note.content": "PLDR-LLM in training"})
    here = configuration(tmp_path, tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"})
    outbox.replay(here, run.paths)
    run = opened(here)
    mlflow = client(run.uri)

    def shown():
        stored = mlflow.get_run(run.id)
        inputs = {(one.dataset.name, one.dataset.digest, one.tags[0].value) for one in stored.inputs.dataset_inputs}
        assert len(inputs) == len(stored.inputs.dataset_inputs)
        return stored.data.tags["mlflow.note.content"], inputs

    inputs = {("x train", "f00d", "training"), ("x val", "f00d", "validation")}
    assert shown() == ("PLDR-LLM in training", inputs)
    outbox.log_data_sets(run, {"training": FIELDS})  # a second start
    outbox.set_tags(run, {"mlflow.note.content": "PLDR-LLM: certified"})
    assert shown() == ("PLDR-LLM: certified", inputs)
    mlflow.set_tag(run.id, "mlflow.note.content", "the one for the paper")
    outbox.set_tags(run, {"mlflow.note.content": "PLDR-LLM: failed"})
    assert shown() == ("the one for the paper", inputs), "what a user wrote stays"


def test_a_server_that_knows_no_data_sets_takes_the_rest(tmp_path, monkeypatch):
    import mlflow
    from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

    def older(*_, **__):
        raise mlflow.MlflowException("no such endpoint", error_code=ENDPOINT_NOT_FOUND)

    monkeypatch.setattr(mlflow.MlflowClient, "log_inputs", older)
    run = opened(configuration(tmp_path))
    outbox.log_data_sets(run, {"training": FIELDS})
    assert outbox.settle(run, status="FINISHED")["complete"] and not (tmp_path / "logs" / "pending.json").exists()
    assert client(run.uri).get_run(run.id).info.status == "FINISHED"
