"""Compressed files: every format, many streams in one file, and damage that must be seen."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard

from pipeline.data.readers.units import Text
from tests.pipeline.data.readers.reading import (
    COMPRESS,
    MB,
    PAGE,
    assert_stops,
    one_bad,
    read_all,
    texts,
    write_parquet,
)


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


@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet"])
@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_truncated_archive_is_reported(tmp_path: Path, kind: str, ending: str) -> None:
    if kind == "parquet":
        data = write_parquet(tmp_path / "x.parquet", pa.array([f"{n}" for n in range(5000)])).read_bytes()
    else:
        data = b"".join(json.dumps({"text": f"{n} " + "x" * (n * 7919 % 997)}).encode() + b"\n" for n in range(3000))
    whole = COMPRESS[ending](data)
    path = tmp_path / f"a.{kind}{ending}"
    for cut in (len(whole) // 2, len(whole) - 1, 3):
        path.write_bytes(whole[:cut])
        bad = one_bad(read_all(path, limit=10 * MB))
        assert bad.reason == "damaged_file" and f"{path}: truncated or damaged" in bad.message
        assert_stops(path, bad)


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_archives_with_many_streams_are_read_completely_and_damage_is_reported(tmp_path: Path, ending: str) -> None:
    """Parallel compressors and `cat a.gz b.gz` give many streams in one file."""
    parts = [COMPRESS[ending](f'{{"text": "{n}"}}\n'.encode()) for n in range(3)]
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(b"".join(parts))
    assert texts(read_all(path)) == ["0", "1", "2"]
    path.write_bytes(parts[0] + b"X" + parts[1][1:] + parts[2])
    items = read_all(path)
    assert items[0] == Text(1, "0") and one_bad(items).reason == "damaged_file"


def test_skippable_frames_and_padding_in_archives(tmp_path: Path) -> None:
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


def test_files_that_only_look_compressed_are_damaged(tmp_path: Path) -> None:
    for ending in (".gz", ".bz2", ".xz", ".zst", ".parquet"):
        path = tmp_path / (f"a.txt{ending}" if ending != ".parquet" else "a.parquet")
        path.write_bytes(b"plain text, no archive")
        assert one_bad(read_all(path)).reason == "damaged_file", ending
