"""Exact duplicates against brute force, for any number of tasks, ranges, order and memory."""

from __future__ import annotations

import json
import pickle
import random
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.readers import JsonlReader
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.dedup.exact import (
    MAX_PARTITIONS,
    DropDuplicates,
    ExactKeys,
    FindDuplicates,
    count_keys,
    found_file,
    found_files,
    keys_file,
    normalized,
    partitions,
)
from pipeline.data.dedup.near import NearKeys
from pipeline.data.executor.jobs import run_tasks

WORDS = st.sampled_from(["a", "A", "b", " ", "  ", "\n", "é", "e\u0301", "ß", "ss", "ﬁ", "fi", "Ω"])
TEXTS = st.lists(st.lists(WORDS, max_size=3).map("".join), max_size=25)


def deal(texts: list[str], tasks: int) -> list[list[Document]]:
    """Documents in units of three, the units over the tasks; ordinals as units.ordinal makes them."""
    shares: list[list[Document]] = [[] for _ in range(tasks)]
    for place, text in enumerate(texts):
        unit, record = divmod(place, 3)
        document = Document(text, f"doc-{place}", metadata={"ordinal": unit << 32 | record, "place": place})
        shares[unit * 7 % tasks].append(document)
    return shares


def run_all(step: Any, shares: list[Any], order: random.Random) -> list[list[Document]]:
    """Every rank of a step, in any order, each on a pickled copy as in a worker."""
    results: dict[int, list[Document]] = {}
    ranks = list(range(len(shares)))
    order.shuffle(ranks)
    for rank in ranks:
        results[rank] = list(pickle.loads(pickle.dumps(step)).run(shares[rank], rank, len(shares)))
    return [results[rank] for rank in range(len(shares))]


def drop_exact(folder: Path, texts: list[str], tasks: int, parts: int, memory: int, seed: int) -> dict[int, int]:
    """What is dropped, and for which: position -> position of the kept text."""
    order = random.Random(seed)
    shares = deal(texts, tasks)
    passed = run_all(ExactKeys(folder / "keys", memory), shares, order)
    assert passed == shares
    assert count_keys(folder / "keys") == len(texts)
    run_all(FindDuplicates(folder / "keys", folder / "found", folder / "work", memory), [None] * parts, order)
    kept = run_all(DropDuplicates(folder / "found", "exact_duplicate"), shares, order)
    place_of = {d.metadata["ordinal"]: d.metadata["place"] for share in shares for d in share}
    dropped = [d for share in shares for d in share if "keeper" in d.metadata]
    assert [d for share in shares for d in share if d not in dropped] == [d for share in kept for d in share]
    return {d.metadata["place"]: place_of[d.metadata["keeper"]] for d in dropped}


