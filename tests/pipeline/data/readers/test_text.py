"""Reading units: every format, everything that can be wrong with a file, and that parts lose and double nothing."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.data import Source
from pipeline.data.readers import parquet, units
from pipeline.data.readers import text as read
from pipeline.data.readers.sources import find_files
from pipeline.data.readers.text import bad_input_error, read_unit
from pipeline.data.readers.units import Rejected, Text, Unit, plan_units
from pipeline.errors import UserError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
MB = 1_000_000
PAGE = """<html><head><meta charset='iso-8859-1'><title>Kaffee</title></head><body><nav><a href='x'>home</a></nav><article>
<h1>Kaffee</h1><p>{}</p><p>Zweiter Absatz, der auch lang genug ist, um zu zählen, und gut.</p></article>
<footer>copyright</footer></body></html>""".format(
    "Ein Café ist ein Ort, an dem man Kaffee trinkt und lange redet. " * 4
)


def units_of(url: Path | str, text_key: str = "text") -> list[Unit]:
    return plan_units(find_files([Source(url=str(url), text_key=text_key)])[0])


def read_all(url: Path | str, text_key: str = "text", limit: int = MB) -> list[Text | Rejected]:
    return [item for unit in units_of(url, text_key) for item in read_unit(unit, max_document_bytes=limit)]


def texts(items: list[Text | Rejected]) -> list[str]:
    assert not [item for item in items if isinstance(item, Rejected)], items
    return [item.text for item in items if isinstance(item, Text)]


def write_parquet(path: Path, column: Any, *, key: str = "text", **options: Any) -> Path:
    pq.write_table(pa.table({"id": pa.array(range(len(column))), key: column}), path, **options)
    return path


# Formats


@pytest.mark.parametrize("ending", COMPRESS)
def test_every_compression_gives_the_same_documents(tmp_path: Path, ending: str) -> None:
    lines = b'\xef\xbb\xbf{"text": "one\\nline"}\r\n\r\n{"text": "tw\xc3\xb6\\u0000", "more": 1}'
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending](lines))
    (tmp_path / f"b.txt{ending}").write_bytes(COMPRESS[ending](b"\xef\xbb\xbfr\xc3\xa9sum\xc3\xa9\0\r\n"))
    (tmp_path / f"c.htm{ending}").write_bytes(COMPRESS[ending](PAGE.encode("latin-1")))
    plain = write_parquet(tmp_path / "plain.parquet", pa.array(["p", "ö"]))
    (tmp_path / f"d.parquet{ending}").write_bytes(COMPRESS[ending](plain.read_bytes()))
    plain.unlink()
    *others, page, p, o = texts(read_all(tmp_path))
    assert (others, p, o) == (["one\nline", "twö\0", "résumé\0\r\n"], "p", "ö")
    assert page.startswith("Kaffee\nEin Café") and page.endswith("zählen, und gut.")
    assert "home" not in page and "copyright" not in page


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


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", "b", "a"]),
        pa.array(["a", "b", "a"], pa.large_string()),
        pa.array(["a", "b", "a"]).dictionary_encode(),
        pa.array(["a", "b", "a"], pa.string_view()),
    ],
    ids=lambda column: str(column.type),
)
def test_every_kind_of_string_column(tmp_path: Path, column: Any) -> None:
    assert texts(read_all(write_parquet(tmp_path / "a.parquet", column))) == ["a", "b", "a"]


def test_s3_is_read_through_faults_and_in_parts(
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


# Bad input: what it is, where, and the mend


def one_bad(items: list[Text | Rejected]) -> Rejected:
    (bad,) = [item for item in items if isinstance(item, Rejected)]
    assert "\n" not in bad.message and "data.on_bad_input=skip" in bad.message
    return bad


def assert_stops(path: Path, bad: Rejected) -> None:
    """Policy `error`: the same place and reason."""
    unit = units_of(path)[0]
    assert str(bad_input_error(unit, bad)) == bad.message and isinstance(bad_input_error(unit, bad), UserError)


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b'{"text": ', "not_json", r"line 2: not JSON"),
        (b'{"text": "\\ud800"}', "not_json", r"line 2: not JSON \(.*surrogate"),  # half a character
        (b'{"text": "a\0b"}', "not_json", r"line 2: not JSON"),  # JSON wants \u0000
        (b"[" * 100_000, "not_json", r"line 2: not JSON \(depth limit"),
        (b'{"body": "x", "id": 1}', "no_text", r"line 2: no text under 'text' \(keys: body, id\)"),
        (b'{"a\\nb": "x"}', "no_text", r"line 2: no text under 'text' \(keys: a\\nb\)"),
        (b'{"text": null}', "no_text", r"line 2: no text"),
        (b'["text"]', "no_text", r"line 2: .*no object"),
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


def test_of_a_doubled_key_the_last_counts(tmp_path: Path) -> None:
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
def test_utf16_is_called_by_its_name(tmp_path: Path, name: str, encoding: str) -> None:
    data = "\ufeff".encode("utf-16-be") * (encoding == "utf-16-be") + '{"text": "x"}\n{"text": "y"}\n'.encode(encoding)
    (tmp_path / name).write_bytes(COMPRESS[".gz" if name.endswith("gz") else ""](data))
    bad = one_bad(read_all(tmp_path / name))
    assert bad.reason == "not_utf8" and "UTF-16, not UTF-8" in bad.message and "iconv -f UTF-16" in bad.message


def test_text_that_is_not_utf8_names_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    bad = one_bad(read_all(tmp_path / "a.txt"))
    assert bad.reason == "not_utf8" and "a.txt: not UTF-8 at byte 3" in bad.message


@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet"])
@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_cut_archive_is_named_whatever_came_before_it(tmp_path: Path, kind: str, ending: str) -> None:
    if kind == "parquet":
        data = write_parquet(tmp_path / "x.parquet", pa.array([f"{n}" for n in range(5000)])).read_bytes()
    else:
        data = b"".join(json.dumps({"text": f"{n} " + "x" * (n * 7919 % 997)}).encode() + b"\n" for n in range(3000))
    whole = COMPRESS[ending](data)
    path = tmp_path / f"a.{kind}{ending}"
    for cut in (len(whole) // 2, len(whole) - 1, 3):
        path.write_bytes(whole[:cut])
        bad = one_bad(read_all(path, limit=10 * MB))
        assert bad.reason == "damaged_file" and f"{path}: cut or damaged" in bad.message
        assert_stops(path, bad)


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_archives_of_many_streams_are_read_to_the_end_and_their_damage_is_seen(tmp_path: Path, ending: str) -> None:
    """Parallel compressors and `cat a.gz b.gz` give many streams in one file."""
    parts = [COMPRESS[ending](f'{{"text": "{n}"}}\n'.encode()) for n in range(3)]
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(b"".join(parts))
    assert texts(read_all(path)) == ["0", "1", "2"]
    path.write_bytes(parts[0] + b"X" + parts[1][1:] + parts[2])
    items = read_all(path)
    assert items[0] == Text(1, "0") and one_bad(items).reason == "damaged_file"


def test_what_archives_may_hold_besides(tmp_path: Path) -> None:
    line = b'{"text": "x"}\n'
    skippable = b"\x5a\x2a\x4d\x18\x03\0\0\0abc"
    no_size = zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compress(line * 5)
    stream = zstandard.ZstdCompressor().compressobj()
    streamed = (
        stream.compress(line) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) + stream.compress(line) + stream.flush()
    )
    (tmp_path / "a.jsonl.zst").write_bytes(skippable + no_size + skippable + streamed)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line) + bytes(1000))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(line) + bytes(8))
    assert texts(read_all(tmp_path)) == ["x"] * 9


def test_what_only_looks_compressed_is_damaged(tmp_path: Path) -> None:
    for ending in (".gz", ".bz2", ".xz", ".zst", ".parquet"):
        path = tmp_path / (f"a.txt{ending}" if ending != ".parquet" else "a.parquet")
        path.write_bytes(b"plain text, no archive")
        assert one_bad(read_all(path)).reason == "damaged_file", ending


def test_parquet_that_has_no_text(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", pa.array(["x"]), key="body")
    assert "a.parquet: no column 'text' (columns: body, id); set text_key" in one_bad(read_all(path)).message
    assert "column 'id' holds int64, not strings" in one_bad(read_all(path, "id")).message
    path = write_parquet(tmp_path / "b.parquet", pa.array(["x", None, "y" * 2000, "z"]))
    first, empty, long, last = read_all(path, limit=1000)
    assert (first, last) == (Text(1, "x"), Text(4, "z"))
    assert isinstance(empty, Rejected) and empty.reason == "no_text" and "row 2: no text" in empty.message
    assert isinstance(long, Rejected) and long.reason == "too_long_cell" and "row 3: longer than" in long.message
    assert one_bad(read_all(write_parquet(tmp_path / "c.parquet", pa.array([], pa.string())))).reason == "empty_file"


def test_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    column = pa.array([b"good", b"caf\xe9", b"good"]).view(pa.string())
    first, bad, last = read_all(write_parquet(tmp_path / "a.parquet", column))
    assert isinstance(bad, Rejected) and bad.reason == "not_utf8" and "row 2: not UTF-8 at byte 3" in bad.message
    assert isinstance(first, Text) and isinstance(last, Text)


def test_cut_and_damaged_parquet(tmp_path: Path) -> None:
    column = pa.array([f"{n} " + "x" * 100 for n in range(3000)])
    options = {"write_page_checksum": True, "compression": "none"}  # or snappy notices by itself
    path = write_parquet(tmp_path / "a.parquet", column, row_group_size=1000, **options)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert one_bad(read_all(path)).reason == "damaged_file"
    path.write_bytes(whole)
    text = pq.ParquetFile(path).metadata.row_group(1).column(1)
    middle = text.dictionary_page_offset + text.total_compressed_size // 2
    path.write_bytes(whole[:middle] + b"damage" + whole[middle + 6 :])
    items = read_all(path)
    assert "a.parquet, rows 1001 to 2000: cut or damaged" in one_bad(items).message
    assert sum(isinstance(item, Text) for item in items) >= 2000  # the other row groups


def test_pages_without_main_text(tmp_path: Path) -> None:
    for number, page in enumerate([b"<html><body></body></html>", b"\0\1\2", b"plain", PAGE.encode() * 100]):
        (tmp_path / f"{number}.html").write_bytes(page)
    reasons = [item.reason for item in read_all(tmp_path, limit=20_000) if isinstance(item, Rejected)]
    assert reasons[0] == "no_main_text" and reasons[-1] == "too_long_file" and "no_main_text" in reasons[1]


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").mkdir()
    (tmp_path / "y.jsonl").write_text('{"text": "y"}\n')
    bad = one_bad(read_all(f"{tmp_path}/*.jsonl"))
    assert bad.reason == "not_a_file" and f"{tmp_path}/x.jsonl: a folder (or a link to one) in place of" in bad.message


def test_files_that_change_or_go_while_they_wait(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "y"}\n')
    (unit,) = units_of(path)
    path.write_text('{"text": "longer"}\n')
    with pytest.raises(UserError, match=r"a.jsonl: 19 bytes, 14 when the sources were listed; start again"):
        list(read_unit(unit, max_document_bytes=MB))
    path.unlink()
    with pytest.raises(UserError, match=r"a.jsonl: gone since the sources were listed"):
        list(read_unit(unit, max_document_bytes=MB))


# Parts: nothing lost, nothing doubled

BLANKS = st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n", "\r\n\r\n", "\n\n\n"])
WORDS = st.text(st.sampled_from('abc "\\öß漢😀\u2028'), max_size=40)
LINES = st.lists(st.tuples(WORDS, BLANKS), max_size=30)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LINES, st.booleans(), st.booleans(), st.integers(1, 200), st.integers(1, 60), st.data())
def test_parts_of_jsonl_are_the_whole(
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
def test_parts_of_text_are_the_whole(
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


def sorted_texts(items: list[Text | Rejected]) -> list[str]:
    assert len({item.record for item in items}) == len(items)
    return texts(sorted(items, key=lambda item: item.record or 0))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(WORDS, max_size=40), st.integers(1, 9))
def test_parts_of_parquet_are_the_whole(tmp_path: Path, column: list[str], rows: int) -> None:
    path = write_parquet(tmp_path / "a.parquet", pa.array(column or ["x"]), row_group_size=rows)
    for size in (50, 400, 10**6):
        with small_parts(size, 10):
            items = [i for unit in units_of(path) for i in read_unit(unit, max_document_bytes=MB)]
        assert texts(items) == (column or ["x"]) and [i.record for i in items] == [n + 1 for n in range(len(items))]


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
    assert item.message.startswith(f"{path}, line ") and ("behind byte" in item.message) == (unit.part > 0)


@contextmanager
def small_parts(size: int, chunk: int) -> Iterator[None]:
    """Units of a few bytes; the same constants are imported by several modules."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (units, "RANGE", size),
            (read, "RANGE", size),
            (parquet, "RANGE", size),
            (read, "STREAM_CHUNK", chunk),
            (read, "BLOCK", 16),
        ):
            patch.setattr(module, name, value)
        yield


