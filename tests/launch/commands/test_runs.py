"""`pldr runs` on a store with runs in it, and what wrong use of it and of `pldr track replay` looks like."""

import json
import shutil
from pathlib import Path

import pytest

from launch.cli import main
from pipeline.config.load import load_config
from pipeline.config.paths import RunPaths
from pipeline.io import storage
from pipeline.tracking import outbox
from pipeline.tracking.client import client, tracking_uri
from pipeline.tracking.run import open_run
from pipeline.tracking.sqlite_store import file_of, merge_log, uri_of


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_run):
    """Two runs in one store: the first certified by its tag, the second, newer and begun long ago, by its model version."""
    folder = tmp_path_factory.mktemp("runs")
    path = make_run(folder)
    first = load_config(path)
    uri = tracking_uri(first)
    second = load_config(path, [f"run_dir={folder / 'second'}", "name=second"])
    ids = []
    for config, loss in ((first, 2.0), (second, 3.0)):
        run = open_run(config, RunPaths(config.run_dir))
        ids.append(run.id)
        tracker = outbox.open_tracker(run)
        tracker.log(10, {"train/loss": loss + 1, "invariance/budget": 0.5})
        tracker.log(20, {"train/loss": loss, "val/loss_cached": loss + 0.5, "invariance/order_parameter_G": 1e-7})
        assert tracker.close("FINISHED" if config is first else None)
    mlflow = client(uri)
    mlflow.set_tag(ids[0], "pldr.verdict", "certified")
    mlflow.set_tag(ids[0], "pldr.checkpoints", "step-000010,step-000020")
    mlflow.delete_tag(ids[1], "pldr.local_id")
    mlflow.set_tag(ids[1], "pldr.continued_from", "/disk/runs/old/checkpoints/step-000010")
    committed = folder / "COMMITTED"
    committed.write_text("x")
    mlflow.log_artifact(ids[1], str(committed), "checkpoints/step-000020")
    mlflow.create_registered_model("pldr")
    mlflow.create_model_version("pldr", "file:///nowhere", run_id=ids[1], tags={"verdict": "failed"})
    mlflow.create_run(mlflow.get_experiment_by_name("pldr").experiment_id)  # not a training run
    return path, uri, ids


def test_the_table_has_every_run_newest_first(capsys, runs):
    path, uri, ids = runs
    code, out, errors = run(capsys, "runs", path, "--json")
    assert code == 0, errors
    rows = json.loads(out.splitlines()[-1])["runs"]
    assert [row["id"] for row in rows] == ids[::-1]
    newest, oldest = rows
    assert (oldest["name"], oldest["status"], oldest["step"], oldest["verdict"]) == (
        "tiny",
        "FINISHED",
        20,
        "certified",
    )
    assert (oldest["loss"], oldest["val_loss_cached"], oldest["order_parameter"]) == (2.0, 2.5, 1e-7)
    assert oldest["budget"] == 0.5 and oldest["checkpoints"] == ["step-000010", "step-000020"]
    assert newest["name"] == "second" and newest["status"] == "RUNNING" and newest["verdict"] == "failed"
    assert newest["checkpoints"] == ["step-000020"]
    header, second, first = out.splitlines()[:3]
    assert header.split()[:3] == ["run", "name", "status"]
    assert second.split()[-1] == "old/step-000010" and first.split()[-1] == "-"
    assert ids[1] in second and "10,20" in first and "1.0e-07" in first and "certified" in first
    assert json.loads(run(capsys, "runs", "--uri", uri, "--json")[1].splitlines()[-1])["runs"] == rows


def test_a_run_that_trains_on_has_no_verdict_yet(capsys, runs):
    """Training empties the tag; the registry still has the verdict on the model as it was."""
    _, uri, ids = runs
    client(uri).set_tag(ids[1], "pldr.verdict", "")
    _, out, _ = run(capsys, "runs", "--uri", uri, "--json")
    assert json.loads(out.splitlines()[-1])["runs"][0]["verdict"] is None
    client(uri).delete_tag(ids[1], "pldr.verdict")


