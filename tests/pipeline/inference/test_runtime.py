"""Text in, text out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch

from pipeline.errors import UserError
from pipeline.inference.runtime import Bundle
from pipeline.tokenizer import Tokenizer
from pldr_model.generation import generate
from pldr_model.model import PLDRModel

PROMPTS = ["the quick", "a", "jumps over the lazy dog and "]


@pytest.fixture
def bundle(make_bundle: Callable[..., Path]) -> Bundle:
    return Bundle.load(make_bundle())


def test_the_bundle_generates_what_the_full_model_does_without_any_cache(bundle: Bundle, invariant: PLDRModel) -> None:
    ids = [bundle.tokenizer.encode(prompt) for prompt in PROMPTS]
    live = generate(invariant, ids, max_new_tokens=10, use_cache=False, eos_id=3)
    got = bundle.generate(PROMPTS, max_new_tokens=10)
    full = [bundle.tokenizer.decode(a + b) for a, b in zip(ids, live, strict=True)]
    for completion, prompt, text in zip(got, PROMPTS, full, strict=True):
        assert (prompt.rstrip() + completion).split() == text.split()
    assert any(got)


def test_a_batch_gives_what_each_prompt_gives_alone(bundle: Bundle) -> None:
    for settings in ({}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}, {"temperature": 0.7, "top_k": 3, "seed": 1}):
        together = bundle.generate(PROMPTS, max_new_tokens=12, **settings)
        assert together == [bundle.generate([prompt], max_new_tokens=12, **settings)[0] for prompt in PROMPTS]
        assert together == bundle.generate(PROMPTS, max_new_tokens=12, **settings)
    assert bundle.generate(PROMPTS, temperature=1.0, seed=1) != bundle.generate(PROMPTS, temperature=1.0, seed=2)


def test_generation_ends_at_the_context(bundle: Bundle) -> None:
    prompt_ids = bundle.tokenizer.encode("a")
    (text,) = bundle.generate(["a"], max_new_tokens=10_000, temperature=1.0, seed=4)
    assert 0 < len(bundle.tokenizer.encode(text)) <= bundle.config.context_length + 2 - len(prompt_ids)


def test_text_is_cut_before_the_first_stop_string_also_one_that_spans_tokens(bundle: Bundle) -> None:
    settings = {"max_new_tokens": 28, "temperature": 1.0, "seed": 3}
    (full,) = bundle.generate(["the quick"], **settings)
    pieces = bundle.tokenizer.encode(full)
    assert len(full) > 12 and len(pieces) > 6
    middle = len(full) // 2
    for length in (1, 2, 5):  # long ones span tokens
        stop = full[middle : middle + length]
        (cut,) = bundle.generate(["the quick"], stop=[stop, "\x00never"], **settings)
        assert cut == full[: full.index(stop)]
    assert bundle.generate(["the quick"], stop=["\x00never"], **settings) == [full]


def test_stop_strings_end_the_generation_and_not_only_the_text(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    extend = PLDRModel.extend
    monkeypatch.setattr(PLDRModel, "extend", lambda self, *a, **k: calls.append(1) or extend(self, *a, **k))
    settings = {"max_new_tokens": 25, "temperature": 1.0, "seed": 3}
    (full,) = bundle.generate(["the"], **settings)
    steps = len(calls)
    bundle.generate(["the"], stop=[full[2]], **settings)
    assert len(calls) - steps < steps / 2


def test_the_space_after_the_prompt_is_kept(bundle: Bundle) -> None:
    ids = bundle.tokenizer.encode("the lazy dog")
    start = bundle.tokenizer.encode("the")
    assert ids[: len(start)] == start
    assert bundle._text(ids[len(start) :]) == " lazy dog"


@pytest.mark.parametrize("stop", [(), ("e ",), ("qu", "the l"), ("\x00never",)])
@pytest.mark.parametrize("seed", range(4))
def test_a_stream_is_the_completion_in_pieces(bundle: Bundle, stop: tuple[str, ...], seed: int) -> None:
    settings = {"max_new_tokens": 28, "temperature": 1.0, "seed": seed, "stop": stop}
    (full,) = bundle.generate(["the"], **settings)
    pieces = list(bundle.stream("the", **settings))
    assert "".join(pieces) == full and all(pieces)
    assert stop or len(pieces) > 5


@pytest.mark.parametrize(
    ("steps", "stop", "pieces"),
    [
        (["a", "a\ufffd", "a\ufffd\ufffd", "a€", "a€b"], (), ["a", "€", "b"]),
        (["\ufffd", "\ufffda"], (), ["\ufffda"]),  # bytes that are no character stay what they are
        (["a\ufffd"], (), ["a", "\ufffd"]),
        (["ab", "abst", "absto", "abstop", "abstop!"], ("stop",), ["ab"]),
        (["ab", "abst", "absto", "abstone"], ("stop",), ["ab", "stone"]),
        (["st", "sst", "sstop"], ("stop",), ["s"]),
        (["s", "so", "son", "sonn", "sonny"], ("sonx", "nny"), ["so"]),
        (["xab", "xabab", "xababc"], ("ababc", "bad"), ["x"]),
    ],
)
def test_no_piece_holds_half_a_character_or_the_beginning_of_a_stop_string(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, steps: list[str], stop: tuple[str, ...], pieces: list[str]
) -> None:
    """The text after each token, given."""
    monkeypatch.setattr(bundle, "_steps", lambda *_, **__: iter([[[n]] for n in range(len(steps))]))
    monkeypatch.setattr(bundle, "_text", lambda ids: steps[ids[0]])
    assert list(bundle.stream("x", stop=stop)) == pieces


def test_characters_of_several_byte_tokens_are_streamed_whole(tmp_path: Path, bundle: Bundle) -> None:
    """A tokenizer with byte pieces, as `pldr tokenizer` trains it, that knows neither character."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, byte_fallback=True,
        hard_vocab_limit=False, pad_id=0, unk_id=1, bos_id=2, eos_id=3, num_threads=1, minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.model")
    ids = tokenizer.encode("the €ö 🦊 fox")
    assert len(ids) > 12
    bundle.tokenizer, bundle._anchor = tokenizer, tokenizer.encode("a")[-1:]
    bundle._steps = lambda *_, **__: ([ids[: n + 1]] for n in range(len(ids)))  # type: ignore[method-assign]
    pieces = list(bundle.stream("x"))
    assert "".join(pieces) == bundle._text(ids) and "€" in pieces and "🦊" in "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


def test_eos_ends_a_completion_and_is_not_in_it(make_bundle: Callable[..., Path], bundle: Bundle) -> None:
    with torch.no_grad():
        bundle.model.output.bias[bundle.config.eos_id] = 1e4
    assert bundle.generate(PROMPTS, max_new_tokens=5) == ["", "", ""]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "none given"),
        ([""], {}, r"prompts\[0\]: empty; give"),
        (["a", "the quick brown fox " * 9], {}, r"prompts\[1\]: \d+ tokens leave no room in the context of 32"),
        ("one text", {}, "a list of texts"),
        (["a"], {"temperature": -1.0}, "temperature"),
        (["a"], {"top_p": 0.0, "temperature": 1.0}, "top_p"),
        (["a"], {"top_k": -1}, "top_k"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens"),
        (["a"], {"stop": "x"}, "stop: a list"),
        (["a"], {"stop": [""]}, "stop: a list of non-empty"),
    ],
)
def test_wrong_use_is_one_line(bundle: Bundle, prompts: list[str], settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        bundle.generate(prompts, **settings)
    assert "\n" not in str(caught.value)
