"""Showing sequences as text without losing anything, and verifying every checksum."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.data.documents.read import DocumentIndex, fingerprint_of, read_shard
from pipeline.data.inspect.show import Sequence, Span, as_text, read_sequence, spans, tokenizer_of, visible
from pipeline.data.inspect.verify import folder_of, verify
from pipeline.data.loading.reader import TokenReader
from pipeline.data.tar import TarWriter
from pipeline.data.tokens.index import TokenIndex
from pipeline.data.tokens.tokenize import tokenize_documents
from pipeline.errors import UserError
from pipeline.io.storage import publish_json, read_json
from pipeline.tokenizer import Tokenizer

Finished = tuple[RunConfig, RunPaths]
Run = tuple[str, str]


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Run:
    """Documents and tokens of the finished run, to damage."""
    for name in ("documents", "tokens"):
        shutil.copytree(finished[1].root / name, tmp_path / name)
    return str(tmp_path / "documents"), str(tmp_path / "tokens")


def quiet(text: str) -> None:
    pass


def test_a_sequence_is_what_the_loader_reads(finished: Finished) -> None:
    index = TokenIndex.load(finished[1].tokens)
    for split in ("train", "val"):
        reader, total = TokenReader(index, split), index.num_sequences(split)
        for number in {0, 7, 8, total // 2, total - 1}:
            sequence = read_sequence(index, split, number)
            assert sequence.ids == tuple(reader.read([number])[0].tolist())
            shard = next(shard for shard in index.shards if shard.name == sequence.shard)
            before = sum(s.sequences for s in index.of_split(split)[: index.of_split(split).index(shard)])
            assert number == before + sequence.block * index.block_sequences + sequence.row


def test_what_is_shown_is_the_documents_with_their_ends(finished: Finished) -> None:
    """All sequences of a shard, joined, are its documents' texts, with one mark after each."""
    index, paths = TokenIndex.load(finished[1].tokens), finished[1]
    shard = index.of_split("val")[0]
    rows = [read_sequence(index, "val", number).ids for number in range(shard.sequences)]
    ids = (rows[0][0], *(token for row in rows for token in row[1:]))
    whole = Sequence("val", 0, 1, shard.name, 0, 0, ids, None)
    (entry,) = [s for s in DocumentIndex.load(paths.documents).shards if s["name"] == shard.name]
    texts = [document.text for document in read_shard(paths.documents, entry)]
    found = list(spans(whole, tokenizer_of(index)))
    ends = [number for number, span in enumerate(found) if span == Span("end")]
    assert [found[number - 1] for number in ends] == [Span("text", text) for text in texts[: len(ends)]]
    assert len(ends) >= len(texts) - 1 and {span.kind for span in found} == {"text", "end"}


def sequence_of(*ids: int, segments: tuple[int, ...] | None = None) -> Sequence:
    return Sequence("train", 0, 1, "train-000000.tar", 0, 0, ids, segments)


def test_bytes_padding_special_pieces_and_cut_documents_have_marks(finished: Finished) -> None:
    tokenizer = Tokenizer.load(finished[1].tokenizer)
    byte = {tokenizer.byte(token): token for token in range(tokenizer.vocab_size)}
    day, book = ([byte[b] for b in character.encode()] for character in "日本")
    assert [*spans(sequence_of(*day, *book), tokenizer)] == [Span("text", "日本")]
    cut = sequence_of(*day[1:], *book, *day[:1], tokenizer.eos_id, *book[:2])
    assert [*spans(cut, tokenizer)] == [
        *(Span("byte", "97"), Span("byte", "A5"), Span("text", "本"), Span("byte", "E6")),
        *(Span("end"), Span("byte", "E6 9C")),
    ]
    a, b = tokenizer.encode("a")[-1], tokenizer.encode("b")[-1]
    rest = sequence_of(tokenizer.bos_id, a, tokenizer.unk_id, 10**6, a, 0, 0, 0)
    kinds = [(span.kind, span.text) for span in spans(rest, tokenizer)]
    assert kinds[0] == ("special", "[START]") and kinds[2:4] == [("special", "[UNK]"), ("special", "id 1000000")]
    assert kinds[-1] == ("pad", "3")
    two = sequence_of(a, b, tokenizer.eos_id, b, 0, segments=(1, 2, 2, 3, 0))
    assert [span.kind for span in spans(two, tokenizer)] == ["text", "cut", "text", "end", "text", "pad"]
    assert [span.kind for span in spans(replace(two, segments=None), tokenizer)] == ["text", "end", "text", "pad"]
    assert as_text(spans(two, tokenizer)).endswith("b ⏎ end of document\nb[1 x padding]")


