"""Repeated paragraphs against brute force; the rest of a text is unchanged."""

from __future__ import annotations

import pickle
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from datatrove.data import Document
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.dedup.exact import FindDuplicates, normalized
from pipeline.data.dedup.paragraphs import CutParagraphs, ParagraphKeys, cut, split_paragraphs

PIECES = st.sampled_from(["a", "bb", "BB ", "ccc", "dddd", "Dddd", "ﬃ", "ffi", "x\ny", "x y", " "])
BREAKS = st.sampled_from(["\n\n", "\n \n", "\n\n\n\n", "\n\t\n\n", "\r\n\r\n", "\n"])
TEXTS = st.lists(st.one_of(PIECES, BREAKS), max_size=14).map("".join)
MINIMUM = 3


class Writer:
    """Keeps what is cut."""

    def __init__(self) -> None:
        self.written: list[Document] = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def write(self, document: Document, rank: int) -> None:
        self.written.append(document)


def deal(texts: list[str], tasks: int) -> list[list[Document]]:
    shares: list[list[Document]] = [[] for _ in range(tasks)]
    for place, text in enumerate(texts):
        shares[place * 7 % tasks].append(Document(text, str(place), metadata={"ordinal": place << 32, "source": 0}))
    return shares


def run_all(step: Any, shares: list[Any], order: random.Random) -> None:
    for rank in order.sample(range(len(shares)), len(shares)):
        list(pickle.loads(pickle.dumps(step)).run(shares[rank], rank, len(shares)))


def cut_all(
    folder: Path,
    texts: list[str],
    *,
    tasks: int = 2,
    parts: int = 2,
    memory: int = 1 << 20,
    seed: int = 0,
    minimum: int = MINIMUM,
) -> tuple[list[str], list[Document], dict[str, int]]:
    """(texts after cutting, what was cut, counts)."""
    order = random.Random(seed)
    shares = deal(texts, tasks)
    run_all(ParagraphKeys(folder / "keys", minimum, folder / "work", memory), shares, order)
    run_all(FindDuplicates(folder / "keys", folder / "found", folder / "work", memory), [None] * parts, order)
    result, counts = {}, dict.fromkeys(("total", "forwarded", "changed", "paragraphs_cut", "characters_cut"), 0)
    writer = Writer()
    for rank, share in enumerate(shares):
        step = CutParagraphs(folder / "found", exclusion_writer=writer)
        for document in step.run(share, rank, tasks):
            result[int(document.id)] = document.text
        for label in counts:
            counts[label] += int(step.stats[label].total)
    return [result[place] for place in range(len(texts))], writer.written, counts


def repeated(texts: list[str]) -> dict[int, dict[int, int]]:
    """By brute force: position -> number of a repeated paragraph -> position of the text with the first one."""
    first: dict[str, tuple[int, int]] = {}
    found: dict[int, dict[int, int]] = {}
    for place, text in enumerate(texts):
        for number, paragraph in enumerate(split_paragraphs(text)[0]):
            same = normalized(paragraph)
            if len(same) >= MINIMUM and first.setdefault(same, (place, number)) != (place, number):
                found.setdefault(place, {})[number] = first[same][0]
    return found


@given(
    st.lists(TEXTS, max_size=10),
    st.tuples(st.integers(1, 5), st.integers(1, 7), st.sampled_from([32, 100, 1 << 20]), st.integers(0, 99)),
)
@settings(max_examples=40, deadline=None)
def test_the_first_of_equal_paragraphs_stays_whatever_the_tasks(
    texts: list[str], how: tuple[int, int, int, int]
) -> None:
    tasks, parts, memory, seed = how
    expected = repeated(texts)
    with tempfile.TemporaryDirectory() as folder:
        left, removed, counts = cut_all(Path(folder), texts, tasks=tasks, parts=parts, memory=memory, seed=seed)
    assert left == [cut(text, set(expected[place])) if place in expected else text for place, text in enumerate(texts)]
    assert {(int(d.id), d.metadata["detail"], d.metadata["keeper"] >> 32) for d in removed} == {
        (place, f"paragraph {number}", keeper)
        for place, numbers in expected.items()
        for number, keeper in numbers.items()
    }
    assert counts == {
        "total": len(texts),
        "forwarded": len(texts),
        "changed": len(expected),
        "paragraphs_cut": len(removed),
        "characters_cut": sum(map(len, texts)) - sum(map(len, left)),
    }


