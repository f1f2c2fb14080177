"""Files that are intact but need much, or more than there is: read, or named with what they need, and never called damaged."""

from __future__ import annotations

import lzma
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.data.readers import parquet
from pipeline.errors import UserError
from pipeline.io.limits import limit_of
from pipeline.io.storage import explain_os_error
from tests.pipeline.data.readers.reading import one_bad, read_all, texts, write_parquet

LINES = b'{"text": "a"}\n{"text": "b"}\n'


def zstd(window_log: int, data: bytes = LINES) -> bytes:
    how = zstandard.ZstdCompressionParameters.from_level(
        1, window_log=window_log, enable_ldm=True, write_content_size=False
    )
    made = zstandard.ZstdCompressor(compression_params=how).compressobj()
    return made.compress(data) + made.flush()


@pytest.mark.parametrize("window", [27, 28, 30, 31])
def test_long_windows_of_zstd(tmp_path: Path, window: int) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(window) + zstd(window))
    assert texts(read_all(tmp_path / "a.jsonl.zst")) == ["a", "b", "a", "b"]


def test_a_window_that_no_reader_has_is_named(tmp_path: Path) -> None:
    data = bytearray(zstd(31))
    data[5] += 2 << 3  # the exponent of the window in the frame's header
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    bad = one_bad(read_all(tmp_path / "a.jsonl.zst"))
    assert bad.reason == "over_limit" and "a zstd window of 8.6 GB, at most 2.1 GB" in bad.message


def test_a_dictionary_of_zstd_is_named(tmp_path: Path) -> None:
    samples = [b"some text with number %d and more" % i for i in range(2000)]
    made = zstandard.train_dictionary(1024, samples)
    (tmp_path / "a.txt.zst").write_bytes(zstandard.ZstdCompressor(dict_data=made).compress(samples[3]))
    bad = one_bad(read_all(tmp_path / "a.txt.zst"))
    assert bad.reason == "over_limit" and f"dictionary (number {made.dict_id()})" in bad.message


def test_large_dictionaries_of_xz(tmp_path: Path) -> None:
    data = bytearray(lzma.compress(LINES))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 20}]
    data = bytearray(lzma.compress(LINES, filters=filters))
    place = (
        data.index(b"\x21\x01", 12) + 2
    )  # the filter's id and the size of its properties; then the dictionary's size
    data[place] = 40  # 4 GiB - 1
    import zlib

    length = (data[12] + 1) * 4
    data[12 + length - 4 : 12 + length] = zlib.crc32(bytes(data[12 : 12 + length - 4])).to_bytes(4, "little")
    (tmp_path / "a.jsonl.xz").write_bytes(data)
    assert texts(read_all(tmp_path / "a.jsonl.xz")) == ["a", "b"]


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.xz"])
def test_memory_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("zst"):
        path.write_bytes(zstd(30, LINES * 200_000))
    else:
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 30}]
        path.write_bytes(lzma.compress(LINES, filters=filters))
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from tests.pipeline.data.readers.reading import read_all\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2)\n"
        "from pipeline.errors import UserError\n"
        "try: print(read_all(Path(sys.argv[1])))\n"
        "except UserError as error: print(error)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert "not enough memory to read it (its" in said.stdout, (said.stdout[-500:], said.stderr[-500:])


def test_parquet_that_this_arrow_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", pa.array(["x"]))

    def refuse(error: Exception) -> str:
        monkeypatch.setattr(parquet.pq, "ParquetFile", lambda *a, **k: (_ for _ in ()).throw(error))
        (bad,) = read_all(path)
        return f"{bad.reason} {bad.message}"  # type: ignore[union-attr]

    assert refuse(pa.ArrowNotImplementedError("Support for codec 'lzo' not built")).startswith("over_limit ")
    assert "not encrypted" in refuse(pa.ArrowException("Cannot decrypt: no decryption properties"))
    assert refuse(pa.ArrowInvalid("Couldn't deserialize thrift")).startswith("damaged_file ")
    with pytest.raises(UserError, match=r"a\.parquet: not enough memory to read it \(a page of it: malloc of size 9"):
        refuse(pa.ArrowMemoryError("malloc of size 9 failed"))


@pytest.mark.slow
def test_parquet_with_a_large_schema_is_read(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(["x"]), **{f"column-{i:05d}": pa.array([i]) for i in range(3000)}})
    table = table.replace_schema_metadata({"note": "n" * 101_000_000})  # Arrow's own limit is 100,000,000
    pq.write_table(table, tmp_path / "a.parquet")
    assert texts(read_all(tmp_path / "a.parquet")) == ["x"]


def test_limits_of_the_system_are_named() -> None:
    for number, words in (
        (24, "too many open files, a process may have"),
        (23, "fs.file-max"),
        (12, "not enough memory"),
        (27, "a file would be larger"),
        (28, "the disk is full"),
        (122, "your quota"),
        (36, "too long"),
    ):
        error = OSError(number, os.strerror(number))
        for reading in (False, True):
            assert words in str(explain_os_error(error, "x", reading=reading))
        outer = RuntimeError("wrapped")
        outer.__cause__ = error
        assert words in (limit_of(outer) or "")
    assert "cannot be read (" in str(explain_os_error(OSError(5, "Input/output error"), "x", reading=True))


def test_too_many_open_files_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")

    def refuse(*a: object, **k: object) -> None:
        raise OSError(24, "Too many open files")

    from pipeline.data.readers import text

    monkeypatch.setattr(text, "open_retrying", refuse)
    with pytest.raises(UserError, match=r"a\.txt: too many open files, a process may have [\d,]+ here; raise that"):
        read_all(tmp_path / "a.txt")
