"""Stage tokenize and the index: every token accounted for, readable by others, damage and mismatches named."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import RunConfig, RunPaths
from pipeline.data.documents import DocumentIndex, read_shard
from pipeline.data.index import TokenIndex, dtype_for
from pipeline.data.loader import TokenReader
from pipeline.data.tokenize import Packer, npy_bytes, tokenize_documents
from pipeline.errors import UserError
from pipeline.tokenizer import Tokenizer

MakeConfig = Callable[..., RunConfig]
Contents = Callable[[Path], dict[str, bytes]]


def copy_of(finished: tuple[RunConfig, RunPaths], root: Path) -> RunPaths:
    """Documents and tokenizer of the finished run, under another root."""
    paths = RunPaths(root)
    shutil.copytree(finished[1].documents, paths.documents)
    shutil.copytree(finished[1].tokenizer.parent, paths.tokenizer.parent)
    return paths


@given(
    st.lists(st.integers(0, 60), max_size=12),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([None, 0]),
    st.data(),
)
def test_packing_loses_nothing(
    lengths: list[int], context: int, block: int, pad_id: int | None, data: st.DataObject
) -> None:
    """The sequences are the stream, in order, each sharing one token with the next; the rest is counted."""
    documents = [np.arange(1, n + 1, dtype=np.uint16) + 100 * i for i, n in enumerate(lengths)]
    stream = np.concatenate([np.empty(0, np.uint16), *documents])
    packer = Packer(context, block, dtype="uint16")
    blocks = [b for document in documents for b in packer.add(document)] + list(packer.finish(pad_id=pad_id))
    counts = packer.counts()
    assert all(b.shape[1] == context + 1 and b.dtype == np.uint16 for b in blocks)
    assert all(len(b) == block for b in blocks[:-1]) and all(1 <= len(b) <= block for b in blocks[-1:])
    assert counts["tokens_in"] == len(stream) == counts["tokens"] + counts["tokens_dropped"]
    rows = np.concatenate(blocks) if blocks else np.empty((0, context + 1), np.uint16)
    assert counts["sequences"] == len(rows)
    if len(rows):
        assert np.array_equal(rows[1:, 0], rows[:-1, -1])
        rebuilt = np.concatenate([rows[0, :1], rows[:, 1:].ravel()])
        kept = len(rebuilt) - counts["tokens_padded"]
        assert np.array_equal(rebuilt[:kept], stream[:kept]) and not rebuilt[kept:].any()
        assert counts["tokens"] == kept and counts["tokens_dropped"] == len(stream) - kept < context
    if pad_id is not None and len(stream) > 1:
        assert counts["tokens_dropped"] == 0 and counts["tokens_padded"] < context
    if pad_id is None:
        assert counts["tokens_padded"] == 0


def test_tokens_are_the_documents_with_eos(finished: tuple[RunConfig, RunPaths]) -> None:
    config, paths = finished
    index, documents = TokenIndex.load(paths.tokens), DocumentIndex.load(paths.documents)
    tokenizer = Tokenizer.load(paths.tokenizer)
    for shard in documents.of_split("train"):
        texts = [document.text for document in read_shard(paths.documents, shard)]
        stream = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eos_id]]
        (ours,) = [s for s in index.of_split("train") if s.name == shard["name"]]
        first = sum(s.sequences for s in index.of_split("train")[: index.of_split("train").index(ours)])
        rows = TokenReader(index, "train").read(range(first, first + ours.sequences))
        assert np.concatenate([rows[0, :1], rows[:, 1:].ravel()]).tolist() == stream[: ours.tokens]
        assert len(stream) - ours.tokens < config.model.context_length
        assert ours.documents == len(texts) and ours.text_bytes == sum(len(text.encode()) for text in texts)
    for counts in index.splits.values():
        assert counts["tokens_in"] == counts["tokens"] + counts["tokens_dropped"] and counts["tokens_padded"] == 0


def test_stock_webdataset_reads_token_tars(
    finished: tuple[RunConfig, RunPaths], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webdataset.utils, "enforce_security", True)
    paths = finished[1]
    index = TokenIndex.load(paths.tokens)
    urls = [str(paths.tokens / shard.name) for shard in index.of_split("train")]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode())
    rows = np.concatenate([sample["tokens.npy"] for sample in samples])
    assert rows.dtype == np.uint16 and len({sample["__key__"] for sample in samples}) == len(samples)
    assert np.array_equal(rows, TokenReader(index, "train").read(range(index.num_sequences("train"))))


@pytest.mark.parametrize("workers", [1, 3])
def test_token_bytes_do_not_depend_on_workers_or_on_the_run(
    workers: int,
    tmp_path: Path,
    corpus: Path,
    make_config: MakeConfig,
    finished: tuple[RunConfig, RunPaths],
    contents: Contents,
) -> None:
    paths = copy_of(finished, tmp_path)
    tokenize_documents(make_config(tmp_path, str(corpus), tokens={"workers": workers}), paths)
    assert contents(paths.tokens) == contents(finished[1].tokens)


def test_padding_keeps_every_token(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, finished: tuple[RunConfig, RunPaths]
) -> None:
    paths = copy_of(finished, tmp_path)
    dropped = sum(counts["tokens_dropped"] for counts in TokenIndex.load(finished[1].tokens).splits.values())
    assert dropped > 0
    tokenize_documents(make_config(tmp_path, str(corpus), tokens={"remainder": "pad"}), paths)
    index = TokenIndex.load(paths.tokens)
    for counts in index.splits.values():
        assert counts["tokens_in"] == counts["tokens"] and counts["tokens_dropped"] == 0
    rows = TokenReader(index, "val").read(range(index.num_sequences("val")))
    assert (rows == 0).sum() == index.splits["val"]["tokens_padded"] > 0


def test_finished_shards_are_kept_and_damage_is_not_believed(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, finished: tuple[RunConfig, RunPaths], contents: Contents
) -> None:
    paths, config = copy_of(finished, tmp_path), make_config(tmp_path, str(corpus))
    tokenize_documents(config, paths)
    stamps = {path.name: path.stat().st_mtime_ns for path in paths.tokens.glob("*.tar")}
    (paths.tokens / "val-000001.tar").unlink()
    with open(paths.tokens / "train-000000.tar", "r+b") as stream:
        stream.seek(1000)
        stream.write(b"\xff\xff")
    tokenize_documents(config, paths)
    assert contents(paths.tokens) == contents(finished[1].tokens)
    again = {path.name: path.stat().st_mtime_ns for path in paths.tokens.glob("*.tar")}
    assert {name for name in stamps if stamps[name] != again[name]} == {"val-000001.tar", "train-000000.tar"}


def test_other_settings_give_other_tokens_and_leave_nothing_behind(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, finished: tuple[RunConfig, RunPaths]
) -> None:
    paths = copy_of(finished, tmp_path)
    tokenize_documents(make_config(tmp_path, str(corpus)), paths)
    result = tokenize_documents(make_config(tmp_path, str(corpus), context_length=24), paths)
    index = TokenIndex.load(paths.tokens)
    index.verify()
    assert index.context_length == 24 and result["fingerprint"] != TokenIndex.load(finished[1].tokens).fingerprint


def test_uint32_for_large_vocabularies() -> None:
    assert (dtype_for(65536), dtype_for(65537)) == ("uint16", "uint32")
    block = np.array([[70_000, 3]], dtype=np.uint32)
    header, payload = npy_bytes(block)
    assert np.array_equal(np.load(io.BytesIO(header + payload), allow_pickle=False), block)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"context_length": 32}, "tokens of context length 16, model.context_length is 32; .*model.context_length=16"),
        ({"tokenizer_sha256": "ab" * 32}, "this one is abababababab"),
        ({"vocab_size": 200}, "a vocabulary of 330, model.vocab_size is 200; .*model.vocab_size=330"),
    ],
)
def test_mismatches_name_both_values(asked: dict[str, Any], message: str, finished: tuple[RunConfig, RunPaths]) -> None:
    index = TokenIndex.load(finished[1].tokens)
    index.check(context_length=16, tokenizer_sha256=Tokenizer.load(finished[1].tokenizer).sha256, vocab_size=400)
    with pytest.raises(UserError, match=message):
        index.check(**asked)


def test_a_tokenizer_larger_than_the_model_is_refused(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, finished: tuple[RunConfig, RunPaths]
) -> None:
    paths = copy_of(finished, tmp_path)
    with pytest.raises(UserError, match=r"330 pieces, but model\.vocab_size is 300"):
        tokenize_documents(make_config(tmp_path, str(corpus), vocab_size=300), paths)


def test_a_split_too_short_for_one_sequence(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, finished: tuple[RunConfig, RunPaths]
) -> None:
    paths = copy_of(finished, tmp_path)
    with pytest.raises(UserError, match=r"the (train|val) split has \d+ tokens, too few for one sequence of 100001"):
        tokenize_documents(make_config(tmp_path, str(corpus), context_length=100_000), paths)
    with pytest.raises(UserError, match="run `pldr tokenize` first"):
        TokenIndex.load(paths.tokens)


def test_damaged_documents_stop_tokenizing_with_their_name(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, finished: tuple[RunConfig, RunPaths]
) -> None:
    paths = copy_of(finished, tmp_path)
    victim = paths.documents / "train-000001.tar"
    victim.write_bytes(victim.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"train-000001\.tar: 5000 bytes, its index says"):
        tokenize_documents(make_config(tmp_path, str(corpus)), paths)
    assert not (paths.tokens / "index.json").exists()


def test_damaged_tokens_and_indexes_are_named(finished: tuple[RunConfig, RunPaths], tmp_path: Path) -> None:
    shutil.copytree(finished[1].tokens, tmp_path / "tokens")
    index = TokenIndex.load(tmp_path / "tokens")
    index.verify()
    path = tmp_path / "tokens" / "train-000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    with pytest.raises(UserError, match=r"train-000001\.tar: its sha256 is not the one in its index"):
        index.verify()
    path.write_bytes(whole[:-512])
    with pytest.raises(UserError, match=r"train-000001\.tar: \d+ bytes, its index says \d+: cut"):
        index.verify()
    path.unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar: missing"):
        index.verify()
    tree = json.loads((tmp_path / "tokens" / "index.json").read_text())
    for change, message in [
        ({"context_length": 8}, "fingerprint does not fit"),
        ({"schema_version": 99}, "schema_version 99, this program reads 1"),
    ]:
        (tmp_path / "tokens" / "index.json").write_text(json.dumps({**tree, **change}))
        with pytest.raises(UserError, match=message):
            TokenIndex.load(tmp_path / "tokens")
    (tmp_path / "tokens" / "index.json").write_text('{"schema_version": 1, "cont')
    with pytest.raises(UserError, match="not valid JSON"):
        TokenIndex.load(tmp_path / "tokens")
    with pytest.raises(UserError, match="pipe: URLs"):
        TokenIndex.load("pipe:cat")
