"""Showing sequences as text without losing anything."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.data.documents.read import DocumentIndex, read_shard
from pipeline.data.inspect.show import Sequence, Span, as_text, read_sequence, spans, tokenizer_of, visible
from pipeline.data.loading.reader import TokenReader
from pipeline.data.tokens.index import TokenIndex
from pipeline.data.tokens.tokenize import tokenize_documents
from pipeline.errors import UserError
from pipeline.tokenizer import Tokenizer

Finished = tuple[RunConfig, RunPaths]
Run = tuple[str, str]


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
