"""Reading units: lines, texts and pages, every kind of bad input, and parts that lose and duplicate nothing."""

from __future__ import annotations

import gzip
import json
import random
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.data import Source
from pipeline.data.readers import text as read
from pipeline.data.readers import units
from pipeline.data.readers.sources import find_files
from pipeline.data.readers.text import bad_input_error, read_unit
from pipeline.data.readers.units import Rejected, Text
from pipeline.errors import UserError
from tests.pipeline.data.readers.reading import (
    COMPRESS,
    LINES,
    MB,
    PAGE,
    assert_stops,
    one_bad,
    read_all,
    small_parts,
    sorted_texts,
    texts,
    units_of,
    write_parquet,
)


def test_documents_are_named_by_source_file_and_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"text": "x"}\n')
    (tmp_path / "b.md").write_text("x")
    write_parquet(tmp_path / "c.parquet", pa.array(["p", "q"]))
    names = [
        unit.document_id(item.record)
        for unit in units_of(tmp_path)
        for item in read_unit(unit, max_document_bytes=MB)
        if isinstance(item, Text)
    ]
    here = tmp_path.name
    assert names == [f"{here}/a.jsonl#2", f"{here}/b.md", f"{here}/c.parquet#1", f"{here}/c.parquet#2"]


def test_another_text_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": 3}\n')
    write_parquet(tmp_path / "b.parquet", pa.array(["y"]), key="body")
    assert texts(read_all(tmp_path, "body")) == ["x", "y"]


PLAY = "# Play\r\n\n## ACT I\n\n### SCENE I\n\nA: ### no\n\n### SCENE II\n\nB\n\n## ACT II\n\n### SCENE I\n\nC\n"


