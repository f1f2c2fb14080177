"""Splitting long documents: nothing lost, nothing too long, split at the best place."""

from __future__ import annotations

from datatrove.data import Document
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.filters.length import SplitLong, split


@given(st.text(alphabet="ab. \n", max_size=400), st.integers(1, 60))
def test_joined_the_parts_are_the_document(text: str, limit: int) -> None:
    parts = split(text, limit)
    assert "".join(parts) == text and all(0 < len(part) <= limit for part in parts[:-1]) and len(parts[-1]) <= limit


def test_cut_after_paragraphs() -> None:
    paragraphs = [f"Paragraph {n}. It has two sentences, and\nthree lines, one\nafter another.\n\n" for n in range(20)]
    for part in split("".join(paragraphs), 300):
        assert len(part) <= 300 and part.startswith("Paragraph") and part.endswith("another.\n\n")


def test_without_paragraphs_at_lines_then_sentences_then_words_then_anywhere() -> None:
    assert all(part.endswith("line\n") for part in split("a whole line\n" * 40, 100))
    assert all(part.endswith("here. ") for part in split("A sentence stands here. " * 40, 100))
    assert all(part.endswith("word ") for part in split("word " * 100, 30))
    assert split("x" * 10, 4) == ["xxxx", "xxxx", "xx"]


def test_parts_are_about_even() -> None:
    sizes = [len(part) for part in split("word " * 1000, 1100)]
    assert len(sizes) == 5 and max(sizes) - min(sizes) < 200


def test_parts_have_numbers_and_short_documents_pass() -> None:
    step = SplitLong(10)
    documents = [Document("short", "a"), Document("one two three four", "b", metadata={"key": "k"})]
    out = list(step.run(documents))
    assert out[0] is documents[0] and "part" not in out[0].metadata
    assert [d.id for d in out[1:]] == [f"b/{n}" for n in range(len(out) - 1)] and len(out) > 2
    assert all(d.metadata == {"key": "k", "part": n} for n, d in enumerate(out[1:]))