# Memory


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.txt"])
def test_a_line_of_any_length_is_never_held(tmp_path: Path, name: str) -> None:
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


RSS = """
import resource, sys
from pipeline.data.readers.text import read_unit, Text
from pipeline.data.readers.sources import find_files
from pipeline.data.readers.units import plan_units
class Source:
    url, name, text_key, license = sys.argv[1], None, "text", None
units = plan_units(find_files([Source()])[0])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = [len(i.text) if isinstance(i, Text) else i.reason for u in units for i in read_unit(u, max_document_bytes=64_000_000)]
print(found, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["", ".zst", ".gz"])
def test_a_line_of_300_megabytes(tmp_path: Path, ending: str) -> None:
    noise = random.Random(0).randbytes(MB // 2).hex().encode()
    path = tmp_path / f"a.jsonl{ending}"
    data = b'{"text": "before"}\n{"text": "' + noise * 150 + b"x" * 150 * MB + b'"}\n{"text": "after"}\n'
    path.write_bytes(COMPRESS[ending](data))
    del data
    done = subprocess.run([sys.executable, "-c", RSS, str(path)], capture_output=True, text=True, check=True)
    found, _, megabytes = done.stdout.strip().rpartition(" ")
    assert found == "[6, 'too_long_line', 5]" and int(megabytes) < 100, done.stdout
