"""Unicode repair: mojibake, normal forms, and text that needs no repair."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.filters.unicode import repair


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
