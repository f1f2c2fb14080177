"""Texts and stop strings, read token by token."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inference.completion import Completion, StopStrings
from pipeline.tokenizer import Tokenizer


def of_bytes(ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are the bytes of a text."""
    return bytes(ids).decode(errors="replace")


def read(ids: list[int], stops: Sequence[str], *, at_once: int = 1) -> tuple[list[str], str]:
    """The pieces that a stream would send, and the text in the end."""
    completion, sent, pieces = Completion(of_bytes, StopStrings(stops)), 0, []
    for end in range(at_once, len(ids) + at_once, at_once):
        stopped = completion.take(ids[:end])
        if piece := completion.settled()[sent:]:
            sent += len(piece)
            pieces.append(piece)
        if stopped:
            break
    text = completion.finish()
    return pieces + ([text[sent:]] if text[sent:] else []), text


@pytest.mark.parametrize(
    ("text", "stop", "pieces"),
    [
        ("a€b", (), ["a", "€", "b"]),
        ("abstop!", ("stop",), ["a", "b"]),
        ("abstone", ("stop",), ["a", "b", "ston", "e"]),
        ("sstop", ("stop",), ["s"]),
        ("sonny", ("sonx", "nny"), ["so"]),
        ("xababc", ("ababc", "bad"), ["x"]),
        ("a€b", ("€",), ["a"]),
        ("a€b", ("\ufffd",), ["a", "€", "b"]),  # half a character is not U+FFFD
        ("abc", ("bc", "abcd"), ["a"]),  # held back until `bc` is there
    ],
)
def test_no_piece_holds_half_a_character_or_the_beginning_of_a_stop_string(
    text: str, stop: tuple[str, ...], pieces: list[str]
) -> None:
    assert read(list(text.encode()), stop)[0] == pieces


def test_bytes_that_are_no_character_stay_what_they_are() -> None:
    assert read([0xE2, *b"a"], ())[0] == ["\ufffda"]
    assert read([*b"a", 0xE2], ())[0] == ["a", "\ufffd"]
    assert read([*b"a", 0xE2], ("\ufffd",))[1] == "a", "at the end it is one"


def plainly(ids: list[int], stops: Sequence[str], *, at_once: int) -> str:
    """All stop strings are searched in the whole text after each step."""

    def first(text: str) -> int | None:
        return min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=None)

    for end in range(at_once, len(ids) + at_once, at_once):
        text = of_bytes(ids[:end]).rstrip("\ufffd")
        if first(text) is not None:
            return text[: first(text)]
    return of_bytes(ids)[: first(of_bytes(ids))]


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab€", max_size=14),
    extra=st.lists(st.sampled_from([0x61, 0xE2, 0x82, 0xFF]), max_size=3),
    stops=st.lists(st.text("ab€", min_size=1, max_size=5), max_size=6),
    at_once=st.integers(1, 4),
)
def test_it_finds_what_a_plain_search_finds(text: str, extra: list[int], stops: list[str], at_once: int) -> None:
    ids = [*text.encode(), *extra, *text.encode()[:4]]
    pieces, final = read(ids, stops, at_once=at_once)
    assert final == plainly(ids, stops, at_once=at_once)
    assert "".join(pieces) == final, "what was sent is never taken back"


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """With byte pieces, as `pldr tokenizer` trains it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=300, byte_fallback=True,
        hard_vocab_limit=False, pad_id=0, unk_id=1, bos_id=2, eos_id=3, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return Tokenizer.load(folder / "tokenizer.model")


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(st.integers(0, 285), max_size=25), text=st.text(max_size=6))
def test_decoding_goes_on_from_where_it_was(bytes_tokenizer: Tokenizer, ids: list[int], text: str) -> None:
    ids = [*ids, *bytes_tokenizer.encode(text), *ids[:3]]
    anchor = bytes_tokenizer.encode("a")[-1:]
    size = len(bytes_tokenizer.decode(anchor))
    completion = Completion(lambda new: bytes_tokenizer.decode(anchor + new)[size:], StopStrings())
    for end in range(1, len(ids) + 1):
        completion.take(ids[:end])
    assert completion.finish() == bytes_tokenizer.decode(anchor + ids)[size:]


def test_a_token_costs_the_same_however_many_stop_strings_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    begin = StopStrings.begin
    monkeypatch.setattr(StopStrings, "begin", lambda self, text: looks.append(text) or begin(self, text))
    many = StopStrings(f"zz{index}" for index in range(100_000))
    ids = list(b"a zz zebra zz " * 40 + b"zzz9")
    completion = Completion(of_bytes, many)
    stopped = [completion.take(ids[:end]) for end in range(1, len(ids) + 1)]
    assert stopped == [False] * (len(ids) - 1) + [True]
    assert completion.finish() == "a zz zebra zz " * 40 + "z"
    assert len(looks) < 3 * ids.count(ord("z")), "only where one may have begun"