@given(TEXTS, st.sets(st.integers(0, 8)))
def test_cutting_leaves_the_rest_as_it_was(text: str, numbers: set[int]) -> None:
    paragraphs, separators = split_paragraphs(text)
    assert "".join(piece for pair in zip(paragraphs, [*separators, ""], strict=True) for piece in pair) == text
    kept = [number for number in range(len(paragraphs)) if number not in numbers]
    left = cut(text, numbers)
    if not any(paragraphs[number].strip() for number in kept):
        assert left == ""
        return
    # each kept paragraph in order, with the separator after it, and exactly one between two
    for place, number in enumerate(kept):
        assert left.startswith(paragraphs[number])
        left = left[len(paragraphs[number]) :]
        if place + 1 < len(kept):
            assert left.startswith(separators[number])
            left = left[len(separators[number]) :]
    assert left == ""


@pytest.mark.parametrize(
    ("text", "numbers", "expected"),
    [
        ("a\n\nb\n \n\nc", set(), "a\n\nb\n \n\nc"),
        ("a\n\nb\n \n\nc", {0}, "b\n \n\nc"),
        ("a\n\nb\n \n\nc", {1}, "a\n\nc"),
        ("a\n\nb\n \n\nc", {2}, "a\n\nb"),
        ("a\n\nb\n \n\nc", {1, 2}, "a"),
        ("a\n\nb\n \n\nc", {0, 1, 2}, ""),
        ("a\n\nb\n\n", {1}, "a\n\n"),
        ("\n\na\n\nb", {1}, "\n\nb"),
        ("a\n\n", {0}, ""),
        (" \n\na", {1}, ""),
        ("a\nb\r\n\r\nc", {0}, "c"),
    ],
)
def test_separators_around_a_cut(text: str, numbers: set[int], expected: str) -> None:
    assert cut(text, numbers) == expected


def test_a_notice_repeated_everywhere_is_kept_once(tmp_path: Path) -> None:
    """Also inside one document; headings below the limit are kept; a document with nothing else becomes empty."""
    notice = "All rights are reserved; nothing of this may be copied."
    texts = [f"Chapter\n\nText {n} says something of its own.\n\n{notice}\n\nThe end {n}" for n in range(3)]
    texts += [notice.upper(), f"{notice}\n\n{notice} ", "Chapter\n\nChapter"]
    left, removed, counts = cut_all(tmp_path, texts, minimum=20)
    own = [f"Chapter\n\nText {n} says something of its own.\n\nThe end {n}" for n in range(3)]
    assert left == [texts[0], own[1], own[2], "", "", "Chapter\n\nChapter"]
    assert {d.metadata["keeper"] for d in removed} == {0}
    assert {d.metadata["filter_reason"] for d in removed} == {"paragraph_duplicate"}
    assert removed[0].metadata["source"] == 0
    assert counts["changed"] == 4
    assert counts["paragraphs_cut"] == 5


def test_without_a_writer_nothing_is_recorded(tmp_path: Path) -> None:
    (share,) = deal(["same text", "same text"], 1)
    run_all(ParagraphKeys(tmp_path / "keys", 3, tmp_path), [share], random.Random(0))
    run_all(FindDuplicates(tmp_path / "keys", tmp_path / "found", tmp_path), [None], random.Random(0))
    assert [d.text for d in CutParagraphs(tmp_path / "found").run(share)] == ["same text", ""]
