"""Tokens to text: stop strings, what may be sent when, log-probabilities and where tokens begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.inference.request import read_stop
from pipeline.inference.serve.engine import Token
from pipeline.inference.serve.text import Choice, Logprobs, Texts
from pipeline.tokenizer import Tokenizer
from tests.helpers.models import train_tokenizer

TEXT = " the lazy dog sleeps. pack my box"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    """Of a tokenizer with longer pieces than the tiny model's."""
    path: Path = train_tokenizer(tmp_path_factory.mktemp("larger"), vocab_size=90)
    return Texts(Tokenizer.load(path))


def ids_of(texts: Texts, text: str) -> list[int]:
    return texts._tokenizer.encode(text)


def choice_of(
    texts: Texts, *, stop: Any = (), max_tokens: int = 1000, num_top: int | None = 0, offset: int = 0
) -> Choice:
    return Choice(texts, read_stop(list(stop)), eos_id=3, max_tokens=max_tokens, num_top=num_top, offset=offset)


def streamed(choice: Choice, ids: list[int], *, at_once: int = 1) -> tuple[list[str], Logprobs, str | None]:
    pieces, found = [], Logprobs()
    for start in range(0, len(ids), at_once):
        choice.take([Token(id, -float(id)) for id in ids[start : start + at_once]])
        if (piece := choice.piece()) is not None:
            pieces.append(piece.text)
            if piece.logprobs is not None:
                found.extend(piece.logprobs)
        if choice.finish_reason is not None:
            break
    return pieces, found, choice.finish_reason


@pytest.mark.parametrize("at_once", [1, 2, 5, 100])
def test_pieces_are_the_text_and_every_token_is_named_once(texts: Texts, at_once: int) -> None:
    ids = ids_of(texts, TEXT)
    pieces, found, reason = streamed(choice_of(texts, max_tokens=len(ids)), ids, at_once=at_once)
    assert "".join(pieces) == TEXT and reason == "length"
    assert found.token_logprobs == [-float(id) for id in ids]
    assert "".join(found.tokens) == TEXT
    for name, start in zip(found.tokens, found.text_offset, strict=True):
        assert TEXT[start:].startswith(name)


@pytest.mark.parametrize("stop", ["dog", "g s", " sleeps.", "k", "lazy dog sleeps", "x"])
@pytest.mark.parametrize("at_once", [1, 3])
def test_a_stop_string_is_never_sent_nor_what_may_become_one(texts: Texts, stop: str, at_once: int) -> None:
    ids = ids_of(texts, TEXT)
    pieces, found, reason = streamed(choice_of(texts, stop=[stop, "never"]), ids, at_once=at_once)
    expected = TEXT[: TEXT.index(stop)]
    assert "".join(pieces) == expected and reason == "stop"
    assert all(start < len(expected) for start in found.text_offset)  # tokens of the stop string are not named
    assert "".join(found.tokens).startswith(expected)


def test_eos_ends_a_choice_and_is_named(texts: Texts) -> None:
    ids = ids_of(texts, TEXT)[:4]
    pieces, found, reason = streamed(choice_of(texts), [*ids, 3, 9, 9])
    assert reason == "stop" and found.token_logprobs == [*(-float(id) for id in ids), -3.0]
    assert "".join(pieces) == texts.continuation(ids) and found.tokens[-1] == texts._tokenizer.piece(3)


def test_a_choice_of_no_tokens_ends_at_once(texts: Texts) -> None:
    piece = choice_of(texts, max_tokens=0).piece()
    assert piece is not None and (piece.text, piece.finish_reason) == ("", "length")


def test_the_offset_is_that_of_the_answer(texts: Texts) -> None:
    ids = ids_of(texts, TEXT)
    _, found, _ = streamed(choice_of(texts, offset=100, max_tokens=len(ids)), ids)
    assert found.text_offset[0] == 100 and min(found.text_offset) == 100


def test_an_echo_is_the_text_that_was_given(texts: Texts) -> None:
    ids = ids_of(texts, "the  dog")
    tokens = [Token(ids[0]), *(Token(id, -1.0, ((9, -0.5),)) for id in ids[1:])]
    echo = texts.echo("the  dog", tokens, 1)
    assert echo.text == "the  dog" and echo.logprobs is not None
    assert echo.logprobs.token_logprobs == [None, *[-1.0] * (len(ids) - 1)]
    assert echo.logprobs.top_logprobs[0] is None and echo.logprobs.text_offset[0] == 0
    assert set(echo.logprobs.top_logprobs[1] or {}) == {texts.name(9), texts.name(ids[1])}
    assert texts.echo(None, tokens, None).text == texts.beginning(ids)
    assert texts.echo(None, tokens, None).logprobs is None


def test_names_of_tokens_differ(texts: Texts) -> None:
    vocabulary = range(texts._tokenizer.vocab_size)
    assert len({texts.name(id) for id in vocabulary}) == len(vocabulary)
