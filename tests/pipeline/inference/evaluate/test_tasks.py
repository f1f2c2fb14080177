"""Which tasks there are, where their documents are looked for, and what is refused."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.inference.evaluate import tasks

tasks.quiet(offline=True)


def refused(*arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        tasks.find(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_stock_tasks_are_those_of_lm_eval(data: Path) -> None:
    found = {one.name: one for one in tasks.find(list(tasks.STOCK), None)}
    assert list(found) == list(tasks.STOCK) and all(one.file is None for one in found.values())
    assert found["arc_easy"].config["doc_to_text"] == "Question: {{question}}\nAnswer:"
    assert found["arc_easy"].where == "hub: allenai/ai2_arc"
    assert len({one.sha256 for one in found.values()}) == len(found)
    again = tasks.find(["arc_easy"], data)[0]
    assert again.sha256 == found["arc_easy"].sha256  # the documents are not in it


def test_documents_are_found_by_the_names_they_have(data: Path) -> None:
    found = tasks.find(["arc_easy", "social_iqa", "truthfulqa_mc1", "truthfulqa_mc2"], data)
    names = ["arc_easy.jsonl", "data_eval/siqa.jsonl", "truthfulqa.jsonl", "truthfulqa.jsonl"]
    assert [one.file for one in found] == [data / name for name in names]


def test_missing_documents_say_where_they_were_looked_for(data: Path, tmp_path: Path) -> None:
    message = refused(["arc_easy", "piqa"], data)
    assert message.startswith("piqa: no documents")
    assert all(str(data / place) in message for place in ("piqa.jsonl", "data_eval/piqa.jsonl"))
    assert "no such folder" in refused(["piqa"], tmp_path / "none")
    assert "named twice" in refused(["piqa", "piqa"], data)


def test_what_is_no_task_of_given_answers_is_refused() -> None:
    index = tasks._index(["arc_easy", "truthfulqa_mc1", "hellaswag"])

    def message(name: str) -> str:
        with pytest.raises(UserError) as caught:
            tasks._definition(name, index, None)
        return str(caught.value)

    assert "did you mean hellaswag?" in message("helaswag")
    assert "generate_until" in message("truthfulqa_gen")
    assert message("ai2_arc").endswith("is a group of 2 tasks; name its tasks: arc_challenge, arc_easy …")


@pytest.mark.slow
def test_every_task_of_lm_eval_is_known_by_name() -> None:
    assert tasks.find(["boolq", "arc_easy"], None)[0].where.startswith("hub: ")
    assert "did you mean hellaswag?" in refused(["helaswag"], None)
    assert "is a group" in refused(["mmlu"], None)
    assert "generate_until" in refused(["gsm8k"], None)


def test_local_documents_need_no_network_and_execute_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: Any) -> None:
        raise AssertionError("the network was asked")

    import datasets

    usual = Path(datasets.config.HF_DATASETS_CACHE)
    before = list(usual.rglob("*"))
    monkeypatch.setattr(socket.socket, "connect", no_network)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "piqa.py").write_text("raise SystemExit('executed')")
    (tmp_path / "code" / "piqa.jsonl").write_text(
        json.dumps({"goal": "a", "sol1": "b", "sol2": "c", "label": 0}) + "\n"
    )
    (one,) = tasks.find(["piqa"], tmp_path / "code")
    task = tasks.load(one, tmp_path / "work")
    assert [dict(doc) for doc in task.eval_docs] == [{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}]
    assert set(task.aggregation()) == {"acc", "acc_norm", "acc_bytes"}
    assert list(usual.rglob("*")) == before and (tmp_path / "work" / "piqa" / "cache").is_dir()


def test_code_that_comes_with_a_data_set_is_never_allowed() -> None:
    (one,) = tasks.find(["piqa"], None)
    asked = tasks.Definition(one.name, one.yaml, {**one.config, "dataset_kwargs": {"trust_remote_code": True}}, None)
    assert tasks._ours(asked, Path("none"))["dataset_kwargs"] is None


def test_a_file_is_found_whatever_its_folder_is_called(tmp_path: Path) -> None:
    folder = tmp_path / "a[1]*::x?"
    folder.mkdir()
    (folder / "piqa.jsonl").write_text(json.dumps({"goal": "a", "sol1": "b", "sol2": "c", "label": 0}) + "\n")
    (one,) = tasks.find(["piqa"], folder)
    assert len(tasks.load(one, tmp_path / "work").eval_docs) == 1


def test_examples_of_another_split_are_not_taken_from_the_same_file(tmp_path: Path) -> None:
    index = tasks._index(["piqa"])
    index["piqa"].cfg["num_fewshot"] = 5
    (tmp_path / "piqa.jsonl").write_text("")
    with pytest.raises(UserError, match="shows 5 examples of another split"):
        tasks._definition("piqa", index, tmp_path)


@pytest.mark.parametrize("text", ["{", '{"goal": "a"}\n', '["a"]\n', ""])
def test_documents_that_do_not_fit_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "piqa.jsonl").write_text(text)
    (one,) = tasks.find(["piqa"], tmp_path)
    with pytest.raises(UserError) as caught:
        tasks.load(one, tmp_path / "work")
    assert str(caught.value).startswith(f"{tmp_path / 'piqa.jsonl'}: not the documents of piqa")
    assert "\n" not in str(caught.value)


def test_an_empty_file_and_a_missing_package_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "piqa.jsonl").write_text("\n")
    (one,) = tasks.find(["piqa"], tmp_path)
    with pytest.raises(UserError, match="it is empty"):
        tasks.load(one, tmp_path / "work")

    def halted(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", halted)
    with pytest.raises(UserError, match="transformers is not installed; pip install 'pldr\\[eval\\]'"):
        tasks.load(one, tmp_path / "work")


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    (one,) = tasks.find(["piqa"], None)
    with pytest.raises(tasks.HubUnreachable) as caught:
        tasks.load(one, tmp_path)
    assert "--data DIR" in str(caught.value) and "baber/piqa" in str(caught.value) and "\n" not in str(caught.value)


def test_the_main_metric_is_the_papers() -> None:
    assert tasks.main_metric("piqa", ["acc", "acc_norm", "acc_bytes"]) == "acc_bytes"
    assert tasks.main_metric("winogrande", ["acc", "acc_bytes"]) == "acc"
    assert tasks.main_metric("lambada_openai", ["perplexity", "acc"]) == "acc"
    assert tasks.main_metric("wikitext", ["word_perplexity"]) == "word_perplexity"