def split(path: Path, split_at: str) -> list[tuple[str, Text | Rejected]]:
    planned = units.plan_units(find_files([Source(url=str(path), split_at=split_at)])[0])
    items = [(unit, item) for unit in planned for item in read_unit(unit, max_document_bytes=MB)]
    return [(unit.document_id(item.record or 0), item) for unit, item in items]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_text_is_cut_before_each_match_and_nothing_of_it_is_lost(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.md{ending}"
    path.write_bytes(COMPRESS[ending](PLAY.encode()))
    with small_parts(20, 20):  # a heading may lie anywhere: such a file is one unit
        named = split(path, r"^(## .*\n+)?### ")
    assert [name for name, _ in named] == [f"a/a.md{ending}#{number}" for number in (1, 2, 3, 4)]
    found = texts([item for _, item in named])
    assert "".join(found) == PLAY
    assert [text.split()[:3] for text in found[1:]] == [["##", "ACT", "I"], ["###", "SCENE", "II"], ["##", "ACT", "II"]]


def test_a_text_without_a_match_is_one_document_and_white_space_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("\n \n# a\n# b\n")
    assert [item for _, item in split(tmp_path / "a.md", "^# ")] == [Text(2, "# a\n"), Text(3, "# b\n")]
    assert [item for _, item in split(tmp_path / "a.md", "^x")] == [Text(1, "\n \n# a\n# b\n")]


def test_a_text_that_cannot_be_cut_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_bytes(b"# a\n" * (MB // 4 + 1))
    (tmp_path / "latin.txt").write_bytes(b"# a\n# caf\xe9")
    reasons = [item.reason for _, item in split(tmp_path, "^# ") if isinstance(item, Rejected)]
    assert reasons == ["not_utf8", "too_long_file"]


def test_only_texts_are_cut(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "# a"}\n')
    with pytest.raises(UserError, match=r"a.jsonl: split_at cuts txt and md only; remove it or name only those"):
        split(tmp_path, "^# ")


def test_s3_is_read_despite_faults_and_in_parts(
    faulty_s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(units, "RANGE", 5000)
    monkeypatch.setattr(read, "RANGE", 5000)
    lines = [f"line {n} " + "x" * (n % 50) for n in range(300)]
    data = "".join(json.dumps({"text": line}) + "\n" for line in lines).encode()
    faulty_s3.put("in/a.jsonl", data)
    faulty_s3.put("in/b.jsonl.gz", gzip.compress(data))
    table = write_parquet(tmp_path / "c.parquet", pa.array(lines), row_group_size=50, compression="none")
    faulty_s3.put("in/c.parquet", table.read_bytes())
    planned = units_of(faulty_s3.url("in/*"))
    assert len(planned) > 6
    faulty_s3.fail_next(3)
    faulty_s3.truncate_next(2)
    items = [item for unit in planned for item in read_unit(unit, max_document_bytes=MB)]
    assert sorted(texts(items)) == sorted(lines * 3)
    assert not faulty_s3.failures["GET"] and not faulty_s3.truncations


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b'{"text": ', "not_json", r"line 2: not JSON"),
        (b'{"text": "\\ud800"}', "not_json", r"line 2: not JSON \(.*surrogate"),  # half a character
        (b'{"text": "a\0b"}', "not_json", r"line 2: not JSON"),  # JSON wants \u0000
        (b"[" * 100_000, "too_deep", r"line 2: nested more than 1024 deep"),
        (b'{"body": "x", "id": 1}', "no_text", r"line 2: no text under 'text' \(keys: body, id\)"),
        (b'{"a\\nb": "x"}', "no_text", r"line 2: no text under 'text' \(keys: a\\nb\)"),
        (b'{"text": null}', "no_text", r"line 2: no text"),
        (b'["text"]', "no_text", r"line 2: .*not an object"),
        (b'{"text": "caf\xe9"}', "not_utf8", r"line 2: not UTF-8 at byte 13; .*iconv -f LATIN1"),
        (b'{"text": "' + b"x" * 200_000 + b'"}', "too_long_line", r"line 2: longer than 0.15 MB; raise data.max_doc"),
    ],
)
@pytest.mark.parametrize("ending", ["", ".zst"])
def test_a_bad_line_is_named_and_the_others_are_read(
    tmp_path: Path, line: bytes, reason: str, message: str, ending: str
) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(COMPRESS[ending](b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n'))
    before, _, after = items = read_all(path, limit=150_000)
    bad = one_bad(items)
    assert (before, after) == (Text(1, "before"), Text(3, "after"))
    assert bad.reason == reason and bad.record == 2 and re.search(message, bad.message)
    assert bad.message.startswith(f"{path}, line 2: ")
    assert_stops(path, bad)


def test_the_last_of_duplicate_keys_counts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "text": "b"}\n')
    assert texts(read_all(tmp_path / "a.jsonl")) == ["b"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.md.xz", "a.html", "a.parquet", "a.parquet.bz2"])
def test_empty_files_are_named(tmp_path: Path, name: str) -> None:
    for data in {b"", COMPRESS["." + name.rpartition(".")[2]](b"")} if name.count(".") > 1 else [b""]:
        (tmp_path / name).write_bytes(data)
        bad = one_bad(read_all(tmp_path / name))
        assert bad.reason == "empty_file" and bad.message.startswith(f"{tmp_path / name}: empty")
        assert_stops(tmp_path / name, bad)
    (tmp_path / "blank.jsonl").write_text("\n \n")
    assert read_all(tmp_path / "blank.jsonl") == []


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.md.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf16_is_reported_as_such(tmp_path: Path, name: str, encoding: str) -> None:
    data = "\ufeff".encode("utf-16-be") * (encoding == "utf-16-be") + '{"text": "x"}\n{"text": "y"}\n'.encode(encoding)
    (tmp_path / name).write_bytes(COMPRESS[".gz" if name.endswith("gz") else ""](data))
    bad = one_bad(read_all(tmp_path / name))
    assert bad.reason == "not_utf8" and "UTF-16, not UTF-8" in bad.message and "iconv -f UTF-16" in bad.message


def test_text_that_is_not_utf8_names_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    bad = one_bad(read_all(tmp_path / "a.txt"))
    assert bad.reason == "not_utf8" and "a.txt: not UTF-8 at byte 3" in bad.message


def test_pages_without_main_text(tmp_path: Path) -> None:
    for number, page in enumerate([b"<html><body></body></html>", b"\0\1\2", b"plain", PAGE.encode() * 100]):
        (tmp_path / f"{number}.html").write_bytes(page)
    reasons = [item.reason for item in read_all(tmp_path, limit=20_000) if isinstance(item, Rejected)]
    assert reasons[0] == "no_main_text" and reasons[-1] == "too_long_file" and "no_main_text" in reasons[1]


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").mkdir()
    (tmp_path / "y.jsonl").write_text('{"text": "y"}\n')
    bad = one_bad(read_all(f"{tmp_path}/*.jsonl"))
    assert (
        bad.reason == "not_a_file"
        and f"{tmp_path}/x.jsonl: a folder (or a link to one), a file is expected" in bad.message
    )


def test_files_that_change_or_disappear_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "y"}\n')
    (unit,) = units_of(path)
    path.write_text('{"text": "longer"}\n')
    with pytest.raises(UserError, match=r"a.jsonl: 19 bytes, 14 when the sources were listed; start again"):
        list(read_unit(unit, max_document_bytes=MB))
    path.unlink()
    with pytest.raises(UserError, match=r"a.jsonl: gone since the sources were listed"):
        list(read_unit(unit, max_document_bytes=MB))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LINES, st.booleans(), st.booleans(), st.integers(1, 200), st.integers(1, 60), st.data())
def test_parts_of_jsonl_make_the_complete_file(
    tmp_path: Path, lines: list[tuple[str, str]], bom: bool, cut: bool, size: int, chunk: int, data: st.DataObject
) -> None:
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + end for text, end in lines)
    content = "\ufeff" * bom + (content.rstrip() if cut else content)
    ending = data.draw(st.sampled_from(list(COMPRESS)))
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(COMPRESS[ending](content.encode()))
    with small_parts(size, chunk):
        parts = units_of(path)
        items = [[i for i in read_unit(unit, max_document_bytes=MB) if isinstance(i, Text)] for unit in parts]
    assert sorted(i.text for part in items for i in part) == sorted(text for text, _ in lines)
    for part in items:
        assert [i.record for i in part] == sorted({i.record for i in part})
    if not ending:  # ranges follow one another
        assert [i.text for part in items for i in part] == [text for text, _ in lines]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LINES, st.integers(1, 200), st.integers(1, 60), st.integers(8, 100), st.data())
