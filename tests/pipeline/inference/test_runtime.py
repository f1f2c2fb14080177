"""Text in, text out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.inference.runtime import Bundle, NotFiniteRows
from pipeline.tokenizer import Tokenizer
from pldr_model.decode.rows import Draws
from pldr_model.generation import generate
from pldr_model.model import PLDRModel

PROMPTS = ["the quick", "a", "jumps over the lazy dog and "]
PENALIZED = {"repetition_penalty": 1.8}  # greedy
MIN_P = {"temperature": 1.5, "min_p": 0.2, "repetition_penalty": 1.3, "seed": 2}


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
    for settings in (
        {},
        {"temperature": 1.0, "top_p": 0.9, "seed": 5},
        {"temperature": 0.7, "top_k": 3, "seed": 1},
        PENALIZED,
        MIN_P,
    ):
        together = bundle.generate(PROMPTS, max_new_tokens=12, **settings)
        assert together == [bundle.generate([prompt], max_new_tokens=12, **settings)[0] for prompt in PROMPTS]
        assert together == bundle.generate(PROMPTS, max_new_tokens=12, **settings)
        (alone,) = bundle.generate(PROMPTS[:1], max_new_tokens=12, **settings)
        assert "".join(bundle.stream(PROMPTS[0], max_new_tokens=12, **settings)) == alone
    assert bundle.generate(PROMPTS, temperature=1.0, seed=1) != bundle.generate(PROMPTS, temperature=1.0, seed=2)


def test_a_text_that_is_read_ahead_is_the_same(bundle: Bundle) -> None:
    for settings in ({}, {"temperature": 0.3, "seed": 5}, PENALIZED, {"stop": ["e"]}):
        plain, ahead = (bundle.generate(["the the the the"], speculate=on, **settings) for on in (False, True))
        assert plain == ahead == ["".join(bundle.stream("the the the the", speculate=True, **settings))]


def test_greedy_with_a_repetition_penalty_is_that_of_transformers(bundle: Bundle) -> None:
    """Over the prompt and the new tokens."""
    from pipeline.inference.hf.load import build

    model, _ = build(bundle.opened)
    for prompt in PROMPTS:
        ids = bundle.tokenizer.encode(prompt)
        theirs = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, repetition_penalty=1.8)
        ours = generate(bundle.model, [ids], max_new_tokens=12, eos_id=3, repetition_penalty=1.8)
        assert ours == [theirs[0, len(ids) :].tolist()]
    assert bundle.generate(PROMPTS, max_new_tokens=12, **PENALIZED) != bundle.generate(PROMPTS, max_new_tokens=12)


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
    choose = Draws.next
    monkeypatch.setattr(Draws, "next", lambda self, logits_BV: calls.append(1) or choose(self, logits_BV))
    settings = {"max_new_tokens": 25, "temperature": 1.0, "seed": 3}
    (full,) = bundle.generate(["the"], **settings)
    steps = len(calls)
    bundle.generate(["the"], stop=[full[2]], **settings)
    assert len(calls) - steps < steps / 2


def test_the_space_after_the_prompt_is_kept(bundle: Bundle) -> None:
    ids = bundle.tokenizer.encode("the lazy dog")
    start = bundle.tokenizer.encode("the")
    assert ids[: len(start)] == start
    assert bundle._decode(ids[len(start) :]) == " lazy dog"


@pytest.mark.parametrize("stop", [(), ("e ",), ("qu", "the l"), ("\x00never",)])
@pytest.mark.parametrize("seed", range(4))
def test_a_stream_is_the_completion_in_pieces(bundle: Bundle, stop: tuple[str, ...], seed: int) -> None:
    settings = {"max_new_tokens": 28, "temperature": 1.0, "seed": seed, "stop": stop}
    (full,) = bundle.generate(["the"], **settings)
    pieces = list(bundle.stream("the", **settings))
    assert "".join(pieces) == full and all(pieces)
    assert stop or len(pieces) > 5


def test_eos_ends_a_completion_and_is_not_in_it(make_bundle: Callable[..., Path], bundle: Bundle) -> None:
    with torch.no_grad():
        bundle.model.output.bias[bundle.config.eos_id] = 1e4
    assert bundle.generate(PROMPTS, max_new_tokens=5) == ["", "", ""]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "prompts: none given"),
        ([""], {}, r"prompts\[0\]: empty; give"),
        (["a", "the quick brown fox " * 9], {}, r"prompts\[1\]: \d+ tokens leave no room in the context of 32"),
        ("one text", {}, "prompts: a list of texts"),
        (b"one text", {}, "prompts: a list of texts is needed, not a value of type bytes"),
        (None, {}, "prompts: a list of texts is needed, not None"),
        ({"a": "b"}, {}, "prompts: a list of texts"),
        ((text for text in "ab"), {}, "prompts: a list of texts is needed, not a value of type generator"),
        (["a", None], {}, r"prompts\[1\]: None; give a text"),
        (["a", b"b"], {}, r"prompts\[1\]: a value of type bytes; give a text"),
        ([["a"]], {}, r"prompts\[0\]: a value of type list; give a text"),
        (["a\ud800"], {}, r"prompts\[0\]: not valid UTF-8"),
        (["a"], {"stop": "x"}, "stop: a list"),
        (["a"], {"stop": None}, "stop: a list"),
        (["a"], {"stop": [""]}, "stop: a list of non-empty"),
        (["a"], {"stop": ["b", 1]}, r"stop: .*stop\[1\] is a value of type int"),
        (["a"], {"stop": [b"b"]}, r"stop: .*stop\[0\] is a value of type bytes"),
        (["a"], {"stop": ["\udfff"]}, r"stop\[0\]: not valid UTF-8"),
        (["a"], {"stop": ["x" * 1001]}, r"stop\[0\]: 1001 characters; give at most 1000"),
        (["a"], {"stop": ["x"] * 1_000_001}, "stop: 1000001 strings; give at most 1000000"),
        (["a"], {"temperature": -1.0}, "temperature: -1.0 must be"),
        (["a"], {"temperature": "0.8"}, "temperature: '0.8' is no number"),
        (["a"], {"top_p": None}, "top_p: None is no number"),
        (["a"], {"top_k": 1.5}, "top_k: 1.5 is no integer"),
        (["a"], {"min_p": 1.5}, r"min_p: 1.5 must be in \[0, 1\]"),
        (["a"], {"repetition_penalty": 0}, r"repetition_penalty: 0.0 must be a positive number \(1: none\)"),
        (["a"], {"max_new_tokens": True}, "max_new_tokens: True is no integer"),
        (["a"], {"seed": "x"}, "seed: 'x' is no integer"),
        (["a"], {"tempurature": 1.0}, "tempurature: no setting of a completion; did you mean temperature\\?"),
        (
            ["a"],
            {"n": 2},
            "n: no setting of a completion; there are max_new_tokens, temperature, top_k, top_p, min_p, "
            "repetition_penalty, seed, stop",
        ),
    ],
)
def test_wrong_use_is_one_line(bundle: Bundle, prompts: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        bundle.generate(prompts, **settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    if isinstance(prompts, list) and len(prompts) == 1:
        with pytest.raises(UserError, match=message):
            bundle.stream(prompts[0], **settings)  # nothing is asked of it


def test_a_prompt_is_refused_by_its_bytes_before_it_is_tokenized(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: pytest.fail(f"{len(text)} characters were tokenized"))
    for text in ("the " * (1 << 19), "\N{EURO SIGN}" * (1 << 19)):  # by its characters, and by its bytes alone
        with pytest.raises(
            UserError, match=r"prompts\[0\]: \d+ bytes or more leave no room in the context of 32 tokens"
        ):
            bundle.generate([text])


def test_a_text_that_the_tokenizer_shortens_is_not_refused_by_its_bytes(bundle: Bundle) -> None:
    """This one drops white space: far more bytes than 31 tokens of the longest piece, but two tokens."""
    text = "the" + " " * 100_000 + "the"
    assert len(bundle.tokenizer.encode(text)) < 31
    assert bundle.generate([text], max_new_tokens=3) == bundle.generate(["the the"], max_new_tokens=3)


@pytest.mark.parametrize("numbers", [np.float32, np.float64, float])
def test_numbers_of_other_types_are_numbers(bundle: Bundle, numbers: type) -> None:
    plain = bundle.generate(["the"], max_new_tokens=9, temperature=0.5, top_k=7, seed=3, top_p=0.5)
    integer = np.int32 if numbers is not float else int
    assert plain == bundle.generate(
        ("the",),
        max_new_tokens=integer(9),
        temperature=numbers(0.5),
        top_k=integer(7),
        seed=integer(3),
        top_p=numbers(0.5),
    )
    assert plain == bundle.generate(np.array(["the"]), max_new_tokens=9, temperature=0.5, top_k=7, seed=3, top_p=0.5)


@pytest.fixture
def poisoned(bundle: Bundle) -> tuple[Bundle, str]:
    """The model has no logits after the last token of "jumps": its embedding overflows."""
    bad = bundle.tokenizer.encode("jumps")[-1]
    assert not any(bad in bundle.tokenizer.encode(text) for text in ("the quick", "a"))
    with torch.no_grad():
        bundle.model.embedding.weight[bad] = 3e38
    return bundle, "the jumps"


def test_a_row_without_logits_is_named_and_the_others_are_complete(poisoned: tuple[Bundle, str]) -> None:
    bundle, bad = poisoned
    for settings in (
        {"max_new_tokens": 6},
        {"max_new_tokens": 6, "temperature": 1.0},
        {"max_new_tokens": 6, "stop": ["e"]},
    ):
        good = bundle.generate(["the quick", "a"], **settings)
        with pytest.raises(NotFiniteRows, match=r"prompts\[1\]: the model's logits are NaN or infinite") as caught:
            bundle.generate(["the quick", bad, "a"], **settings)
        assert caught.value.completions == [good[0], None, good[1]] and caught.value.rows == {1: 0}
        assert "the other 2 " in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(NotFiniteRows, match=r"prompts\[0\], .* and 3 more"):
        bundle.generate([bad] * 8, max_new_tokens=2)
    with pytest.raises(NotFiniteRows, match=r"prompts\[0\]"):
        list(bundle.stream(bad, max_new_tokens=2))


def test_a_row_may_fail_after_its_first_token(poisoned: tuple[Bundle, str]) -> None:
    bundle, bad = poisoned
    with torch.no_grad():
        bundle.model.output.bias[bundle.tokenizer.encode(bad)[-1]] = 1e4
    pieces: list[str] = []
    with pytest.raises(NotFiniteRows) as caught:
        pieces.extend(bundle.stream("the quick", max_new_tokens=4))
    assert caught.value.rows == {0: 1} and caught.value.completions == [None]


def test_batches_of_a_small_memory_give_the_same_texts(bundle: Bundle) -> None:
    prompts = [*PROMPTS, *PROMPTS, "the", "quick"]
    settings = {"max_new_tokens": 7, "temperature": 1.0, "seed": 2}
    together = bundle.generate(prompts, **settings)
    for bundle.memory in (1, 60_000):
        assert bundle.generate(prompts, **settings) == together


def test_score_is_what_the_tokens_say(bundle: Bundle) -> None:
    context, answers = "the quick brown", [" fox", " dog", " fox jumps"]
    scored = bundle.score(context, answers)
    whole = bundle.logprobs(context + " fox jumps")
    num_tokens = len(bundle.tokenizer.encode(context + " fox jumps")) - len(bundle.tokenizer.encode(context))
    # The model sees no eos before a context, and one before a text.
    start = bundle.tokenizer.encode(context)
    with torch.inference_mode():
        logits = bundle.model(torch.tensor([bundle.tokenizer.encode(context + " fox jumps")]), padded=False)[0]
    expected = logits.log_softmax(dim=-1)[torch.arange(len(start) - 1, len(logits) - 1)]
    expected = expected.gather(1, torch.tensor(bundle.tokenizer.encode(context + " fox jumps")[len(start) :])[:, None])
    assert scored[2].logprob == pytest.approx(float(expected.sum()), abs=1e-4) and scored[2].num_tokens == num_tokens
    assert scored[2].logprob < scored[0].logprob and len(whole["tokens"]) == len(logits)
    assert bundle.score(context + " ", ["fox", "dog", "fox jumps"]) == scored
    (greedy,) = bundle.generate([context], max_new_tokens=3)
    assert bundle.score(context, [greedy])[0].greedy and not bundle.score(context, [greedy + "qq"])[0].greedy


def test_an_empty_context_is_eos(bundle: Bundle) -> None:
    (scored,) = bundle.score("", ["the dog"])
    assert scored.logprob == pytest.approx(sum(bundle.logprobs("the dog")["logprobs"]), abs=1e-5)


def test_the_parts_of_a_text_are_the_text(bundle: Bundle) -> None:
    for text in ("the quick", "  the \n dog ", "a", "", "jumps over \N{EURO SIGN}\N{EURO SIGN} x" * 9):
        found = bundle.logprobs(text)
        assert found["ids"] == bundle.tokenizer.encode(text)
        assert {len(values) for values in found.values()} == {len(found["ids"])}
        assert all(text[o:].startswith(part) for o, part in zip(found["offsets"], found["tokens"], strict=True))
        assert "".join(found["tokens"]) == text.strip()
        assert all(type(value) is float and value < 0 for value in found["logprobs"])


def test_a_continuation_that_melts_into_the_context_is_not_called_empty(bundle: Bundle) -> None:
    ids = bundle.tokenizer.encode
    words = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog")
    borders = [(word[:i], word[i:]) for word in words for i in range(1, len(word))]
    context, text = next(each for each in borders if len(ids("".join(each))) <= len(ids(each[0])))
    with pytest.raises(UserError, match=f"continuations\\[0\\]: '{text}' has no token of its own"):
        bundle.score(context, [text])


@pytest.mark.parametrize(
    ("context", "answers", "message"),
    [
        ("the", [""], "continuations\\[0\\]: an empty continuation"),
        ("the", [" dog", "a" * 100], "continuations\\[1\\]: a continuation of .* longer than the context of 32"),
        ("the", "dog", "continuations: a list of texts is needed, not one text"),
        ("the", [" dog", None], "continuations\\[1\\]: None; give a text"),
        (b"the", ["dog"], "context\\[0\\]: a value of type bytes"),
        ("the", ["\ud800"], "continuations\\[0\\]: not valid UTF-8"),
    ],
)
def test_what_cannot_be_scored_is_one_line(bundle: Bundle, context: Any, answers: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        bundle.score(context, answers)
    assert "\n" not in str(caught.value)
    if isinstance(context, bytes):
        with pytest.raises(UserError, match="text"):
            bundle.logprobs(context)
