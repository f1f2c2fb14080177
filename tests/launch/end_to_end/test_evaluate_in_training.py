"""`train.evaluate` as a user runs it: real ranks, lm-eval over documents made here, kills, and a data folder that is broken."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.config.paths import RunPaths
from pipeline.tracking.client import client, tracking_uri
from pipeline.tracking.run import known_run
from tests.pipeline.inference.evaluate.small import write_documents

PLDR = [sys.executable, "-m", "launch.cli"]
TASKS = ["arc_easy", "winogrande"]
STEPS = [200, 400, 600]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def pldr(folder, *words, **options):
    return subprocess.run([*PLDR, *words], cwd=folder, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, make_run):
    """Documents for evaluations, and a run that has its tokens."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_documents(folder / "data")
    evaluate = {"every": 200, "tasks": TASKS, "limit": 5, "data": str(folder / "data")}
    make_run(folder, ranks=2, steps=STEPS[-1], checkpoint_every=100, keep_checkpoints=2, evaluate=evaluate)
    for stage in ("shard", "tokenizer", "tokenize"):
        done = pldr(folder, stage, "tiny.yaml")
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run_in(prepared, tmp_path):
    """`run_in(*overrides)`: the words of a training with its own run directory, which uses the tokens that are there."""

    def words(*overrides):
        return ("train", "tiny.yaml", f"run_dir={tmp_path / 'run'}", f"data.of={prepared / 'run'}", *overrides)

    return words


def evaluations_of(run_dir):
    """Process ids of the evaluations of a run directory."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            if entry.name.isdigit() and "pipeline.stages.evaluate" in words and str(run_dir) in words:
                found.append(int(entry.name))
    return found


def wait_for(condition, process, seconds=900):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "timeout"
        time.sleep(0.05)


def scores(prepared, words):
    """Metric -> steps, of what MLflow has."""
    config = load_config(prepared / "tiny.yaml", [word for word in words if "=" in word])
    run = known_run(config, RunPaths(config.run_dir))
    mlflow = client(tracking_uri(config))
    metrics = [metric for metric in mlflow.get_run(run.id).data.metrics if metric.startswith("eval/")]
    return {metric: sorted(p.step for p in mlflow.get_metric_history(run.id, metric)) for metric in metrics}


def test_a_killed_evaluation_is_one_line_and_the_last_one_is_waited_for(prepared, run_in, tmp_path):
    words = run_in()
    training = subprocess.Popen(
        [*PLDR, *words], cwd=prepared, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(lambda: evaluations_of(tmp_path / "run"), training)
    [pid] = evaluations_of(tmp_path / "run")
    wait_for(lambda: os.getpriority(os.PRIO_PROCESS, pid) == 19, training)
    os.kill(pid, signal.SIGKILL)
    output, _ = training.communicate(timeout=900)
    assert training.returncode == 0, output
    assert output.count("the evaluation of step-000200 failed: signal SIGKILL") == 1
    assert "evaluated step-000600: arc_easy/acc" in output and not evaluations_of(tmp_path / "run")
    found = scores(prepared, words)
    assert {f"eval/{task}/{metric}" for task in TASKS for metric in ("acc", "acc_stderr", "acc_live", "n")} <= set(
        found
    )
    assert found["eval/arc_easy/acc"][-1] == 600 and 200 not in found["eval/arc_easy/acc"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if "200" in path.name] == []
    assert not list((tmp_path / "run" / "evaluations").glob("*/model"))
    report = pldr(prepared, "report", "tiny.yaml", *words[2:])
    assert report.returncode == 0 and "Benchmarks: questions" in (tmp_path / "run/report/training.html").read_text()


def test_a_broken_data_folder_does_not_stop_training(prepared, run_in, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "arc_easy.jsonl").write_text("no JSON\n")
    (tmp_path / "broken" / "winogrande.jsonl").mkdir()
    words = run_in(f"train.evaluate.data={tmp_path / 'broken'}", "train.steps=200")
    check = pldr(prepared, "check", *words[1:])
    assert check.returncode == 2 and "winogrande: no documents; looked for" in check.stderr
    done = pldr(prepared, *words)
    assert done.returncode == 0, done.stderr
    assert "the evaluation of step-000200 failed: winogrande: no documents; looked for" in done.stdout
    assert "Traceback" not in done.stdout and scores(prepared, words) == {}


def test_a_killed_training_leaves_no_evaluation_and_a_resumed_one_makes_it(prepared, run_in, tmp_path):
    words, run_dir = run_in("train.steps=400"), tmp_path / "run"
    first = subprocess.Popen([*PLDR, *words], cwd=prepared, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: evaluations_of(run_dir), first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    end = time.monotonic() + 60
    while evaluations_of(run_dir):
        assert time.monotonic() < end
        time.sleep(0.1)
    done = pldr(prepared, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("evaluated step-000200: arc_easy/acc") == 1
    found = scores(prepared, words)["eval/arc_easy/acc"]
    assert found == [200, 400]
    again = pldr(prepared, *words, "--force")
    assert again.returncode == 0 and "evaluated" not in again.stdout