def test_parts_of_text_make_the_complete_file(
    tmp_path: Path, lines: list[tuple[str, str]], size: int, chunk: int, limit: int, data: st.DataObject
) -> None:
    content = "".join(text + end for text, end in lines) or "x"
    ending = data.draw(st.sampled_from(list(COMPRESS)))
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(COMPRESS[ending](content.encode()))
    with small_parts(size, chunk):
        parts = units_of(path)
        items = [i for unit in parts for i in read_unit(unit, max_document_bytes=limit)]
    whole = len(content.encode()) <= limit
    assert "".join(sorted_texts(items)) == content
    assert (len(items) == 1 and items[0].record == 0) if whole else 0 not in {i.record for i in items}
    assert all(len(text.encode()) <= limit + 3 for text in sorted_texts(items))
    with small_parts(10**6, 10**6):
        (unit,) = units_of(path)
        assert sorted_texts(list(read_unit(unit, max_document_bytes=limit))) == sorted_texts(items)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LINES, st.integers(0, 29), st.integers(1, 100))
def test_a_bad_line_in_a_later_part_is_found_by_its_number(
    tmp_path: Path, lines: list[tuple[str, str]], bad: int, size: int
) -> None:
    content = [json.dumps({"text": text}) + end for text, end in lines]
    bad = min(bad, len(content))
    content.insert(bad, "no JSON\n")
    path = tmp_path / "a.jsonl"
    path.write_bytes("".join(content).encode())
    with small_parts(size, 10):
        found = [
            (unit, item)
            for unit in units_of(path)
            for item in read_unit(unit, max_document_bytes=MB)
            if isinstance(item, Rejected)
        ]
        ((unit, item),) = found
        error = bad_input_error(unit, item)
    number = "".join(content[:bad]).count("\n") + 1
    assert str(error).startswith(f"{path}, line {number}: not JSON")
    assert item.message.startswith(f"{path}, line ") and ("after byte" in item.message) == (unit.part > 0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.txt"])
def test_a_long_line_is_never_held_in_memory(tmp_path: Path, name: str) -> None:
    size = 24 * MB
    data = b'{"text": "before"}\n{"text": "' + b"x" * size + b'"}\n{"text": "after"}\n'
    (tmp_path / name).write_bytes(COMPRESS[Path(name).suffix if name.count(".") > 1 else ""](data))
    (unit,) = units_of(tmp_path / name)
    tracemalloc.start()
    try:
        found = [len(i.text) if isinstance(i, Text) else i.reason for i in read_unit(unit, max_document_bytes=2 * MB)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if name == "a.txt":
        assert sum(n for n in found if isinstance(n, int)) == len(data) and len(found) > 20
    else:
        assert found == [6, "too_long_line", 5]
    assert peak < 12 * MB, peak


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["", ".zst", ".gz"])
def test_a_line_of_300_megabytes(tmp_path: Path, ending: str, repository: Path) -> None:
    noise = random.Random(0).randbytes(MB // 2).hex().encode()
    path = tmp_path / f"a.jsonl{ending}"
    data = b'{"text": "before"}\n{"text": "' + noise * 150 + b"x" * 150 * MB + b'"}\n{"text": "after"}\n'
    path.write_bytes(COMPRESS[ending](data))
    del data
    command = [sys.executable, "-m", "tests.pipeline.data.readers.read_memory", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=repository)
    found, _, megabytes = done.stdout.strip().rpartition(" ")
    assert found == "[6, 'too_long_line', 5]" and int(megabytes) < 100, done.stdout
