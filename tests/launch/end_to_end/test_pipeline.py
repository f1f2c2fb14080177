"""The whole pipeline as a user runs it: `pldr run`, killed in the middle of training, started again, used."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.cli import main
from pipeline.bench.contraction import __main__ as contraction
from pipeline.bundle.certificate.schema import read_certificate
from pipeline.config.load import load_config
from pipeline.tracking.client import client, tracking_uri
from pipeline.tracking.publish import published_checkpoints

PLDR = [sys.executable, "-m", "launch.cli"]


def pldr(*arguments):
    """The command line in this process, which saves the seconds of its imports; the killed run has its own process."""
    cwd = next((Path(word).parent for word in arguments if str(word).endswith(".yaml")), Path.cwd())
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in arguments])
    return code, out.getvalue(), err.getvalue()


def result_of(output):
    return json.loads(output.strip().splitlines()[-1])


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.05)


def workers_of(run_dir):
    """Processes whose command line names this run's job file."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if "pipeline.worker" in command and str(run_dir) in command:
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_run):
    """A run killed with -9 after its first checkpoints, and then finished by a second start."""
    folder = tmp_path_factory.mktemp("line")
    config = make_run(folder, profile_steps=[490, 491])
    run_dir = folder / "run"
    first = subprocess.Popen([*PLDR, "run", str(config)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(
        lambda: (run_dir / "checkpoints" / "step-000200" / "COMMITTED").exists() or first.poll() is not None,
        seconds=240,
    )
    assert first.poll() is None, first.stdout.read().decode()
    first.send_signal(signal.SIGKILL)
    first.wait()
    # No rank of the killed run keeps running: ranks end when their launcher is gone.
    wait_for(lambda: not workers_of(run_dir), seconds=30)
    data = {p.name: p.read_bytes() for p in (run_dir / "tokens").iterdir() if p.is_file()}
    code, output, errors = pldr("run", config, "--json")
    assert code == 0, errors + output[-3000:]
    return config, run_dir, output, data


def test_the_second_start_resumes_and_certifies(finished):
    _, run_dir, output, data = finished
    result = result_of(output)
    stages = result["stages"]
    assert result["certified"] is True
    assert [stages[name]["skipped"] for name in ("shard", "tokenizer", "tokenize", "train")] == [
        True,
        True,
        True,
        False,
    ]
    assert stages["train"]["result"]["resumed_from"] >= "step-000200"
    assert stages["train"]["result"]["tokens"] == 500 * 8 * 48
    assert {p.name: p.read_bytes() for p in (run_dir / "tokens").iterdir() if p.is_file()} == data
    assert "certificate: CERTIFIED" in output and "pldr generate" in output and "mlflow models serve" in output


def test_the_run_in_mlflow_has_no_gap_and_no_double(finished):
    path, _, output, _ = finished
    config = load_config(path)
    run_id = result_of(output)["run_id"]
    mlflow = client(tracking_uri(config))
    steps = [p.step for p in mlflow.get_metric_history(run_id, "train/loss")]
    assert sorted(steps) == list(range(10, 501, 10))
    run = mlflow.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params["train.metric_weight_decay"] == "40.0"
    for key in (
        "val/loss_block",
        "val/loss_cached",
        "val/leak_gap",
        "invariance/budget",
        "invariance/order_parameter_G",
    ):
        assert [p.step for p in sorted(mlflow.get_metric_history(run_id, key), key=lambda p: p.step)][-1] == 500
    assert run.data.metrics["invariance/order_parameter_G"] < 1e-5
    version = mlflow.get_model_version_by_alias("pldr", "certified")
    assert version.run_id == run_id and version.tags["checkpoint"] == "step-000500"
    names = {Path(item.path).name for item in mlflow.list_artifacts(run_id, "checkpoints")}
    assert names == {"step-000400", "step-000500"}
    names = {Path(item.path).name for item in mlflow.list_artifacts(run_id, "certificate")}
    assert names == {"certificate.json", "certificate.html"}
    assert len(mlflow.search_runs([run.info.experiment_id])) == 1


def test_the_run_in_mlflow_knows_its_nodes_and_has_the_trace(finished):
    path, run_dir, output, _ = finished
    run_id = result_of(output)["run_id"]
    mlflow = client(tracking_uri(load_config(path)))
    run = mlflow.get_run(run_id)
    assert run.data.tags["pldr.nodes"] == f"node-0 {socket.gethostname()}"
    assert run.data.metrics["system/node-0/memory_gb"] > 0 and run.data.metrics["system/rank_seconds_median"] > 0
    assert run.data.metrics["system/slowest_rank"] in (0, 1)
    folder = "profile/steps-000490-000491"
    assert {item.path for item in mlflow.list_artifacts(run_id, folder)} == {
        f"{folder}/rank-0.{end}" for end in ("json.gz", "txt")
    }
    assert {p.name for p in (run_dir / "logs" / folder).iterdir()} >= {"rank-0.json.gz", "rank-1.json.gz"}


def test_the_weights_of_its_checkpoints_explain_the_order_parameter(finished, tmp_path, capsys):
    """The exact Jacobians give A's deviation as it is in fp64, from a run directory wherever it lies."""
    _, run_dir, _, _ = finished
    out = tmp_path / "found.json"
    assert contraction.main([str(run_dir), "--sequences", "6", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["checkpoints"]
    assert [row["step"] for row in rows] == [400, 500] and len(capsys.readouterr().out.splitlines()) == 3
    for row in rows:
        table, layers = row["table"], row["layers"]
        assert len(layers) == 2 and all(len(layer["units"]) == 8 for layer in layers)
        assert table["Jacobian"] == pytest.approx(table["fp64"], rel=0.5) and table["a unit"] < 1
    assert 0 < rows[1]["table"]["A"] < 1e-3 and rows[1]["budget"] > rows[0]["budget"] > 9
    assert contraction.main([str(run_dir), "--checkpoint", "step-000007"]) == 1
    assert "--checkpoint step-000007: no run has it" in capsys.readouterr().err
    assert contraction.main([str(tmp_path)]) == 1 and "no run with a metric learner" in capsys.readouterr().err


def test_the_certificate_says_how_few_prompts_there_were_and_its_page_shows_the_training(finished):
    _, run_dir, output, _ = finished
    certificate = read_certificate(run_dir / "certificate" / "certificate.json")
    last = output[output.index("\ntotal ") :]
    assert 0 < last.index(f"certificate {run_dir / 'certificate' / 'certificate.html'}") < last.index("\nbundle ")
    assert certificate["measures"]["losses"]["zero"] > certificate["measures"]["losses"]["cached"] + 0.05
    assert "judged by 8 held-out prompts only" in certificate["statement"]
    assert certificate["controls"]["untrained"]["relative_deviation_g"] > 1e-2
    page = (run_dir / "certificate" / "certificate.html").read_text()
    assert "Certified: G_LM may be cached" in page and "invariance/order_parameter_G" in page
    assert page.count("no cache: G_LM deduced again for every token") == 6  # three prompts, drawn two ways


def test_a_checkpoint_of_another_model_is_not_validated(finished):
    path, _, _, _ = finished
    code, _, errors = pldr("validate", path, "model.A_dff=8")
    assert code == 2 and "a checkpoint of another model: its A_dff is 16" in errors
    code, output, errors = pldr("validate", path, "--json")
    assert code == 0 and result_of(output)["skipped"] is True, errors  # nothing was lost


@pytest.mark.slow
def test_two_ranks_validate_to_the_verdict_of_one(finished, tmp_path):
    path, run_dir, _, _ = finished
    copy = tmp_path / "copy" / run_dir.name
    shutil.copytree(run_dir.parent, copy.parent)  # with MLflow's store
    code, _, errors = pldr("validate", path, "--force", "post.ranks=2", f"run_dir={copy}")
    assert code == 0, errors
    one, two = (read_certificate(folder / "certificate" / "certificate.json") for folder in (run_dir, copy))
    assert (one["verdict"], one["tier"], one["prompts"]) == (two["verdict"], two["tier"], two["prompts"])
    assert two["measures"]["losses"]["block"] == pytest.approx(one["measures"]["losses"]["block"], rel=1e-5)
    (copy / "weights" / "model.safetensors").write_bytes(b"")
    code, _, errors = pldr("validate", path, "--force", "post.ranks=2", f"run_dir={copy}")
    assert code == 1 and "model.safetensors" in errors and "Traceback" not in errors


def test_a_third_start_does_nothing_again(finished):
    path, _, output, _ = finished
    code, again, errors = pldr("run", path, "--json")
    assert code == 0, errors
    assert all(stage["skipped"] for stage in result_of(again)["stages"].values())
    assert result_of(again)["bundle_sha256"] == result_of(output)["bundle_sha256"]


def test_generate_and_pyfunc_say_the_same(finished):
    path, run_dir, _, _ = finished
    code, output, errors = pldr(
        "generate", run_dir / "bundle", "--prompt", "ab", "--prompt", "abc de", "--max-new-tokens", 12, "--json"
    )
    assert code == 0, errors
    completions = result_of(output)["completions"]
    script = (
        "import mlflow, json, sys; mlflow.set_tracking_uri(sys.argv[1]);"
        "m = mlflow.pyfunc.load_model('models:/pldr@certified');"
        "print(json.dumps(m.predict(['ab', 'abc de'], params={'max_new_tokens': 12})))"
    )
    uri = tracking_uri(load_config(path))
    done = subprocess.run([sys.executable, "-c", script, uri], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == completions and all(completions)


def test_a_prompt_over_the_context_is_one_line(finished):
    _, run_dir, _, _ = finished
    code, _, errors = pldr("generate", run_dir / "bundle", "--prompt", "ab " * 400)
    assert code in (1, 2) and "context" in errors and "Traceback" not in errors


@pytest.mark.slow
def test_a_resume_from_mlflow_alone_is_bit_equal(finished, tmp_path):
    """Another run directory, as on another machine: weights, position and metrics come from the MLflow run."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    path, run_dir, output, _ = finished
    uri = tracking_uri(load_config(path))
    run_id = result_of(output)["run_id"]
    mlflow = client(uri)
    # The last checkpoint of the straight run is removed, so that the last hundred steps have to be trained again.
    get_artifact_repository(mlflow.get_run(run_id).info.artifact_uri).delete_artifacts("checkpoints/step-000500")
    other = [f"run_dir={tmp_path / 'other'}", f"tracking.uri={uri}"]
    for stage in ("shard", "tokenizer", "tokenize"):
        code, _, errors = pldr(stage, path, *other)
        assert code == 0, errors
    code, output, errors = pldr("train", path, *other, "--resume", run_id, "--json")
    assert code == 0, errors
    assert "step-000400 fetched from MLflow run" in output
    assert result_of(output)["result"]["resumed_from"] == "step-000400"
    code, output, errors = pldr("consolidate", path, *other, "--json")
    assert code == 0, errors
    weights = (run_dir / "weights" / "model.safetensors").read_bytes()
    assert (tmp_path / "other" / "weights" / "model.safetensors").read_bytes() == weights
    steps = [p.step for p in mlflow.get_metric_history(run_id, "train/loss")]
    assert sorted(steps) == list(range(10, 501, 10))
    assert published_checkpoints(uri, run_id) == ["step-000500", "step-000400"]
    code, _, errors = pldr("train", path, *other, "seed=2", "--resume", run_id)
    assert code == 2 and "was made with seed=1" in errors


def test_other_data_under_a_trained_run_is_refused(finished):
    path, run_dir, _, _ = finished
    code, _, errors = pldr("tokenize", path, "tokens.remainder=pad")
    assert code == 2 and "--replace" in errors and "step-000500" in errors
    code, _, errors = pldr("tokenize", path, "tokens.remainder=pad", "--replace")
    assert code == 0, errors
    code, _, errors = pldr("train", path, "tokens.remainder=pad")
    assert code == 2 and "tokens.remainder" in errors and "use another run_dir" in errors
    os.rename(run_dir / "run.json", run_dir / "run.json.away")  # a new MLflow run does not help either
    try:
        code, _, errors = pldr("train", path, "tokens.remainder=pad")
        assert code == 2 and "belongs to MLflow run" in errors and "use another run_dir" in errors
    finally:
        os.rename(run_dir / "run.json.away", run_dir / "run.json")
    code, _, errors = pldr("tokenize", path, "--replace")
    assert code == 0, errors
    code, _, errors = pldr("train", path)
    assert code == 0, errors


@pytest.mark.slow
def test_a_corrupted_checkpoint_falls_back_loudly(finished):
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    path, run_dir, output, _ = finished
    run = client(tracking_uri(load_config(path))).get_run(result_of(output)["run_id"])
    get_artifact_repository(run.info.artifact_uri).delete_artifacts("checkpoints/step-000500")  # else it is fetched
    newest = run_dir / "checkpoints" / "step-000500"
    victim = next((newest / "step-000500").glob("*model_states.pt"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    code, _, errors = pldr("consolidate", path, "--force")
    assert code == 1 and "sha256 differs" in errors and "Traceback" not in errors
    code, output, errors = pldr("train", path, "--force", "--json")
    assert code == 0, errors
    assert "step-000500 is damaged and left out" in output
    assert (run_dir / "checkpoints" / ".damaged-step-000500").is_dir()
    assert result_of(output)["result"]["resumed_from"] == "step-000400"
    code, _, errors = pldr("consolidate", path, "--force")
    assert code == 0, errors


@pytest.mark.slow
def test_a_corrupted_token_tar_stops_training_with_its_name(finished, tmp_path):
    path, run_dir, _, _ = finished
    tar = next((run_dir / "tokens").glob("train-*.tar"))
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(bytes(data))
    try:
        code, _, errors = pldr("train", path, "--force", "train.steps=600")
        assert code == 2 and "was made with train.steps=500" in errors
        for checkpoint in (run_dir / "checkpoints").iterdir():
            (checkpoint / "COMMITTED").unlink()
        os.rename(run_dir / "run.json", run_dir / "run.json.away")
        code, _, errors = pldr("train", path, "--force")
        assert code == 1 and tar.name in errors and "sha256" in errors and "Traceback" not in errors
    finally:
        data[len(data) // 2] ^= 1
        tar.write_bytes(bytes(data))


@pytest.mark.slow
def test_a_failed_certificate_is_exit_3_and_can_be_packaged_marked(tmp_path, make_run):
    path = make_run(tmp_path, steps=20, warmup_steps=2, metric_weight_decay=0.1, validate_every=20, checkpoint_every=20)
    code, output, errors = pldr("run", path, "train.ranks=1", "--json")
    assert code == 3 and "relative_deviation_g" in errors and "metric_weight_decay" in errors
    assert "relative_deviation_g" in {failure["measure"] for failure in result_of(output)["failed"]}
    assert not (tmp_path / "run" / "bundle").exists()
    code, _, errors = pldr("bundle", path, "train.ranks=1")
    assert code == 3 and "--uncertified" in errors
    code, output, errors = pldr("bundle", path, "train.ranks=1", "--uncertified", "--json")
    assert code == 0, errors
    assert result_of(output)["result"]["certified"] is False
    bundle = tmp_path / "run" / "bundle"
    for name in ("config.json", "certificate.json", "MANIFEST.json", "README.md"):
        assert (
            "uncertified" in (bundle / name).read_text().lower() or '"certified": false' in (bundle / name).read_text()
        )
    mlflow = client(tracking_uri(load_config(path)))
    assert [v.aliases for v in mlflow.search_model_versions("name='pldr'")] == [[]]


@pytest.mark.slow
def test_a_frozen_run_is_certified_as_constant_and_bundled(tmp_path, make_run):
    path = make_run(tmp_path, freeze_g={"at_step": 400, "sequences": 16}, ranks=1)
    code, output, errors = pldr("run", path, "--json")
    assert code == 0, errors + output[-3000:]
    assert result_of(output)["certified"] is True
    certificate = read_certificate(tmp_path / "run" / "certificate" / "certificate.json")
    assert certificate["constant_by_construction"] and certificate["model"]["g_source"] == "file"
    code, output, errors = pldr("generate", tmp_path / "run" / "bundle", "--prompt", "ab", "--json")
    assert code == 0 and result_of(output)["completions"], errors
    code, output, errors = pldr("run", path, "--json")
    assert code == 0 and all(stage["skipped"] for stage in result_of(output)["stages"].values()), errors
    code, _, errors = pldr("train", path, "train.freeze_g=null", "--force")
    assert (
        code == 2 and "its G is frozen; set train.freeze_g.become to constant" in errors and "Traceback" not in errors
    )
