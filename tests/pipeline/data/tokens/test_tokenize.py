"""Stage tokenize and the index: every token is counted, other tools can read them, damage and mismatches are reported."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.data.documents.read import DocumentIndex, fingerprint_of, read_shard
from pipeline.data.loading.reader import TokenReader
from pipeline.data.tar import TarWriter
from pipeline.data.tokens.index import TokenIndex, dtype_for
from pipeline.data.tokens.pack import Concat
from pipeline.data.tokens.tokenize import _Blocks, npy_bytes, tokenize_documents
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


@pytest.mark.parametrize(
    "change",
    [
        {"context_length": "x"}, {"context_length": -5}, {"context_length": 10**12}, {"block_sequences": 0},
        {"dtype": "object"}, {"tokenizer": []}, {"splits": 3}, {"shards": [5]}, {"offsets": [-1]}, {"offsets": [10**30]},
        {"sequences": 10**15}, {"block_sha256": []}, {"sequences": "x"},
    ],
)  # fmt: skip
def test_an_index_with_impossible_values_is_refused(
    finished: tuple[RunConfig, RunPaths], tmp_path: Path, change: dict[str, Any]
) -> None:
    """Also where somebody has made its fingerprint right: nobody may allocate, seek or divide by them."""
    tree = json.loads((finished[1].tokens / "index.json").read_bytes())
    if change.keys() & tree.keys():
        tree |= change
    else:
        tree["shards"] = [{**shard, **change} for shard in tree["shards"]]
    (tmp_path / "index.json").write_text(json.dumps({**tree, "fingerprint": fingerprint_of(tree)}))
    with pytest.raises(UserError, match=r"index.json: not a token index"):
        TokenIndex.load(tmp_path)


@pytest.mark.parametrize(
    ("keep_rest", "sha256", "dropped"),
    [
        (False, "139cda55ca8fa43f43911c269ba7a477de58d1e135588eb85a786155aaffb423", 23),
        (True, "1baa9c7ed1d423f059c1e531b668ecde9e122110baeaa1bc1990b676132cf781", 0),
    ],
)
def test_concatenated_tokens_have_not_changed(keep_rest: bool, sha256: str, dropped: int, tmp_path: Path) -> None:
    """Hashes of what the first version of the stage wrote: a corpus tokenized then is the same corpus now."""
    rng = np.random.Generator(np.random.PCG64(7))
    documents = [rng.integers(4, 30000, int(n)).astype(np.uint16) for n in rng.integers(1, 900, 60)]
    packer = Concat(64, 16, dtype="uint16", keep_rest=keep_rest)
    with TarWriter(tmp_path / "train-000000.tar") as tar:
        blocks = _Blocks(tar, "train-000000.tar", boundaries=False)
        for document in documents:
            for block in packer.add(document, np.array([len(document)])):
                blocks.write(block)
        for block in packer.finish():
            blocks.write(block)
        assert tar.publish()["sha256"] == sha256
    assert blocks.facts["offsets"][-1] == 86656 and packer.counts()["tokens_dropped"] == dropped


@pytest.mark.parametrize("packing", ["concat", "best-fit", "pad"])
def test_every_way_of_packing_holds_every_document(
    packing: str, tmp_path: Path, corpus: Path, make_config: MakeConfig, finished: tuple[RunConfig, RunPaths]
) -> None:
    """From the files alone, with stock numpy and tarfile: segments are documents, or parts of them that join."""
    paths = copy_of(finished, tmp_path)
    settings = {"packing": packing, "boundaries": True, "remainder": "pad"}
    tokenize_documents(make_config(tmp_path, str(corpus), tokens=settings), paths)
    tree = json.loads((paths.tokens / "index.json").read_text())
    assert tree["packing"] == packing and tree["boundaries"]
    index, tokenizer = DocumentIndex.load(paths.documents), Tokenizer.load(paths.tokenizer)
    for shard in tree["shards"]:
        (source,) = [s for s in index.shards if s["name"] == shard["name"]]
        texts = [document.text for document in read_shard(paths.documents, source)]
        expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        arrays = members_of(paths.tokens / shard["name"])
        rows = np.concatenate([array for name, array in arrays.items() if ".tokens." in name])
        segments = np.concatenate([array for name, array in arrays.items() if ".segments." in name])
        assert rows.shape == segments.shape == (shard["sequences"], 17) and segments.dtype == np.uint16
        assert ((segments == 0) == (rows == 0)).all()
        parts = [
            row[marks == number].tolist()
            for row, marks in zip(rows, segments, strict=True)
            for number in range(1, int(marks.max()) + 1)
        ]
        if packing == "concat":
            stream = [token for document in expected for token in document]
            assert [*parts[0][:1], *(t for row in rows for t in row[1:] if t)] == stream
            ends = sum(part[-1] == tokenizer.eos_id and len(part) > 1 for part in parts)
            assert len(expected) <= ends + sum(len(document) == 1 for document in expected)
            continue
        wanted = Counter(tuple(piece) for document in expected for piece in pieces_of(document, 16))
        assert Counter(map(tuple, parts)) == wanted
        assert packing == "best-fit" or segments.max() == 1
    for counts in tree["splits"].values():
        assert counts["tokens_dropped"] == 0 and counts["tokens_in"] == counts["tokens"]


def pieces_of(document: list[int], context: int) -> list[list[int]]:
    """The first piece takes the tokens that full rows leave; each next one begins with the last token of the one before."""
    first = len(document) - context * max(0, -(-(len(document) - context - 1) // context))
    starts = range(first - 1, len(document) - 1, context)
    return [document[:first], *(document[start : start + context + 1] for start in starts)]


def members_of(path: Path) -> dict[str, Any]:
    with tarfile.open(path) as archive:
        return {
            info.name: np.load(io.BytesIO(archive.extractfile(info).read()))  # type: ignore[union-attr]
            for info in archive
        }


@pytest.mark.parametrize("boundaries", [False, True])
def test_the_index_agrees_with_the_files(
    boundaries: bool, tmp_path: Path, corpus: Path, make_config: MakeConfig, finished: tuple[RunConfig, RunPaths]
) -> None:
    paths = copy_of(finished, tmp_path)
    tokenize_documents(make_config(tmp_path, str(corpus), tokens={"boundaries": boundaries}), paths)
    tree = json.loads((paths.tokens / "index.json").read_text())
    for shard in tree["shards"]:
        data = (paths.tokens / shard["name"]).read_bytes()
        assert len(data) == shard["bytes"] and hashlib.sha256(data).hexdigest() == shard["sha256"]
        assert ("segment_offsets" in shard) == ("segment_sha256" in shard) == boundaries
        left = shard["sequences"]
        assert len(shard["offsets"]) == len(shard["block_sha256"]) == -(-left // 8)
        for block, start in enumerate(shard["offsets"]):
            size = min(left, 8) * 17 * 2
            left -= 8
            assert hashlib.sha256(data[start : start + size]).hexdigest()[:32] == shard["block_sha256"][block]
            if boundaries:
                start = shard["segment_offsets"][block]
                assert hashlib.sha256(data[start : start + size]).hexdigest()[:32] == shard["segment_sha256"][block]
    copied = (paths.tokens / tree["tokenizer"]["name"]).read_bytes()
    assert copied == paths.tokenizer.read_bytes() and len(copied) == tree["tokenizer"]["bytes"]
    assert hashlib.sha256(copied).hexdigest() == tree["tokenizer"]["sha256"] == tree["tokenizer_sha256"]
    documents, tokenizer = DocumentIndex.load(paths.documents), Tokenizer.load(paths.tokenizer)
    for split, counts in tree["splits"].items():
        texts = [d.text for shard in documents.of_split(split) for d in read_shard(paths.documents, shard)]
        lengths = [len(tokenizer.encode(text)) + 1 for text in texts]
        histogram = [sum(2**i <= length < 2 ** (i + 1) for length in lengths) for i in range(40)]
        assert counts["length_histogram"] == histogram and counts["documents"] == len(texts)
        assert counts["words"] == sum(len(text.split()) for text in texts) and counts["tokens_in"] == sum(lengths)


def test_boundaries_do_not_change_the_tokens(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, finished: tuple[RunConfig, RunPaths]
) -> None:
    paths = copy_of(finished, tmp_path)
    tokenize_documents(make_config(tmp_path, str(corpus), tokens={"boundaries": True}), paths)
    for name in (shard.name for shard in TokenIndex.load(paths.tokens).shards):
        ours, plain = members_of(paths.tokens / name), members_of(finished[1].tokens / name)
        assert all(np.array_equal(ours[member], array) for member, array in plain.items()) and len(ours) == 2 * len(
            plain
        )


def test_a_context_too_long_for_boundaries(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, finished: tuple[RunConfig, RunPaths]
) -> None:
    paths = copy_of(finished, tmp_path)
    config = make_config(tmp_path, str(corpus), context_length=65_535, tokens={"boundaries": True})
    with pytest.raises(UserError, match=r"tokens\.boundaries: .* context of 65534, model\.context_length is 65535"):
        tokenize_documents(config, paths)


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


def test_finished_shards_are_kept_and_damage_is_repaired(
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
    with pytest.raises(UserError, match=r"train-000001\.tar: \d+ bytes, its index says \d+: truncated"):
        index.verify()
    path.unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar: missing"):
        index.verify()
    tree = json.loads((tmp_path / "tokens" / "index.json").read_text())
    for change, message in [
        ({"context_length": 8}, "fingerprint does not match"),
        ({"schema_version": 99}, "schema_version 99, this program reads 2"),
    ]:
        (tmp_path / "tokens" / "index.json").write_text(json.dumps({**tree, **change}))
        with pytest.raises(UserError, match=message):
            TokenIndex.load(tmp_path / "tokens")
    (tmp_path / "tokens" / "index.json").write_text('{"schema_version": 2, "cont')
    with pytest.raises(UserError, match="not valid JSON"):
        TokenIndex.load(tmp_path / "tokens")
    with pytest.raises(UserError, match="pipe: URLs"):
        TokenIndex.load("pipe:cat")
