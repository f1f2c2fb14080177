"""Every task with the cached G_LM and live; a kill in the middle; what a model that is not invariant shows."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.inference.evaluate import adapter, run
from pipeline.inference.evaluate.table import table
from tests.pipeline.inference.evaluate import killed_worker
from tests.pipeline.inference.evaluate.small import NUM

TASKS = ["arc_easy", "social_iqa", "winogrande", "truthfulqa_mc1", "truthfulqa_mc2", "lambada_openai"]


@pytest.fixture(scope="module")
def invariant_results(tokenizer_path: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    opened = killed_worker.open_tiny(tokenizer_path)
    return run.evaluate(opened, TASKS, out=tmp_path_factory.mktemp("out"), data=data, report=lambda _: None)


def test_scores_of_an_invariant_model_do_not_change(invariant_results: dict[str, Any]) -> None:
    found = invariant_results["tasks"]
    assert list(found) == TASKS and invariant_results["complete"] and not invariant_results["failed"]
    for one in found.values():
        assert one["n"] == NUM and one["changed"] == 0 and one["leak_gain"] is None
        assert one["live"] is not None and one["difference"] == pytest.approx(0, abs=1e-6)
        assert one["stderr"] == pytest.approx(0, abs=1e-6) and one["max_logprob_difference"] < 1e-4
    assert invariant_results["leak"] is None and invariant_results["no_live"] is None


def test_metrics_are_all_there(invariant_results: dict[str, Any]) -> None:
    found = invariant_results["tasks"]
    assert set(found["arc_easy"]["metrics"]) == set(found["social_iqa"]["metrics"]) == {"acc", "acc_norm", "acc_bytes"}
    assert (found["arc_easy"]["metric"], found["winogrande"]["metric"]) == ("acc_bytes", "acc")
    assert set(found["lambada_openai"]["metrics"]) == {"acc", "perplexity"}
    assert found["arc_easy"]["cached"] == found["arc_easy"]["metrics"]["acc_bytes"]["cached"]
    assert [round(found[task]["chance"], 4) for task in TASKS] == [0.3333, 0.3333, 0.5, 0.5, 0.6667, 0.0]
    assert found["truthfulqa_mc1"]["cut_contexts"] == found["truthfulqa_mc1"]["requests"] == 2 * NUM


def test_bytes_and_characters_differ_where_an_answer_is_not_ascii(
    invariant_results: dict[str, Any], data: Path
) -> None:
    """`ééé` has 3 characters and 6 bytes: per byte its log-likelihood weighs half."""
    from lm_eval.api.task import ConfigurableTask

    from pipeline.inference.evaluate import tasks

    (one,) = tasks.find(["arc_easy"], data)
    task: ConfigurableTask = tasks.load(one, data / "work")
    document = task.eval_docs[0]
    assert task.doc_to_choice(document) == ["fox", "ééé", "the fox quick"]
    found = task.process_results(document, [(-3.0, False), (-5.0, False), (-99.0, False)])
    assert (found["acc_norm"], found["acc_bytes"]) == (1.0, 0.0)  # fox: -1 each; ééé: -1.67 a character, -0.83 a byte


def test_a_task_is_scored_as_lm_eval_does_it(
    invariant_results: dict[str, Any], opened: Callable[..., Any], data: Path
) -> None:
    """The same numbers as by hand: log-likelihoods of a full pass each, for one task."""
    import torch

    model = opened()
    right = 0
    for line in (data / "winogrande.jsonl").read_text().splitlines():
        document = json.loads(line)
        scores = []
        for option in (document["option1"], document["option2"]):
            context = model.tokenizer.encode(f"the {document['option1']} and {option}")
            ids = model.tokenizer.encode(f"the {document['option1']} and {option} jump over")
            with torch.no_grad():
                logprobs = model.model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
            scores.append(sum(float(logprobs[i - 1, ids[i]]) for i in range(len(context), len(ids))))
        right += scores[0] > scores[1]
    assert invariant_results["tasks"]["winogrande"]["cached"] == right / NUM


def test_a_model_that_is_not_invariant_leaks(opened: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    found = run.evaluate(opened(gain=1.0, certified=False), ["arc_easy"], out=tmp_path, data=data, report=lines.append)
    one = found["tasks"]["arc_easy"]
    assert one["max_logprob_difference"] > 0.1
    assert one["leak_gain"] == one["live"] - one["cached"] == -one["difference"]
    assert "leak" in found["leak"] and any("leak" in line for line in table(found))


def test_without_a_metric_learner_there_is_no_live_score(
    opened: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    found = run.evaluate(opened(live=False), ["arc_easy"], out=tmp_path, data=data, report=lambda _: None)
    one = found["tasks"]["arc_easy"]
    assert one["live"] is one["difference"] is one["stderr"] is one["leak_gain"] is None and one["cached_stderr"] > 0
    assert "no metric learner" in found["no_live"] and any("no live scores" in line for line in table(found))


@pytest.mark.slow
def test_a_kill_loses_no_scored_chunk_and_changes_no_number(
    tokenizer_path: Path, data: Path, opened: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        sys.executable,
        "-m",
        killed_worker.__name__,
        str(tokenizer_path),
        str(data),
        str(tmp_path / "killed"),
        "5",
    ]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    before = (tmp_path / "killed" / run.ANSWERS).read_bytes()
    assert before.count(b"\n") == 5 and not (tmp_path / "killed" / "results.json").exists()
    monkeypatch.setattr(adapter, "CHUNK_TOKENS", 200)

    def evaluate(out: str) -> dict[str, Any]:
        names = ["arc_easy", "winogrande"]
        found = run.evaluate(opened(), names, out=tmp_path / out, data=data, report=lambda _: None)
        return {**found, "seconds": None}

    resumed = evaluate("killed")
    after = (tmp_path / "killed" / run.ANSWERS).read_bytes()
    assert after.startswith(before) and resumed == evaluate("whole")
    assert after == (tmp_path / "whole" / run.ANSWERS).read_bytes()
    assert resumed == evaluate("killed") and (tmp_path / "killed" / run.ANSWERS).read_bytes() == after


def test_other_inputs_never_mix(opened: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    def evaluate(model: Any, **settings: Any) -> dict[str, Any]:
        found = run.evaluate(model, ["winogrande"], out=tmp_path, data=data, report=lambda _: None, **settings)
        return found["tasks"]["winogrande"]

    whole, few, other = evaluate(opened()), evaluate(opened(), limit=3), evaluate(opened(seed=1))
    assert (whole["n"], few["n"]) == (NUM, 3) and whole["data_sha256"] != few["data_sha256"]
    assert whole["definition_sha256"] == few["definition_sha256"]
    assert other["metrics"] != whole["metrics"] and evaluate(opened()) == whole
    changed = replace(opened(), g_lm=opened().g_lm + 1)
    assert run._asker(changed, "cached") != run._asker(opened(), "cached")
    assert run._asker(changed, "live") == run._asker(opened(), "live")


def test_items_whose_answer_does_not_fit_are_left_out_and_counted(opened: Callable[..., Any], tmp_path: Path) -> None:
    short = {"goal": "a", "sol1": "fox", "sol2": "dog", "label": 0}
    long = {"goal": "a", "sol1": "fox " * 40, "sol2": "dog", "label": 0}

    def evaluate(*documents: dict[str, Any]) -> dict[str, Any]:
        (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
        return run.evaluate(opened(), ["piqa"], out=tmp_path / "out", data=tmp_path, report=lambda _: None)

    found, fitting = evaluate(short, long, short), evaluate(short, short)
    one = found["tasks"]["piqa"]
    assert (one["n"], one["left_out"]) == (2, 1) and one["metrics"] == fitting["tasks"]["piqa"]["metrics"]
    assert "items with an answer longer than the model's 32 tokens were left out: piqa 1 of 3" in table(found)
    with pytest.raises(UserError, match="piqa: every item has an answer longer than the model's context of 32"):
        evaluate(long)


def test_a_task_that_cannot_be_scored_stops_no_other(opened: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    documents = [{"goal": "a", "sol1": "fox", "sol2": "dog", "label": 0}]
    empty = [{"goal": "a", "sol1": "", "sol2": "dog", "label": 0}]
    (folder / "piqa.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents + empty))
    (folder / "winogrande.jsonl").write_bytes((data / "winogrande.jsonl").read_bytes())
    (folder / "social_iqa.jsonl").write_text('{"context": "a"}\n')
    lines: list[str] = []
    names = ["piqa", "social_iqa", "winogrande"]
    found = run.evaluate(opened(), names, out=tmp_path / "out", data=folder, report=lines.append)
    assert list(found["tasks"]) == ["winogrande"] and set(found["failed"]) == {"piqa", "social_iqa"}
    assert "has no token of its own" in found["failed"]["piqa"]
    assert "social_iqa.jsonl: not the documents of social_iqa" in found["failed"]["social_iqa"]
    assert any(line.startswith("piqa: ") for line in lines) and found["complete"]


def test_a_fault_of_the_scorer_is_not_blamed_on_the_documents(
    opened: Callable[..., Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(run.Scorer, "score", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run.evaluate(opened(), ["winogrande"], out=tmp_path / "out", data=data)


def test_nothing_is_scored_before_all_names_are_right(opened: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="arc_easy: allenai/ai2_arc is not in the cache of `datasets`, and the hub"):
        run.evaluate(opened(), ["arc_easy", "piqa"], out=tmp_path / "hub")
    assert not (tmp_path / "hub" / run.RESULTS).exists()
    with pytest.raises(UserError, match="piqa: no documents"):
        run.evaluate(opened(), ["arc_easy", "piqa"], out=tmp_path / "out", data=data)
    assert not (tmp_path / "out").exists()


def test_the_table_fits_a_terminal(invariant_results: dict[str, Any]) -> None:
    lines = table(invariant_results)
    rows = lines[: 2 + len(TASKS)]
    assert max(map(len, rows)) <= 100 and rows[0].split()[:3] == ["task", "metric", "cached"]
    assert "perplexity" in rows[-1]
    assert "truthfulqa_mc1 20 of 20" in "\n".join(lines)


def test_progress_ends_with_all_requests(opened: Callable[..., Any], data: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    run.evaluate(opened(), ["winogrande"], out=tmp_path, data=data, report=print, status=lines.append, every_s=0)
    assert f"{2 * NUM}/{2 * NUM}" in lines[-1] and "live" in lines[-1] and "cached" in lines[0]
    assert max(map(len, lines)) <= 100
