"""`pldr data report | verify | show` on a finished run, as a user calls them; what wrong use looks like."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from launch.cli import main
from pipeline.config.load import load_config
from pipeline.config.paths import RunPaths
from pipeline.tracking import outbox
from pipeline.tracking.client import client, tracking_uri
from pipeline.tracking.run import open_run


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def config(tmp_path_factory, make_run) -> Path:
    """The YAML of a run whose data stages are done."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        path = make_run(folder)
        for stage in ("shard", "tokenizer", "tokenize"):
            assert main([stage, str(path)]) == 0
    return path


@pytest.fixture(autouse=True)
def there(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config.parent)  # sources are relative


def test_a_report_is_no_run_and_goes_to_the_training_run(capsys, config: Path) -> None:
    code, out, errors = run(capsys, "data", "report", config, "--json")
    assert code == 0, errors
    result = json.loads(out.splitlines()[-1])
    page = config.parent / "run" / "report" / "data.html"
    assert result["report"] == str(page) and page.read_text().startswith("<!doctype html>") and result["tokens"] > 0
    settings = load_config(config)
    paths = RunPaths(settings.run_dir)
    assert result["run_id"] is None and not (paths.root / "run.json").exists()
    training = open_run(settings, paths)
    outbox.set_tags(training, {"x": "y"})  # as a start of training does
    mlflow = client(tracking_uri(settings))
    assert [file.path for file in mlflow.list_artifacts(training.id, "data")] == ["data/data.html"]
    experiment = mlflow.get_run(training.id).info.experiment_id
    assert [one.info.run_id for one in mlflow.search_runs([experiment])] == [training.id]
    later = json.loads(run(capsys, "data", "report", config, "--json")[1].splitlines()[-1])
    assert later["run_id"] == training.id and not (paths.logs / "pending.json").exists()
    assert mlflow.get_run(training.id).info.status == "RUNNING", "a report does not end a training"


def test_a_report_survives_a_dead_server(capsys, config: Path) -> None:
    options = ("tracking.uri=http://127.0.0.1:9", "--json")
    code, out, _ = run(capsys, "data", "report", config, *options)
    assert code == 0 and json.loads(out.splitlines()[-1])["run_id"] is None


def test_verify_takes_a_configuration_or_a_folder_and_names_damage(capsys, config: Path) -> None:
    code, out, errors = run(capsys, "data", "verify", config, "--json")
    assert code == 0, errors
    result = json.loads(out.splitlines()[-1])
    assert result["tokens"]["documents_fingerprint"] == result["documents"]["fingerprint"] and result["files"] > 4
    tokens = config.parent / "run" / "tokens"
    code, out, _ = run(capsys, "data", "verify", tokens / "index.json")
    assert code == 0 and "all checksums match" in out and out.endswith("files checked, none damaged\n")
    shard = next(tokens.glob("train-*.tar"))
    good = shard.read_bytes()
    try:
        shard.write_bytes(good[:-600] + b"x" + good[-599:])
        code, out, errors = run(capsys, "data", "verify", config, "--json")
        assert code == 1 and shard.name in errors and errors.count("\n") == 1
        assert json.loads(out.splitlines()[-1])["exit_code"] == 1
    finally:
        shard.write_bytes(good)


def test_show_prints_a_sequence_and_where_it_is(capsys, config: Path) -> None:
    tokens = config.parent / "run" / "tokens"
    code, out, errors = run(capsys, "data", "show", tokens, 3, "--ids", "--json")
    assert code == 0, errors
    result = json.loads(out.splitlines()[-1])
    assert result["sequence"] == 3 and result["split"] == "train" and len(result["ids"]) == 49
    assert re.match(rf"train 3 of {result['of']:,} \(train-000000.tar, block 0, row 3\), 49 tokens\n", out)
    assert " ".join(map(str, result["ids"])) in out
    assert run(capsys, "data", "show", config, 3)[1] in out, "a configuration shows the same"
    marks = [run(capsys, "data", "show", config, n, "--split", "val")[1].count("⏎ end of document") for n in range(60)]
    assert sum(marks) > 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["data", "show", "run/tokens", "1000000"], 1, "the train split has sequences 0 to"),
        (["data", "show", "run/tokens", "0", "--split", "best"], 1, "no split 'best'"),
        (["data", "show", "nowhere", "0"], 1, "run `pldr tokenize` first"),
        (["data", "verify", "nowhere"], 1, "contains no index.json"),
        (["data", "verify", "run/tokens", "seed=2"], 2, "goes with the YAML"),
        (["data", "report", "nowhere.yaml"], 2, "no such file"),
        (["data", "report", "tiny.yaml", "run_dir=other"], 1, "run `pldr shard` first"),
        (["bench", "data", "--text", "nowhere.txt"], 1, "nowhere.txt"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments: list[str], code: int, message: str) -> None:
    found, _, errors = run(capsys, *arguments)
    assert (found, errors.count("\n")) == (code, 1) and message in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data", "--help"], ["report", "verify", "show"]),
        (["bench", "--help"], ["[CONFIG]|evaluate", "|data|", "--text", "--steps"]),
    ],
)
def test_help_explains(capsys, arguments: list[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    shown = capsys.readouterr().out
    assert end.value.code == 0 and all(word in shown for word in words)
