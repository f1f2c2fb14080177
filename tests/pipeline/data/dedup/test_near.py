"""Near-duplicates: MinHash against exact Jaccard similarities, the bands' curve measured, clusters against brute force."""

from __future__ import annotations

import pickle
import random
import re
import tempfile
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datatrove.data import Document
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.dedup import near, word_hashes
from pipeline.data.dedup.exact import DropDuplicates, FindDuplicates, count_keys, normalized
from pipeline.data.dedup.near import ClusterNear, MinHasher, NearKeys, bands_for, components

SIMILARITY, NGRAM, HASHES = 0.75, 5, 112  # the configuration's defaults


def grams(text: str, size: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", normalized(text))
    return {tuple(words[at : at + size]) for at in range(max(1, len(words) - size + 1))}


def jaccard(one: str, other: str, size: int) -> float:
    a, b = grams(one, size), grams(other, size)
    return len(a & b) / len(a | b)


def pair_of(similarity: float, rng: random.Random, union: int = 300) -> tuple[str, str]:
    """Two sets of words (1-grams) with this Jaccard similarity."""
    words = [f"{rng.getrandbits(60):x}" for _ in range(union)]
    both = round(similarity * union)
    alone = (union - both) // 2
    texts = [words[:both] + words[both : both + alone], words[:both] + words[both + alone : both + 2 * alone]]
    for text in texts:
        rng.shuffle(text)
    return " ".join(texts[0]), " ".join(texts[1])


def prose(rng: random.Random, words: int) -> list[str]:
    return [f"word{min(rng.randint(0, 400), rng.randint(0, 400))}" for _ in range(words)]


def run_all(step: Any, shares: list[Any], order: random.Random) -> list[list[Document]]:
    results: dict[int, list[Document]] = {}
    for rank in order.sample(range(len(shares)), len(shares)):
        results[rank] = list(pickle.loads(pickle.dumps(step)).run(shares[rank], rank, len(shares)))
    return [results[rank] for rank in range(len(shares))]


def drop_near(
    folder: Path,
    texts: list[str],
    *,
    ngram: int = NGRAM,
    tasks: int = 2,
    parts: int = 2,
    memory: int = 1 << 20,
    seed: int = 0,
) -> dict[int, int]:
    """What is dropped, and for which: position -> position of the kept document."""
    order = random.Random(seed)
    shares: list[list[Document]] = [[] for _ in range(tasks)]
    for place, text in enumerate(texts):
        shares[place * 7 % tasks].append(Document(text, str(place), metadata={"ordinal": place << 32}))
    keys, found, clusters, work = (folder / name for name in ("keys", "found", "clusters", "work"))
    run_all(NearKeys(keys, SIMILARITY, ngram, HASHES, work, memory), shares, order)
    run_all(FindDuplicates(keys, found, work, memory), [None] * parts, order)
    run_all(ClusterNear(found, clusters, work, memory), [None], order)
    kept = run_all(DropDuplicates(clusters, "near_duplicate"), shares, order)
    assert {id(d) for share in kept for d in share} <= {id(d) for share in shares for d in share}
    return {int(d.id): d.metadata["keeper"] >> 32 for share in shares for d in share if "keeper" in d.metadata}


def test_defaults_are_fourteen_bands_of_eight() -> None:
    assert bands_for(SIMILARITY, HASHES) == (14, 8)


@given(st.floats(0.01, 0.99), st.integers(8, 256))
@settings(max_examples=30, deadline=None)
def test_bands_fit_and_rise_around_the_similarity(similarity: float, hashes: int) -> None:
    bands, rows = bands_for(similarity, hashes)
    assert 1 <= bands * rows <= hashes

    def found(s: float) -> float:
        return 1 - (1 - s**rows) ** bands

    assert found(similarity / 4) < 0.5 < found((3 + similarity) / 4)


def test_signatures_are_the_same_on_every_machine() -> None:
    signature = MinHasher(2, 3).signature("Call me Ishmael. Some years ago")
    assert signature is not None
    assert signature.tolist() == [9702121122802214956, 42506439731815283, 123551819189363385]


@pytest.mark.parametrize("similarity", [0.3, 0.6, 0.9])
def test_the_share_of_equal_minima_is_the_jaccard_similarity(similarity: float) -> None:
    rng, hasher = random.Random(1), MinHasher(1, HASHES)
    shares, signatures = [], []
    for _ in range(100):
        one, other = (hasher.signature(text) for text in pair_of(similarity, rng))
        assert one is not None and other is not None
        shares.append(float((one == other).mean()))
        signatures.append((one == other).astype(float))
    deviation = (similarity * (1 - similarity) / (100 * HASHES)) ** 0.5
    assert abs(np.mean(shares) - similarity) < 4 * deviation
    # of independent hash functions the single estimates are independent
    assert np.std(shares) < 1.3 * (similarity * (1 - similarity) / HASHES) ** 0.5


@cache
def measured(pairs: int = 150) -> dict[float, float]:
    """Share of pairs found by all steps together, by Jaccard similarity."""
    rng = random.Random(2)
    levels = (0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    texts = [text for level in levels for _ in range(pairs) for text in pair_of(level, rng, union=240)]
    with tempfile.TemporaryDirectory() as folder:
        dropped = drop_near(Path(folder), texts, ngram=1)
    assert all(keeper == place - 1 for place, keeper in dropped.items()), "texts without a common word were joined"
    counts = dict.fromkeys(levels, 0)
    for place in dropped:
        counts[levels[place // (2 * pairs)]] += 1
    return {level: count / pairs for level, count in counts.items()}


@pytest.mark.slow
def test_the_measured_curve_is_the_documented_one() -> None:
    for level, share in measured().items():
        expected = 1 - (1 - level**8) ** 14
        assert abs(share - expected) <= 4 * (expected * (1 - expected) / 150) ** 0.5 + 0.007, f"{level}: {measured()}"


def test_recall_and_precision() -> None:
    """Of pairs clearly above the similarity nearly all are found, of those clearly below few."""
    shares = measured()
    above = [share for level, share in shares.items() if level > 0.75]
    below = [share for level, share in shares.items() if level < 0.55]
    assert np.mean(above) > 0.95
    assert np.mean(below) < 0.06


def test_edited_prose_is_found_and_other_prose_is_kept(tmp_path: Path) -> None:
    """5-grams: copies with a few words changed against everything else, judged by their exact similarity."""
    rng = random.Random(3)
    originals = [prose(rng, 400) for _ in range(40)]
    edited = []
    for words in originals:
        copy = list(words)
        for at in rng.sample(range(400), 4):  # changes 20 of 396 5-grams: a similarity of about 0.9
            copy[at] = "changed"
        edited.append(copy)
    texts = [" ".join(words) for words in originals] + [" ".join(words).upper() + "!" for words in edited]
    dropped = drop_near(tmp_path, texts)
    assert all(jaccard(texts[place], texts[keeper], NGRAM) > 0.85 for place, keeper in dropped.items())
    assert dropped == {place + 40: place for place in range(40)}


def test_a_chain_is_one_cluster_and_its_first_document_stays(tmp_path: Path) -> None:
    rng = random.Random(4)
    words = prose(rng, 500)
    chain = [" ".join(words[start : start + 400]) for start in range(0, 100, 4)]
    assert jaccard(chain[0], chain[1], NGRAM) > 0.95
    assert jaccard(chain[0], chain[-1], NGRAM) < 0.65
    dropped = drop_near(tmp_path, [" ".join(prose(rng, 400)), *reversed(chain)])
    assert dropped == dict.fromkeys(range(2, 26), 1)


TOKENS = st.sampled_from(["alpha", "beta", "gamma", "Gamma,", "delta\n", "!"])


@given(
    st.lists(st.lists(TOKENS, max_size=9).map(" ".join), max_size=15),
    st.tuples(st.integers(1, 5), st.integers(1, 7), st.sampled_from([100, 1 << 20]), st.integers(0, 99)),
)
@settings(max_examples=25, deadline=None)
def test_tasks_ranges_order_and_memory_change_nothing(texts: list[str], how: tuple[int, int, int, int]) -> None:
    tasks, parts, memory, seed = how
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        dropped = drop_near(Path(one), texts, tasks=tasks, parts=parts, memory=memory, seed=seed)
        assert dropped == drop_near(Path(other), texts, tasks=1, parts=1)
    assert all(keeper < place and keeper not in dropped for place, keeper in dropped.items())
    for place, other_place in combinations(range(len(texts)), 2):
        if normalized(texts[place]) == normalized(texts[other_place]) and re.search(r"\w", texts[place]):
            assert other_place in dropped, "equal texts are near ones"


def test_short_texts_are_one_ngram_and_texts_without_words_are_ignored(tmp_path: Path) -> None:
    texts = ["one two three", "One, two; three.", "one two four", "", "...", "...", "", "one two"]
    assert drop_near(tmp_path, texts) == {1: 0}
    assert count_keys(tmp_path / "keys") == 4 * 14


def test_long_texts_are_hashed_piece_by_piece_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words at the ends of pieces are complete, n-grams span pieces and blocks, cleared hashes are computed again."""
    text = " ".join(prose(random.Random(5), 3000)) + " é" * 5
    whole = MinHasher(NGRAM, 16).signature(text)
    expected = {hash(gram) for gram in grams(text, NGRAM)}
    assert len(expected) > 2000
    monkeypatch.setattr(word_hashes, "PIECE", 37)
    monkeypatch.setattr(near, "BLOCK", 7)
    monkeypatch.setattr(word_hashes, "MAX_WORDS_KNOWN", 11)
    assert np.array_equal(whole, MinHasher(NGRAM, 16).signature(text))
    # the smallest of all n-grams is the smallest of what each n-gram gives alone
    words = text.split()
    alone = [MinHasher(NGRAM, 16).signature(" ".join(words[at : at + NGRAM])) for at in range(len(words) - NGRAM + 1)]
    assert np.array_equal(whole, np.min(np.array(alone), axis=0))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40))
def test_components_against_joining_one_pair_after_another(pairs: list[tuple[int, int]]) -> None:
    groups = {number: {number} for pair in pairs for number in pair}
    for one, other in pairs:
        joined = groups[one] | groups[other]
        for number in joined:
            groups[number] = joined
    expected = sorted((number, min(group)) for number, group in groups.items() if number != min(group))
    shifted = np.array(pairs, dtype=np.uint64).reshape(-1, 2) + np.uint64(2**63)
    found = components(shifted)
    assert [(int(number) - 2**63, int(first) - 2**63) for number, first in found] == expected


def test_a_long_path_is_one_component() -> None:
    """Every pair joins neighbors: the worst case for union-find."""
    rng = np.random.default_rng(0)
    numbers = rng.permutation(20_000).astype(np.uint64)
    found = components(np.column_stack([numbers[:-1], numbers[1:]]))
    assert len(found) == 19_999
    assert (found[:, 1] == 0).all()
