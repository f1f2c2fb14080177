"""Verifying documents and tokens: every checksum that matters, and errors that name the damaged file."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.data.documents.read import DocumentIndex, fingerprint_of, read_shard
from pipeline.data.inspect.show import read_sequence
from pipeline.data.inspect.verify import folder_of, verify
from pipeline.data.tar import TarWriter
from pipeline.data.tokens.index import TokenIndex
from pipeline.errors import UserError
from pipeline.io.storage import publish_json, read_json

Finished = tuple[RunConfig, RunPaths]
Run = tuple[str, str]


def quiet(text: str) -> None:
    pass


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_verify_counts_everything(finished: Finished) -> None:
    said: list[str] = []
    result = verify(str(finished[1].documents), str(finished[1].tokens), said.append)
    documents = DocumentIndex.load(finished[1].documents)
    assert result["documents"]["documents"] == documents.tree["counts"]["documents_written"]
    assert result["documents"]["files"] == len(documents.shards) + len(documents.tree["removed"])
    assert result["tokens"]["blocks"] == sum(len(s.offsets) for s in TokenIndex.load(finished[1].tokens).shards)
    assert len(said) == 2 and all("all checksums match" in line for line in said)


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
@pytest.mark.parametrize("name", ["documents/train-*.tar", "tokens/val-*.tar", "tokens/tokenizer.model"])
def test_verify_names_what_is_damaged(copied: Run, name: str, how: str) -> None:
    path = next(Path(copied[0]).parent.glob(name))
    data = path.read_bytes()
    if how == "flip":
        flip(path, len(data) // 2)
    elif how == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with pytest.raises(UserError, match=path.name) as error:
        verify(*copied, quiet)
    assert "\n" not in str(error.value) and "pldr" in str(error.value)


@pytest.mark.parametrize("folder", [0, 1])
@pytest.mark.parametrize("name", ["train-000099.tar", "val-000001-copy.tar", "old.tar"])
def test_a_stray_tar_is_told(copied: Run, folder: int, name: str) -> None:
    source = next(Path(copied[folder]).glob("train-*.tar"))
    (Path(copied[folder]) / name).write_bytes(source.read_bytes())
    with pytest.raises(UserError, match=rf"{name}: not in the index: who reads every tar"):
        verify(*copied, quiet)


def test_a_stray_tar_of_a_store_is_told(copied: Run) -> None:
    files = fsspec.filesystem("memory")
    for path in Path(copied[1]).iterdir():
        files.pipe_file(f"/stray-store/{path.name}", path.read_bytes())
    verify(None, "memory://stray-store", quiet)
    files.pipe_file("/stray-store/train-000077.tar", b"x")
    with pytest.raises(UserError, match=r"train-000077\.tar: not in the index"):
        verify(None, "memory://stray-store", quiet)
    files.rm("/stray-store", recursive=True)


@pytest.mark.parametrize("folder", [0, 1])
def test_verify_knows_a_changed_index(copied: Run, folder: int) -> None:
    path = Path(copied[folder]) / "index.json"
    tree = json.loads(path.read_text())
    tree["splits"]["train"]["documents"] += 1
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="its fingerprint does not match"):
        verify(*copied, quiet)


def test_verify_compares_each_document_with_its_own_hash(copied: Run) -> None:
    """A shard and an index that fit one another, around a document that is not what its .json says."""
    folder = Path(copied[0])
    tree = read_json(folder / "index.json")
    shard = tree["shards"][0]
    documents = list(read_shard(folder, shard))
    with TarWriter(folder / shard["name"]) as tar:
        for number, document in enumerate(documents):
            text = document.text.upper() if number == 2 else document.text
            tar.add(f"{document.key}.txt", text.encode())
            tar.add(f"{document.key}.json", json.dumps(document.meta).encode())
        facts = tar.publish()
    shard |= {"bytes": facts["size"], "sha256": facts["sha256"]}
    publish_json(folder / "index.json", {**tree, "fingerprint": fingerprint_of(tree)})
    with pytest.raises(UserError, match=f"{documents[2].key}.txt does not match"):
        verify(copied[0], None, quiet)


def test_verify_knows_tokens_of_other_documents(copied: Run) -> None:
    tree = read_json(Path(copied[1]) / "index.json")
    tree["documents_fingerprint"] = "0" * 64
    publish_json(Path(copied[1]) / "index.json", {**tree, "fingerprint": fingerprint_of(tree)})
    verify(None, copied[1], quiet)
    with pytest.raises(UserError, match="tokens of documents 0000"):
        verify(*copied, quiet)


def test_urls_work_like_folders(copied: Run) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(Path(copied[0]).parent), "look", recursive=True)
    try:
        urls = "memory://look/documents", "memory://look/tokens"
        assert verify(*urls, quiet)["tokens"]["sequences"] == verify(*copied, quiet)["tokens"]["sequences"]
        local, remote = TokenIndex.load(copied[1]), TokenIndex.load(urls[1])
        assert np.array_equal(read_sequence(local, "train", 5).ids, read_sequence(remote, "train", 5).ids)
        name = f"/look/tokens/{local.shards[0].name}"
        data = bytearray(memory.cat_file(name))
        data[len(data) // 2] ^= 1
        memory.pipe_file(name, bytes(data))
        with pytest.raises(UserError, match=local.shards[0].name):
            verify(*urls, quiet)
    finally:
        memory.rm("look", recursive=True)


def test_an_index_may_be_named_by_its_file() -> None:
    assert (
        folder_of("s3://bucket/run/tokens/index.json")
        == folder_of("s3://bucket/run/tokens/")
        == "s3://bucket/run/tokens"
    )
    assert folder_of("index.json") == "."


def test_an_index_of_documents_or_of_another_shape_is_reported(
    tmp_path: Path, finished: tuple[RunConfig, RunPaths]
) -> None:
    _, paths = finished
    with pytest.raises(UserError, match="an index of documents, not of tokens; name the folder"):
        TokenIndex.load(paths.documents)
    tree = json.loads((paths.tokens / "index.json").read_text())
    for change in ("shards", "offsets"):
        other = json.loads(json.dumps(tree))
        other.pop(change, None) or other["shards"][0].pop(change)
        (tmp_path / "index.json").write_text(json.dumps(other | {"fingerprint": fingerprint_of(other)}))
        with pytest.raises(UserError, match=f"not a token index .*{change}.*pldr tokenize"):
            TokenIndex.load(tmp_path)


def test_folders_in_place_of_files_and_cut_shards_name_the_fix(
    tmp_path: Path, finished: tuple[RunConfig, RunPaths]
) -> None:
    _, paths = finished
    (tmp_path / "index.json").mkdir()
    with pytest.raises(UserError, match="is a folder, a file is expected"):
        TokenIndex.load(tmp_path)
    (tmp_path / "index.json").rmdir()
    (tmp_path / "index.json").write_bytes((paths.tokens / "index.json").read_bytes())
    index = TokenIndex.load(tmp_path)
    shard = tmp_path / index.of_split("train")[0].name
    shard.write_bytes((paths.tokens / shard.name).read_bytes()[:700])
    with pytest.raises(UserError, match=f"{shard.name}.*it was truncated; run `pldr tokenize` again"):
        read_sequence(index, "train", 3)
    shard.unlink()
    shard.mkdir()
    with pytest.raises(UserError, match=f"{shard.name}.*; run `pldr tokenize` again"):
        read_sequence(index, "train", 3)
