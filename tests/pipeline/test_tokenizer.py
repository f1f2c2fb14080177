"""The SentencePiece wrapper: special ids are fixed, other files are refused with a clear message."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from pipeline.errors import UserError
from pipeline.io.storage import sha256_file
from pipeline.tokenizer import Tokenizer

TEXTS = [f"the {word} sat on the mat and looked at the {word}" for word in ("cat", "dog", "owl", "fox", "hen") * 20]
PUBLISHED = Path("/work/shared/tokenizer/pldr-refinedweb-32k.model")


def train(path: Path, **changes: Any) -> Path:
    ids = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=28, minloglevel=2, **{**ids, **changes}
    )
    path.write_bytes(model.getvalue())
    return path


def test_encode_decode_and_facts(tmp_path: Path) -> None:
    path = train(tmp_path / "t.model")
    tokenizer = Tokenizer.load(path)
    ids = tokenizer.encode(TEXTS[0])
    assert tokenizer.decode(ids) == TEXTS[0] and not {0, 2, 3} & set(ids)
    assert tokenizer.encode_batch([TEXTS[0], "", TEXTS[1]]) == [ids, [], tokenizer.encode(TEXTS[1])]
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 28 and tokenizer.sha256 == sha256_file(path) and tokenizer.path == path


def test_special_ids_decode_to_nothing(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(train(tmp_path / "t.model"))
    assert tokenizer.decode([2, *tokenizer.encode("the cat"), 3, 0]) == "the cat"


@pytest.mark.parametrize("data", [b"", b"no model at all", b"\x80\x04\x95pickle."])
def test_a_file_that_is_not_a_model(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t.model").write_bytes(data)
    with pytest.raises(UserError, match=r"t\.model: not a SentencePiece model"):
        Tokenizer.load(tmp_path / "t.model")


def test_a_truncated_model_and_a_missing_one(tmp_path: Path) -> None:
    path = train(tmp_path / "t.model")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer.load(path)
    with pytest.raises(UserError, match="no such tokenizer"):
        Tokenizer.load(tmp_path / "gone.model")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_any_changed_byte_is_refused_or_leaves_a_model(tmp_path: Path) -> None:
    """SentencePiece fails in several ways, and may take pieces that are no UTF-8."""
    path = train(tmp_path / "t.model")
    data, refused = path.read_bytes(), 0
    for at in range(0, 900):
        path.write_bytes(data[:at] + b"\x95" + data[at + 1 :])
        try:
            tokenizer = Tokenizer.load(path)
            assert all(tokenizer.piece(token) for token in range(tokenizer.vocab_size))
        except UserError as error:
            assert "t.model" in str(error)
            refused += 1
    assert refused > 100


def test_other_special_ids_are_refused(tmp_path: Path) -> None:
    path = train(tmp_path / "t.model", pad_id=-1, unk_id=0, bos_id=1, eos_id=2)
    with pytest.raises(UserError, match=r"special ids are .*'pad': -1.* must be .*'pad': 0"):
        Tokenizer.load(path)


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published tokenizer is not on this machine")
def test_the_published_tokenizer_loads() -> None:
    tokenizer = Tokenizer.load(PUBLISHED)
    assert tokenizer.vocab_size == 32000 and tokenizer.decode(tokenizer.encode("Hello, world")) == "Hello, world"
