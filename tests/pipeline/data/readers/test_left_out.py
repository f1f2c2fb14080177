"""Hidden entries and our own outputs in a folder or glob are never input, and are counted."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest

from pipeline.config.data import Source
from pipeline.data.readers.sources import Listing, list_sources
from pipeline.errors import UserError


def listing(*urls: Path | str, outputs: tuple[str, ...] = ()) -> Listing:
    return list_sources([Source(url=str(url)) for url in urls], outputs=outputs)


def names(found: Listing, root: Path | str) -> list[str]:
    return [file.url.removeprefix(f"{root}/") for file in found.files]


def write(root: Path, *paths: str) -> None:
    for name in paths:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"text": "a"}')


HIDDEN = (".ipynb_checkpoints/a.jsonl", ".cache/deep/b.txt", "._a.jsonl", "in/.b.txt", "in/.git/c.md")


def test_hidden_entries_are_left_out_of_folders_and_globs_and_counted(tmp_path: Path) -> None:
    root = tmp_path / ".data" / "corpus"  # a hidden folder above the source does not matter
    write(root, "a.jsonl", "in/b.txt", *HIDDEN)
    for url in (root, f"{root}/", f"file://{root}", f"{root}/**/*.*"):
        found = listing(url)
        assert names(found, root) == ["a.jsonl", "in/b.txt"]
        assert {os.path.relpath(path, root) for path in found.hidden} == {
            ".ipynb_checkpoints", ".cache", "._a.jsonl", "in/.b.txt", "in/.git"
        }  # fmt: skip
    assert names(listing(f"{root}/*.jsonl"), root) == ["a.jsonl"]


def test_hidden_entries_that_are_named_are_read(tmp_path: Path) -> None:
    write(tmp_path, *HIDDEN)
    assert names(listing(tmp_path / "._a.jsonl"), tmp_path) == ["._a.jsonl"]
    assert names(listing(tmp_path / ".cache"), tmp_path) == [".cache/deep/b.txt"]
    assert names(listing(f"{tmp_path}/.cache/**/*.txt"), tmp_path) == [".cache/deep/b.txt"]
    assert names(listing(f"{tmp_path}/**/.git/*.md"), tmp_path) == ["in/.git/c.md"]
    with pytest.raises(UserError, match=r"matches no file; hidden entries \(.*\) are read only where"):
        listing(f"{tmp_path}/*.jsonl")


def test_hidden_entries_of_a_store(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    for name in ("a.jsonl", "in/b.txt", *HIDDEN):
        files.pipe_file(f"/hidden-store/{name}", b"x")
    for url in ("memory://hidden-store", "memory://hidden-store/**/*.*"):
        found = listing(url)
        assert [file.name for file in found.files] == ["hidden-store/a.jsonl", "hidden-store/in/b.txt"]
        assert len(found.hidden) == 5
    files.rm("/hidden-store", recursive=True)


RUN = ("report/data.html", "documents/removed/000000.jsonl.zst", "logs/metrics.jsonl", "bundle/README.md")


@pytest.mark.parametrize("glob", ["", "/**/*.*"])
def test_the_outputs_of_this_run_are_not_input(tmp_path: Path, glob: str) -> None:
    root = tmp_path / "corpus"
    write(root, "a.txt", *(f"run/{name}" for name in RUN), "out/documents/removed/0.jsonl", "out/mine.txt")
    (tmp_path / "link").symlink_to(root)
    for name in (root, tmp_path / "link"):
        outputs = (f"{tmp_path}/link/run", f"file://{root}/out/documents/")
        found = listing(f"{name}{glob}", outputs=outputs)
        assert names(found, name) == ["a.txt", "out/mine.txt"]
        assert {os.path.relpath(path, name) for path in found.ours} == {"run", "out/documents"}


def test_the_outputs_of_other_runs_are_known_by_their_marks(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", *(f"runs/x/{name}" for name in RUN), "runs/x/.lock", "runs/x/stages/shard.json")
    write(tmp_path, "elsewhere/index.json", "elsewhere/removed/000000.jsonl.zst", "mlartifacts/1/data.html")
    write(tmp_path, "copy/README.md", "copy/g_lm.safetensors", "documents/b.txt", "report/c.html", "README.md")
    write(tmp_path, "sweep/report/sweep.html", "sweep/report/sweep.json")
    found = listing(tmp_path)
    assert names(found, tmp_path) == ["README.md", "a.txt", "documents/b.txt", "report/c.html"]
    assert {os.path.relpath(path, tmp_path) for path in found.ours} == {
        "runs/x", "elsewhere/removed", "mlartifacts", "copy/README.md", "sweep/report/sweep.html"
    }  # fmt: skip
    with pytest.raises(UserError, match="matches only what pldr itself wrote"):
        listing(tmp_path / "runs")
    assert names(listing(tmp_path / "runs/x/report/data.html"), tmp_path) == ["runs/x/report/data.html"]


def test_a_corpus_that_was_put_into_a_run_directory(tmp_path: Path) -> None:
    write(tmp_path, *RUN, ".lock", "stages/shard.json", "corpus/a.txt")
    for outputs in ((), (str(tmp_path),)):
        assert names(listing(tmp_path, outputs=outputs), tmp_path) == ["corpus/a.txt"]
        assert names(listing(tmp_path / "corpus", outputs=outputs), tmp_path) == ["corpus/a.txt"]


def test_a_nested_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.txt", "in/closed/b.txt")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for url in (f"{tmp_path}", f"{tmp_path}/**/*.txt"):
        with pytest.raises(UserError, match="Permission denied"):
            listing(url)
