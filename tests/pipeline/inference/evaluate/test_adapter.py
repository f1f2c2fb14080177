"""Requests as ids, in chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import UserError
from pipeline.inference.evaluate import tasks
from pipeline.inference.evaluate.answers import AnswersFile
from pipeline.tokenizer import Tokenizer

tasks.quiet(offline=True)
from pipeline.inference.evaluate import adapter  # noqa: E402
from pipeline.inference.evaluate.adapter import Request, ScoringLM  # noqa: E402


class Recorder:
    """A scorer whose answer names the request: minus the sum of its ids."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.chunks = 0

    def __call__(self, requests: Sequence[Request]) -> list[SimpleNamespace]:
        self.chunks += 1
        self.asked += requests
        return [
            SimpleNamespace(logprob=-float(sum(context) + 100 * sum(answer)), greedy=len(answer) == 1)
            for context, answer in requests
        ]


def asks(*texts: tuple[str, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=pair) for pair in texts]


@pytest.fixture
def make_lm(tokenizer_path: Path, tmp_path: Path):
    files = []

    def make(context_length: int = 32) -> tuple[ScoringLM, Recorder, Tokenizer]:
        file = AnswersFile(tmp_path / str(len(files)) / "answers.jsonl", ["a"])
        files.append(file.__enter__())
        tokenizer, recorder = Tokenizer.load(tokenizer_path), Recorder()
        lm = ScoringLM(
            recorder,
            tokenizer,
            context_length=context_length,
            answers=files[-1].of("a"),
            progress=lambda done, of: None,
        )
        return lm, recorder, tokenizer

    yield make
    for file in files:
        file.__exit__(None, None, None)


def test_context_and_answer_are_encoded_together(make_lm) -> None:
    lm, recorder, tokenizer = make_lm()
    found = lm.loglikelihood(asks(("the fox ", "jumps"), ("", "the dog"), ("the fox", " jumps")))
    whole, context = tokenizer.encode("the fox jumps"), tokenizer.encode("the fox")
    assert (context, whole[len(context) :]) in recorder.asked
    assert ([tokenizer.eos_id], tokenizer.encode("the dog")) in recorder.asked
    assert found[0] == found[2]  # a space at the end of the context belongs to the answer
    assert found[1] == (-float(tokenizer.eos_id + 100 * sum(tokenizer.encode("the dog"))), False)


def test_a_long_context_loses_its_beginning(make_lm) -> None:
    lm, recorder, tokenizer = make_lm(context_length=8)
    text = "the quick brown fox jumps over the lazy"
    lm.loglikelihood(asks((text, " dog"), ("the", " dog")))
    context, answer = recorder.asked[0]
    assert len(context) + len(answer) == 9 and tokenizer.encode(text + " dog")[-9:] == context + answer
    assert lm.cut == 1


def test_an_answer_that_does_not_fit_has_no_score(make_lm) -> None:
    lm, recorder, _ = make_lm(context_length=4)
    found = lm.loglikelihood(asks(("the", " quick brown fox jumps over"), ("the", " a")))
    assert math.isnan(found[0][0]) and not math.isnan(found[1][0]) and len(recorder.asked) == 1


def test_an_empty_answer_is_said_in_words(make_lm) -> None:
    lm, recorder, _ = make_lm()
    with pytest.raises(UserError, match="an answer is empty"):
        lm.loglikelihood(asks(("the", "")))
    assert not recorder.asked


def test_answers_keep_their_order_and_contexts_stay_together(make_lm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "CHUNK_TOKENS", 12)
    lm, recorder, _ = make_lm()
    texts = [(f"the {context}", answer) for context in ("fox", "lazy dog and", "a") for answer in (" box", " jug")]
    found = lm.loglikelihood(asks(*texts))
    assert recorder.chunks > 1
    alone, other, _ = make_lm()
    assert found == [alone.loglikelihood(asks(text))[0] for text in texts]
    contexts = [context for context, _ in recorder.asked]
    assert contexts[0::2] == contexts[1::2] and len(contexts[0]) > len(contexts[-1])  # pairs; the longest first
    assert other.chunks == len(texts)


def test_a_chunk_is_scored_once(make_lm) -> None:
    lm, recorder, _ = make_lm()
    first = lm.loglikelihood(asks(("the", " fox"), ("the", " dog")))
    assert lm.loglikelihood(asks(("the", " fox"), ("the", " dog"))) == first and recorder.chunks == 1
    lm.loglikelihood(asks(("the", " fox")))
    assert recorder.chunks == 2  # another chunk is another question


def test_a_rolling_score_has_every_token_once(make_lm) -> None:
    lm, recorder, tokenizer = make_lm(context_length=8)
    text = "the quick brown fox jumps over the lazy dog"
    lm.loglikelihood_rolling(asks((text,)))
    scored = sorted(token for _, answer in recorder.asked for token in answer)
    assert scored == sorted(tokenizer.encode(text))
    assert all(len(context) + len(answer) <= 9 for context, answer in recorder.asked)


def test_generation_is_refused(make_lm) -> None:
    with pytest.raises(UserError, match="not evaluated"):
        make_lm()[0].generate_until([])