def repeats(texts: list[str]) -> dict[int, int]:
    """The same by brute force."""
    first = {normalized(text): place for place, text in reversed(list(enumerate(texts)))}
    return {place: first[normalized(text)] for place, text in enumerate(texts) if first[normalized(text)] != place}


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.integers(1, 5), st.integers(1, 7), st.sampled_from([24, 100, 1 << 20]), st.integers(0, 99))
def test_the_first_of_equal_texts_stays_whatever_the_tasks(
    texts: list[str], tasks: int, parts: int, memory: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert drop_exact(Path(folder), texts, tasks, parts, memory, seed) == repeats(texts)


def test_equal_hashes_in_every_range_are_found(tmp_path: Path) -> None:
    """Thousands of keys, so that each of the ranges has some, and one text in every task."""
    texts = [f"text {number % 700}" if number % 4 else "boilerplate" for number in range(2000)]
    expected = repeats(texts)
    assert drop_exact(tmp_path, texts, 5, 7, 4096, 0) == expected
    found = [np.load(path) for path in found_files(tmp_path / "found")]
    assert all(len(table) for table in found)
    assert (
        sum(len(table) for table in found) == len(expected) == len(texts) - 701 + 175
    )  # multiples of 4 below 700 never come


def test_a_dropped_document_names_the_one_that_is_kept(tmp_path: Path) -> None:
    dropped: list[Document] = []

    class Writer:
        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def write(self, document: Document, rank: int) -> None:
            dropped.append(document)

    shares = deal(["x", "y", "X ", "z", " y", "x\n"], 2)
    run_all(ExactKeys(tmp_path / "keys"), shares, random.Random(0))
    run_all(FindDuplicates(tmp_path / "keys", tmp_path / "found", tmp_path), [None], random.Random(0))
    for rank, share in enumerate(shares):
        step = DropDuplicates(tmp_path / "found", "exact_duplicate", exclusion_writer=Writer())
        assert step.name == "exact_duplicates"
        list(step.run(share, rank, 2))
        assert step.stats["dropped_exact_duplicate"].total == (1, 2)[rank]
    keepers = {d.metadata["place"]: (d.metadata["keeper"], d.metadata["filter_reason"]) for d in dropped}
    assert keepers == {2: (0, "exact_duplicate"), 4: (1, "exact_duplicate"), 5: (0, "exact_duplicate")}


def test_writing_again_writes_the_same_bytes(tmp_path: Path) -> None:
    shares = deal(["x", "y", "x", "y", "z"], 2)
    written = []
    for _ in range(2):
        run_all(ExactKeys(tmp_path / "keys"), shares, random.Random(0))
        run_all(FindDuplicates(tmp_path / "keys", tmp_path / "found", tmp_path / "work"), [None] * 2, random.Random(1))
        written.append({path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()})
    assert written[0] == written[1]
    assert len(written[0]) == 6  # 2 keys, 2 found, 2 records


def test_a_missing_table_is_not_an_empty_one(tmp_path: Path) -> None:
    run_all(ExactKeys(tmp_path), deal(["x", "y", "z", "x"], 2), random.Random(0))
    keys_file(tmp_path, 0).unlink()
    with pytest.raises(AssertionError, match="missing"):
        count_keys(tmp_path)
    found_file(tmp_path, 0, 2).touch()
    with pytest.raises(AssertionError, match="incomplete set"):
        found_files(tmp_path)


@pytest.mark.parametrize(
    ("keys", "expected"), [(0, 1), (1, 1), (8_000_000, 1), (8_000_001, 2), (10**11, MAX_PARTITIONS)]
)
def test_partitions_grow_with_the_keys(keys: int, expected: int) -> None:
    assert partitions(keys) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Two\r\n\twords ", "two words"),
        ("STRASSE", "strasse"),
        ("Stra\u00dfe", "strasse"),  # sharp s: lower-casing leaves it, folding does not
        ("\ufb01ne \u2460\u3000\uff21", "fine 1 a"),  # ligature, circled digit, ideographic space, wide letter
        ("cafe\u0301", "caf\u00e9"),
        ("", ""),
    ],
)
def test_which_texts_count_as_equal(text: str, expected: str) -> None:
    assert normalized(text) == expected


@given(st.text())
def test_normalization_is_idempotent(text: str) -> None:
    """Idempotent; canonically equal texts, case and white space make no difference."""
    once = normalized(text)
    assert normalized(once) == once
    assert normalized(unicodedata.normalize("NFD", text)) == once
    assert normalized(f"\t{text}\u00a0\n") == once


@given(st.text(st.characters(max_codepoint=127)))
def test_the_fast_path_for_ascii_equals_the_slow_one(text: str) -> None:
    slow = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    assert normalized(text) == " ".join(slow.split())


def test_jobs_in_worker_processes_rewrite_a_damaged_table(tmp_path: Path) -> None:
    """Keys and search as real jobs: records name the tables, and a damaged one is made again."""
    source, keys, found = tmp_path / "source", tmp_path / "keys", tmp_path / "found"
    source.mkdir()
    for rank, share in enumerate(deal(["the same few words"] * 4 + [f"{n} other {n} text" for n in range(4)], 2)):
        lines = [json.dumps({"text": d.text, "id": d.id, "metadata": d.metadata}) for d in share]
        (source / f"{rank}.jsonl").write_text("\n".join(lines))
    works = {name: tmp_path / f"work-{name}" for name in ("keys", "find")}
    jobs = [
        ([JsonlReader(str(source)), NearKeys(keys, 0.75, 5, 16, works["keys"])], works["keys"], keys),
        ([FindDuplicates(keys, found, works["find"])], works["find"], found),
    ]
    results = []
    for damage in (False, True):
        if damage:
            keys_file(keys, 1).write_bytes(b"no table")
            found_file(found, 0, 2).unlink()
        for steps, work, output in jobs:
            records = run_tasks(steps, tasks=2, workers=2, workers_key="data.workers", work=work, output=output)
            assert all(record["files"] for record in records)
        results.append([path.read_bytes() for folder in (keys, found) for path in sorted(folder.glob("*.npy"))])
    assert results[0] == results[1]
    assert {int(row[1]) for path in found_files(found) for row in np.load(path)} == {0}