def test_without_a_yaml_the_stores_in_runs_are_listed(capsys, caplog, runs, tmp_path, monkeypatch):
    """The shared one, and below it those of earlier versions' runs and of sweeps. One that is damaged is named."""
    path, uri, ids = runs
    (tmp_path / "runs" / "broken").mkdir(parents=True)
    (tmp_path / "runs" / "broken" / "mlflow.db").write_bytes(b"no database" * 1000)
    old = load_config(path, [f"run_dir={tmp_path / 'runs' / 'old'}", "name=old", "tracking.experiment=other"])
    old = old.model_copy(
        update={"tracking": old.tracking.model_copy(update={"uri": uri_of(Path(old.run_dir, "mlflow.db"))})}
    )
    old_id = open_run(old, RunPaths(old.run_dir)).id
    merge_log(file_of(uri))
    shutil.copy(file_of(uri), tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    code, out, errors = run(capsys, "runs", "--json")
    assert code == 0 and "broken/mlflow.db is damaged" in caplog.text, errors
    lines = out.splitlines()
    assert [row["id"] for row in json.loads(lines[-1])["runs"]] == [old_id, *ids[::-1]]
    assert [line.split()[-1] for line in lines[:4]] == ["experiment", "other", "pldr", "pldr"]
    assert lines[4:7] == [f"{n} of {uri_of(tmp_path / 'runs' / name)}"
                          for n, name in ((2, "mlflow.db"), (0, "broken/mlflow.db"), (1, "old/mlflow.db"))]  # fmt: skip
    code, out, errors = run(capsys, "report", old_id)
    assert code == 0 and "old" in (tmp_path / f"{old_id}.html").read_text(), errors
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri_of(tmp_path / "runs" / "old" / "mlflow.db"))
    assert [row["id"] for row in json.loads(run(capsys, "runs", "--json")[1].splitlines()[-1])["runs"]] == [old_id]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["runs"], 2, "name the YAML of a run, or --uri"),
        (["runs", "CONFIG", "--experiment", "absent"], 2, "experiment absent: not at"),
        (["runs", "--uri", "sqlite:////nowhere/mlflow.db"], 1, "/nowhere/mlflow.db: no such file"),
        (["runs", "--uri", "http://127.0.0.1:9"], 1, "start the server"),
        (["track", "replay", "/nowhere"], 2, "/nowhere: no such file"),
        (["track", "replay", "TMP"], 1, "no training was started"),
        (["track", "replay", "CONFIG", "run_dir=TMP/new"], 1, "nothing was trained here"),
    ],
)
def test_wrong_use_is_one_line(capsys, runs, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("CONFIG", str(runs[0])).replace("TMP", str(tmp_path)) for word in arguments]
    got, _, errors = run(capsys, *words)
    assert got == code and message in errors and "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("pldr: error: ")


def test_a_report_by_yaml_and_by_id(capsys, runs, tmp_path):
    path, uri, ids = runs
    code, out, errors = run(capsys, "report", path, "--json")
    assert code == 0, errors
    result = json.loads(out.splitlines()[-1])
    page = Path(result["report"]).read_text()
    assert result["step"] == 20 and result["train/loss"] == 2.0 and result["val/loss_cached"] == 2.5
    assert (
        page.count("<polyline") + page.count("<circle") >= 3
        and ids[0] in page
        and "certified" in page
        and "train.global_batch" in page
    )
    target = tmp_path / "second.html"
    code, _, errors = run(capsys, "report", ids[1], "--uri", uri, "--output", target)
    assert code == 0 and "second" in target.read_text(), errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "f" * 32], "--uri"),
        (["report", "f" * 32, "--uri", "URI"], "look at the id"),
        (["report", "/nowhere.yaml"], "no such file"),
    ],
)
def test_a_report_of_nothing_is_one_line(capsys, runs, tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run(capsys, *[runs[1] if word == "URI" else word for word in arguments])
    assert code in (1, 2) and message in errors and errors.count("\n") == 1


@pytest.mark.parametrize("way", ["copied", "renamed"])
def test_a_report_by_the_folder_of_a_run_that_was_copied_with_its_sweep(capsys, runs, tmp_path, way):
    """The store of a sweep's child is its parent's: a child's job names it by its old path."""
    path, uri, ids = runs
    sweep = tmp_path / "sweep"
    shutil.copytree(file_of(uri).parent, sweep)
    child = sweep / "children" / "second"
    config = load_config(path, [f"run_dir={child}", f"tracking.uri={uri_of(sweep / 'mlflow.db')}", "name=second"])
    record = json.loads((file_of(uri).parent / "second" / "run.json").read_text())
    begun = {"tracking_uri": uri_of(sweep / "mlflow.db"), "tags": {**record["tags"], "pldr.run_dir": str(child)}}
    storage.publish_json(child / "run.json", {key: v for key, v in {**record, **begun}.items() if key != "digest"})
    storage.publish_json(child / "logs" / "job.json", {"schema_version": 1, "config": config.as_dict()})
    other = tmp_path / "other"
    shutil.copytree(sweep, other)
    if way == "renamed":
        shutil.rmtree(sweep)
    before = {p: p.read_bytes() for p in sweep.rglob("*") if p.is_file()}
    code, out, errors = run(capsys, "report", other / "children" / "second", "--json")
    assert code == 0 and ids[1] in out + Path(json.loads(out.splitlines()[-1])["report"]).read_text(), errors
    assert before == {p: p.read_bytes() for p in sweep.rglob("*") if p.is_file()}
    assert sweep.exists() == (way == "copied")
    run_of_store = client(uri_of(other / "mlflow.db")).get_run(ids[1]).info
    assert run_of_store.artifact_uri.startswith(other.as_uri())


def test_a_report_makes_no_store(capsys, runs, tmp_path):
    code, _, errors = run(capsys, "report", "f" * 32, "--uri", f"sqlite:///{tmp_path}/new/mlflow.db")
    assert code == 1 and "mlflow.db: no such file" in errors and list(tmp_path.iterdir()) == []
