"""`pldr evaluate`, from the command line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from pipeline.config.load import load_config
from pipeline.config.paths import RunPaths
from pipeline.tracking.client import client
from pipeline.tracking.run import open_run
from tests.helpers.exports import write_export
from tests.pipeline.inference.evaluate.small import write_documents


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("data"))


def evaluate(capsys: Any, *words: Any) -> tuple[int, dict[str, Any], str]:
    code = main(["evaluate", *map(str, words), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.out


def test_a_bundle_is_scored_into_the_working_directory(
    capsys: Any, make_bundle: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle("mine")
    before = sorted(bundle.iterdir())
    monkeypatch.chdir(tmp_path)
    code, result, out = evaluate(capsys, bundle, "--data", data, "--tasks", "arc_easy,lambada_openai", "--limit", 4)
    assert code == 0 and list(result["tasks"]) == ["arc_easy", "lambada_openai"] and result["certified"]
    assert {"cached", "live", "difference", "stderr", "n"} <= set(result["tasks"]["arc_easy"])
    assert result["tasks"]["arc_easy"]["n"] == 4 and result["limit"] == 4
    assert result["page"] == str(tmp_path / "evaluation-mine" / "evaluation.html") and Path(result["page"]).is_file()
    assert "only the first 4 items of each task were scored" in out and sorted(bundle.iterdir()) == before


def test_a_bundle_with_its_metric_learner_is_scored_live(
    capsys: Any, make_bundle: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    bundle = make_bundle(with_metric_learner=True)
    code, result, _ = evaluate(capsys, bundle, "--data", data, "--tasks", "winogrande", "--out", tmp_path / "out")
    one = result["tasks"]["winogrande"]
    assert code == 0 and result["no_live"] is None
    assert one["live"] == one["cached"] and one["changed"] == 0 and 0 < one["max_logprob_difference"] < 1e-4


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--tasks", "piqa"], 1, "piqa: no documents; looked for"),
        (["--tasks", ","], 2, "names of tasks, separated by commas"),
        (["--tasks", "winogrande", "--out", "BUNDLE/out"], 2, "inside the folder of the model"),
        (["--tasks", "winogrande", "train.steps=1"], 2, "only a run's YAML takes overrides"),
    ],
)
def test_wrong_use_is_one_line(
    capsys: Any, make_bundle: Callable[..., Path], data: Path, words: list[str], code: int, message: str
) -> None:
    bundle = make_bundle()
    words = [word.replace("BUNDLE", str(bundle)) for word in words]
    got, result, _ = evaluate(capsys, bundle, "--data", data, *words)
    assert got == code and message in result["error"] and not (bundle / "out").exists()


def test_scores_do_not_go_into_another_models_folder(
    capsys: Any, make_bundle: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    bundle = make_bundle()
    other = shutil.copytree(bundle, tmp_path / "other")
    for out in (other, other / "out"):
        code, result, _ = evaluate(capsys, bundle, "--data", data, "--tasks", "winogrande", "--out", out)
        assert code == 1 and "name another folder" in result["error"] and not (other / "answers.jsonl").exists()


@pytest.mark.parametrize("limit", ["0", "-3", "1.5", "many"])
def test_a_limit_is_a_number_of_items(capsys: Any, limit: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "x", "--limit", limit])
    assert stop.value.code == 2 and "a number of items" in capsys.readouterr().err


def test_a_task_that_failed_fails_the_command_after_the_others(
    capsys: Any, make_bundle: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "winogrande.jsonl").write_bytes((data / "winogrande.jsonl").read_bytes())
    (folder / "piqa.jsonl").write_text("[]\n")
    words = ["--data", folder, "--tasks", "piqa,winogrande", "--out", tmp_path / "out"]
    code, result, _ = evaluate(capsys, make_bundle(), *words)
    assert code == 1 and list(result["tasks"]) == ["winogrande"] and "not the documents of piqa" in result["error"]
    assert "winogrande" in json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]


def test_a_run_is_scored_live_beside_its_other_pages(
    capsys: Any, make_finished: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    path = make_finished()
    code, result, _ = evaluate(capsys, path, "--uri", "http://host")
    assert code == 2 and "a run's scores go to its own store" in result["error"]
    code, result, _ = evaluate(capsys, path, "--data", data, "--tasks", "winogrande")
    one = result["tasks"]["winogrande"]
    assert code == 0 and result["out"] == str(tmp_path / "finished" / "evaluation")
    assert one["live"] == one["cached"] and (one["difference"], one["stderr"], one["changed"]) == (0, 0, 0)
    assert "../certificate/certificate.html" in Path(result["page"]).read_text(encoding="utf-8")


@pytest.mark.slow
def test_an_export_has_the_scores_of_its_bundle(
    capsys: Any, make_bundle: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    bundle = make_bundle()
    found, perplexities = [], []
    for source in (bundle, write_export(bundle, tmp_path / "export")):
        words = ["--data", data, "--tasks", "arc_easy,lambada_openai", "--out", tmp_path / f"{source.name}-scores"]
        code, result, _ = evaluate(capsys, source, *words)
        assert code == 0 and result["certified"]
        found.append({task: (one["cached"], one["n"]) for task, one in result["tasks"].items()})
        perplexities.append(result["tasks"]["lambada_openai"]["metrics"]["perplexity"]["cached"])
    assert found[0] == found[1] and perplexities[0] == pytest.approx(perplexities[1], rel=1e-5)


@pytest.mark.slow
def test_the_mlflow_run_of_a_run_gets_the_scores(
    capsys: Any, make_finished: Callable[..., Path], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_finished(step=7)
    config = load_config(path, [])
    paths = RunPaths(config.run_dir)
    run = open_run(config, paths)
    words = ["--data", data, "--tasks", "winogrande"]
    code, result, _ = evaluate(capsys, path, *words)
    one = result["tasks"]["winogrande"]
    logged = client(run.uri).get_run(run.id)
    assert code == 0 and logged.data.metrics["eval/winogrande/acc_live"] == one["live"]
    assert [point.step for point in client(run.uri).get_metric_history(run.id, "eval/winogrande/n")] == [7]
    assert {file.path for file in client(run.uri).list_artifacts(run.id, "evaluation")} == {
        "evaluation/results.json", "evaluation/evaluation.html", "evaluation/table.json",
    }  # fmt: skip
    assert run.id in Path(result["page"]).read_text(encoding="utf-8")

    shutil.copytree(paths.root, tmp_path / "copy")  # its scores are not the original's
    code, result, _ = evaluate(capsys, path, f"run_dir={tmp_path / 'copy'}", *words, "--limit", 3)
    assert code == 0 and result["out"] == str(tmp_path / "copy" / "evaluation")
    assert "the scores will not be in MLflow" in caplog.text and "is a copy of" in caplog.text
    assert client(run.uri).get_run(run.id).data.metrics["eval/winogrande/n"] == one["n"]


def test_a_missing_package_is_one_line(
    capsys: Any, make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, result, _ = evaluate(capsys, make_bundle())
    assert code == 2 and result["error"] == "lm_eval is not installed; pip install 'pldr[eval]'"