def test_a_tokenizer_with_a_leading_space_shows_no_extra_space_after_an_end(tmp_path: Path) -> None:
    import io

    import sentencepiece

    from pipeline.data.tokens.train_tokenizer import SPECIAL_PIECES
    from pipeline.tokenizer import SPECIAL_IDS

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three four five six seven eight nine ten"] * 50),
        model_writer=model, vocab_size=290, byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
        **{f"{k}_id": v for k, v in SPECIAL_IDS.items()}, **{f"{k}_piece": v for k, v in SPECIAL_PIECES.items()},
    )  # fmt: skip
    tokenizer = Tokenizer.from_bytes(model.getvalue(), path=tmp_path)
    ids = [*tokenizer.encode("one two"), tokenizer.eos_id, *tokenizer.encode("three four"), tokenizer.eos_id]
    assert [*spans(sequence_of(*ids), tokenizer)][2] == Span("text", "three four")


def test_documents_that_packing_cut_are_distinguished(finished: Finished, tmp_path: Path) -> None:
    """best-fit with boundaries: wherever the document changes without an end there is a mark, and only there."""
    config, paths = finished
    tokens = config.tokens.model_copy(update={"packing": "best-fit", "boundaries": True})
    shutil.copytree(paths.documents, tmp_path / "documents")
    shutil.copytree(paths.tokenizer.parent, tmp_path / "tokenizer")
    tokenize_documents(config.model_copy(update={"tokens": tokens}), RunPaths(tmp_path))
    index = TokenIndex.load(tmp_path / "tokens")
    tokenizer, cuts = tokenizer_of(index), 0
    for number in range(0, index.num_sequences("train"), 3):
        sequence = read_sequence(index, "train", number)
        assert sequence.segments is not None
        changes = [i for i in range(1, len(sequence.ids)) if 0 < sequence.segments[i - 1] < sequence.segments[i]]
        expected = sum(sequence.ids[i - 1] != tokenizer.eos_id for i in changes)
        shown = [*spans(sequence, tokenizer)]
        assert sum(span.kind == "cut" for span in shown) == expected
        assert sum(int(span.text) for span in shown if span.kind == "pad") == sequence.segments.count(0)
        cuts += expected
    assert cuts, "the corpus has no document that was cut"


def test_a_terminal_gets_no_control_characters() -> None:
    assert visible("a\x1b[31mb\x00\x7f\x9b\u202ec\ud800\n\td é 日") == "a␛[31mb␀␡[U+009B][U+202E]c[U+D800]\n\td é 日"


@pytest.mark.parametrize(
    ("split", "number", "message"),
    [("train", 10**6, "has sequences 0 to"), ("train", -1, "0 to"), ("x", 0, "train, val")],
)
def test_a_sequence_that_does_not_exist(finished: Finished, split: str, number: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_sequence(TokenIndex.load(finished[1].tokens), split, number)


def test_a_damaged_block_is_not_shown(copied: Run) -> None:
    index = TokenIndex.load(copied[1])
    shard = index.of_split("train")[0]
    path = Path(copied[1]) / shard.name
    flip(path, shard.offsets[1] + 5)
    assert len(read_sequence(index, "train", 0).ids) == 17  # block 0 is whole
    with pytest.raises(UserError, match=f"{shard.name}.*block 1"):
        read_sequence(index, "train", index.block_sequences)


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
    with pytest.raises(UserError, match=f"{shard.name}.*it was cut; run `pldr tokenize` again"):
        read_sequence(index, "train", 3)
    shard.unlink()
    shard.mkdir()
    with pytest.raises(UserError, match=f"{shard.name}.*; run `pldr tokenize` again"):
        read_sequence(index, "train", 3)
