"""Words of scripts without spaces, and everything that counts or compares words: no guard that guards nothing."""

from __future__ import annotations

import json
import logging
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import regex
from datatrove.data import Document

from pipeline.data.dedup.near import MinHasher
from pipeline.data.filters.decontaminate import Decontaminate, build_index
from pipeline.data.filters.gopher import Quality, Repetition
from pipeline.data.words import FOLDED_WORD, PLAIN_FOLDED_WORD, PLAIN_WORD, SPACELESS, WORD, count_words

ALPHABETS = {
    "Chinese": [chr(code) for code in range(0x4E00, 0x4E00 + 900)],
    "Japanese": [chr(code) for code in (*range(0x3042, 0x3093), *range(0x30A2, 0x30F3), *range(0x4E00, 0x4E40))],
    "Thai": [chr(code) + mark for code in range(0x0E01, 0x0E2E) for mark in ("", "", "\u0e31", "\u0e35")],
    "Lao": [chr(code) for code in range(0x0E81, 0x0EAF) if unicodedata.category(chr(code)) == "Lo"],
    "Burmese": [chr(code) + mark for code in range(0x1000, 0x1020) for mark in ("", "\u103a", "\u102c")],
    "Khmer": [chr(code) + mark for code in range(0x1780, 0x17A2) for mark in ("", "\u17b7", "\u17d2\u1780")],
}


def say(language: str, count: int, seed: int) -> str:
    chance = random.Random(seed)
    return "".join(chance.choice(ALPHABETS[language]) for _ in range(count))


@pytest.mark.parametrize("language", ALPHABETS)
def test_an_evaluation_question_inside_of_a_document_is_found(tmp_path: Path, language: str) -> None:
    question = say(language, 150, 1)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": question}))
    build_index([str(tmp_path / "eval.jsonl")], 13, tmp_path / "index.npz", 10**6)

    def kept(text: str) -> bool:
        step = Decontaminate(tmp_path / "index.npz", 13, cut=False)
        return len(list(step.run([Document(text=text, id="a")]))) == 1

    for seed in range(5):
        assert not kept(say(language, 40 + seed, 2 + seed) + question + say(language, 50, 9 + seed))
        assert not kept(say(language, 40 + seed, 2 + seed) + question[10:140] + say(language, 50, 9 + seed))
        assert kept(say(language, 400, 20 + seed))


def test_evaluation_texts_that_are_too_short_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "Make a new plan"}\n{"q": "And one more"}')
    (tmp_path / "b.jsonl").write_text(json.dumps({"q": "word " * 20}))
    with caplog.at_level(logging.WARNING):
        build_index([f"{tmp_path}/*.jsonl"], 13, tmp_path / "index.npz", 10**6)
    assert "none of the 2 texts in" in caplog.text and "a.jsonl has 8 words or more: nothing is removed" in caplog.text


@pytest.mark.parametrize("language", ALPHABETS)
def test_near_duplicates_have_like_signatures_in_scripts_without_spaces(language: str) -> None:
    text = say(language, 600, 1)
    hasher = MinHasher(5, 112)
    same, changed, other = (
        hasher.signature(each) for each in (text, text[:-30] + say(language, 20, 2), say(language, 600, 3))
    )
    assert same is not None and changed is not None and other is not None
    assert np.mean(same == changed) > 0.6 and np.mean(same == other) < 0.2


@pytest.mark.parametrize("language", ALPHABETS)
def test_gopher_rules_and_counts(language: str) -> None:
    rules = Quality(50, 100_000)
    assert rules.filter(Document(text=say(language, 800, 1) + "。", id="a")) is True
    assert rules.filter(Document(text=say(language, 20, 1), id="a")) == (False, "gopher_short_doc")
    assert rules.filter(Document(text=say(language, 400, 1) + "#" * 400, id="a")) == (False, "gopher_too_many_hashes")
    repeats = Repetition()
    assert repeats.filter(Document(text=say(language, 2000, 1), id="a")) is True
    assert repeats.filter(Document(text=say(language, 12, 1) * 60, id="a")) is not True
    assert 100 < count_words(say(language, 800, 1)) <= 800


def test_text_with_spaces_is_split_as_before() -> None:
    text = "The quick brown fox's größe, e\u0301te\u0301 Россия 42 한국어 문장 हिन्दी עברית العربية zero\u200bwidth über_all"
    assert WORD.findall(text) == PLAIN_WORD.findall(text) == re.findall(r"\w+", text)
    assert FOLDED_WORD.findall(text) == PLAIN_FOLDED_WORD.findall(text)
    assert not SPACELESS.search(text) and count_words(text) == len(text.split())
    for code in range(0x110000):
        letter = chr(code)
        if not SPACELESS.match(letter) and not 0xD800 <= code < 0xE000:
            assert bool(WORD.match(letter)) == bool(PLAIN_WORD.match(letter))


def test_every_character_of_the_class_is_a_letter_or_number_or_its_mark() -> None:
    strange = [
        c for c in map(chr, range(0x110000)) if SPACELESS.match(c) and not regex.match(r"[\p{L}\p{N}\p{M}\p{Cn}]", c)
    ]
    assert strange == []
