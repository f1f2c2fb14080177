"""Decontamination against a plain search: what is found, what is cut, and which evaluation files can be read."""

from __future__ import annotations

import gzip
import json
import random
import re
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from datatrove.data import Document
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.documents.spool import RemovedWriter
from pipeline.data.filters.decontaminate import Decontaminate, build_index, cut_words, evaluation_files
from pipeline.errors import UserError

LIMIT = 10**6
QUESTION = "Which of the following is the best way to keep a small boat from drifting away during a storm at night"


def words(number: int, count: int) -> str:
    rng = random.Random(number)
    return " ".join(f"w{rng.randrange(10**9)}" for _ in range(count))


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def clean(folder: Path, files: list[Path], texts: list[str], *, ngram: int = 13, cut: bool = False) -> dict[int, str]:
    """What is kept: position -> text."""
    build_index([str(file) for file in files], ngram, folder / "index.npz", LIMIT)
    step = Decontaminate(folder / "index.npz", ngram, cut=cut)
    return {int(d.id): d.text for d in step.run(Document(text, str(n)) for n, text in enumerate(texts))}


def test_a_run_of_thirteen_words_is_found_twelve_are_not(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "eval.jsonl", {"question": QUESTION, "label": 1})
    listed = QUESTION.split()
    texts = [
        f"{words(1, 50)} {' '.join(listed[3:16])} {words(2, 50)}",
        f"{words(1, 50)} {' '.join(listed[3:15])} {words(2, 50)}",
        words(3, 200),
        f"{words(4, 9)}, {' - '.join(listed[:13]).upper()}!",  # case and punctuation do not hide it
        " ".join([*listed[:6], "odd", *listed[6:14]]),
        "",
    ]
    assert set(clean(tmp_path, [file], texts)) == {1, 2, 4, 5}


def test_the_reason_names_file_and_words(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "arc.jsonl", {"a": {"deep": ["nothing here", {"er": QUESTION}]}})
    build_index([str(file)], 13, tmp_path / "index.npz", LIMIT)
    document = Document(f"first {QUESTION}", "0")
    removed = RemovedWriter(tmp_path, "decontaminate")
    assert not list(Decontaminate(tmp_path / "index.npz", 13, cut=False, exclusion_writer=removed).run([document]))
    assert document.metadata["filter_reason"] == "contaminated"
    assert document.metadata["detail"].endswith("arc.jsonl: " + " ".join(QUESTION.split()[:13]))


def test_a_cut_passage_is_recorded_with_source_and_file(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "arc.jsonl", QUESTION)
    build_index([str(file)], 13, tmp_path / "index.npz", LIMIT)
    step = Decontaminate(
        tmp_path / "index.npz", 13, cut=True, exclusion_writer=RemovedWriter(tmp_path / "out", "decontaminate")
    )
    assert len(list(step.run([Document(f"first. {QUESTION}", "id", metadata={"source": 3})]))) == 1
    record = json.loads((tmp_path / "out" / "00000.decontaminate.jsonl").read_text())
    assert record["reason"] == "passage_cut" and record["source"] == 3 and record["excerpt"] == QUESTION
    assert record["detail"].endswith("arc.jsonl")


@pytest.mark.parametrize("way", ["NFC", "NFD", "NFKD", "soft hyphen", "no width", "upper", "_"])
def test_unicode_variants_are_found(tmp_path: Path, way: str) -> None:
    plain = "Où l\u2019élève étudiait-il déjà la géométrie à l\u2019été de l\u2019année dernière, près de la ﬁnale du château"
    file = jsonl(tmp_path / "eval.jsonl", plain)
    written = {
        "soft hyphen": plain.replace("géo", "géo\u00ad"),
        "no width": plain.replace("g", "g\u200b"),
        "upper": plain.upper(),
        "_": plain.replace(" ", "_"),
    }.get(way) or unicodedata.normalize(way, plain)
    assert clean(tmp_path, [file], [f"Avant. {written}. Après."]) == {}
    left = clean(tmp_path, [file], [f"Avant. {written}. Après."], cut=True)[0]
    assert left == "Avant. Après."


def test_short_strings_must_match_completely_and_the_shortest_are_ignored(tmp_path: Path) -> None:
    nine, seven = words(10, 9), words(11, 7)
    file = jsonl(tmp_path / "eval.jsonl", {"goal": nine, "choices": {"text": [seven]}})
    texts = [f"{words(1, 20)} {nine} {words(2, 20)}", f"{words(1, 20)} {nine.rpartition(' ')[0]}", f"x {seven} y"]
    assert set(clean(tmp_path, [file], texts)) == {1, 2}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=3, max_size=12),
    st.lists(st.integers(0, 3), max_size=60),
    st.integers(2, 5),
)
def test_found_and_cut_like_a_plain_search(
    tmp_path_factory: pytest.TempPathFactory, evaluation: list[int], document: list[int], ngram: int
) -> None:
    if len(evaluation) < ngram:
        return
    folder = tmp_path_factory.mktemp("plain")
    file = jsonl(folder / "eval.jsonl", " ".join(f"w{n}" for n in evaluation))
    text = " ".join(f"w{n}" for n in document)
    runs = {tuple(evaluation[i : i + ngram]) for i in range(len(evaluation) - ngram + 1)}
    hit = [i for i in range(len(document) - ngram + 1) if tuple(document[i : i + ngram]) in runs]
    gone = {i + k for i in hit for k in range(ngram)}
    assert bool(clean(folder, [file], [text], ngram=ngram)) == (not hit)
    left = clean(folder, [file], [text], ngram=ngram, cut=True)[0]
    assert left.split() == [f"w{n}" for i, n in enumerate(document) if i not in gone]


def test_a_cut_takes_the_passage_and_nothing_else(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "eval.jsonl", {"q": QUESTION})
    text = f"Before it.\n\n{QUESTION}?  And after it, «more».\n"
    kept = clean(tmp_path, [file], [text, "nothing of it"], cut=True)
    assert kept == {0: "Before it.\n\n  And after it, «more».\n", 1: "nothing of it"}


def test_passages_that_touch_are_one() -> None:
    text = "a b c d e f. g"
    assert cut_words(text, [(1, 3, "x"), (2, 5, "y"), (5, 6, "z")]) == ("a g", [("b c d e f.", "x")])
    assert cut_words(text, [(0, 1, "x"), (6, 7, "y")]) == (" b c d e f.", [("a", "x"), ("g", "y")])


def test_every_format(tmp_path: Path) -> None:
    texts = [words(n, 20) for n in range(7)]
    pq.write_table(pa.table({"id": [1, 2], "ctx": [texts[0], "short"]}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text(texts[1])
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps([texts[2]]).encode() + b"\n\n"))
    pq.write_table(pa.table({"choices": [{"text": [texts[3]]}]}), tmp_path / "d.parquet")
    kind = pa.map_(pa.string(), pa.string())
    pq.write_table(
        pa.table({"m": pa.array([[("key", texts[4])]], kind), "b": [texts[5].encode()]}), tmp_path / "e.parquet"
    )
    files = [tmp_path / name for name in ("a.parquet", "b.txt", "c.jsonl.gz", "d.parquet", "e.parquet")]
    assert set(clean(tmp_path, files, texts)) == {6}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"q": "x"}\n{"q": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'"' + b"x" * (LIMIT + 1) + b'"\n', r"a\.jsonl, line 1: longer than data.max_document_megabytes"),
        ("a.jsonl", b'{"q": "one two"}\n', "no text of 8 words or more in 1 files"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet: not an intact parquet file"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b'{"q": "\xe9t\xe9"}\n', r"a\.jsonl, line 1: not UTF-8"),
        ("a.jsonl", b"", r"a\.jsonl: no text in this evaluation file"),
        ("a.txt.bz2", b"not bz2 at all", r"a\.txt\.bz2: truncated or damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"q": "x"}\n', mtime=0)[:-9], r"a\.jsonl\.gz"),
    ],
)
def test_evaluation_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        build_index([str(tmp_path / name)], 13, tmp_path / "index.npz", LIMIT)


def test_deep_records_and_the_advice_for_sources(tmp_path: Path) -> None:
    deep = jsonl(tmp_path / "deep.jsonl", json.loads("[" * 900 + json.dumps(QUESTION) + "]" * 900))
    assert clean(tmp_path, [deep], [QUESTION]) == {}
    (tmp_path / "lat.txt").write_bytes("été".encode("latin-1"))
    with pytest.raises(UserError) as caught:
        build_index([str(tmp_path / "lat.txt")], 13, tmp_path / "index.npz", LIMIT)
    assert "on_bad_input" not in str(caught.value)


def test_files_that_are_not_read_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "evals").mkdir()
    jsonl(tmp_path / "evals" / "a.jsonl", QUESTION)
    (tmp_path / "evals" / "b.csv").write_text(QUESTION)
    assert [file.name for file in evaluation_files([f"{tmp_path}/evals", f"{tmp_path}/evals/*.jsonl"])] == [
        "evals/a.jsonl"
    ]
    assert "with an unknown extension are not read" in caplog.text


def test_no_such_file_is_named_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape("data.clean.decontaminate.files")):
        build_index([f"{tmp_path}/none-*.jsonl"], 13, tmp_path / "index.npz", LIMIT)
