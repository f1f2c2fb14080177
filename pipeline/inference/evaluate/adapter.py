"""Our model as the `LM` of lm-evaluation-harness.

Texts become ids as lm-eval's own `hf` model does it (`TemplateLM`): context and answer are encoded together and cut where the
context ends; an empty context is the end token; a context too long for the model loses its beginning. An answer longer than the
model's context has no log-likelihood (`hf` stops there): it gets NaN, and its item is left out by whoever asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pipeline.errors import UserError
from pipeline.inference.evaluate.answers import Answer, Answers
from pipeline.tokenizer import Tokenizer

Request = tuple[list[int], list[int]]  # ids of the context, ids of the answer
CHUNK_TOKENS = 16384  # scored, and kept, at a time
TOO_LONG: Answer = (math.nan, False)  # of an answer that does not fit the model; no scorer gives NaN
SHOWN = 60  # characters of a text in a message


class Scored(Protocol):
    """What a scorer says of a request."""

    @property
    def logprob(self) -> float: ...

    @property
    def greedy(self) -> bool: ...


Score = Callable[[Sequence[Request]], Sequence[Scored]]


class ScoringLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """An `LM` that scores in chunks, and takes a chunk that was scored before from `answers`.

    score: log-likelihoods of requests, in their order. progress: gets the number of requests done, and of all. `cut` counts
    the contexts that lost their beginning; `error` is what scoring raised, which is then no fault of the documents.
    """

    def __init__(
        self,
        score: Score,
        tokenizer: Tokenizer,
        *,
        context_length: int,
        answers: Answers,
        progress: Callable[[int, int], None],
    ) -> None:
        super().__init__()
        self._score, self._tokenizer, self._length = score, tokenizer, context_length
        self._answers, self._progress = answers, progress
        self.cut = 0
        self.error: Exception | None = None

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._tokenizer.encode(string)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Answer]:
        for request in requests:
            if request.args[1] == "":
                raise UserError(f"an answer is empty, after {_end_of(request.args[0])!r}")
        found: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        windows: list[list[Request]] = []
        for request in requests:
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._length,
                context_len=1,
            )
            windows.append([make_disjoint_window(pair) for pair in rolling])
        scored = iter(self._in_chunks([pair for pairs in windows for pair in pairs]))
        return [sum(next(scored)[0] for _ in pairs) for pairs in windows]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        raise UserError("tasks of text generation are not evaluated")

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[Answer]:
        fitting = [self._fitting(*request) for request in requests]
        found = iter(self._in_chunks([request for request in fitting if request is not None]))
        return [TOO_LONG if request is None else next(found) for request in fitting]

    def _fitting(self, texts: tuple[str, str], context: list[int], answer: list[int]) -> Request | None:
        """The ids with as much of the context as the model can read; None where the answer alone is too long."""
        if not answer:
            raise UserError(f"the answer {texts[1][:SHOWN]!r} has no token of its own after {_end_of(texts[0])!r}")
        if len(answer) > self._length:
            return None
        kept = context[-(self._length + 1 - len(answer)) :]  # the answer's last token is not read, only predicted
        self.cut += len(kept) < len(context)
        return kept, answer

    def _in_chunks(self, requests: list[Request]) -> list[Answer]:
        """Answers in the order of the requests. Longest first, and requests with one context stay together."""
        out: list[Answer | None] = [None] * len(requests)
        done = 0
        for chunk in _chunks(requests):
            try:
                found = self._answers_to([requests[index] for index in chunk])
            except Exception as error:
                self.error = error
                raise
            for index, answer in zip(chunk, found, strict=True):
                out[index] = answer
            done += len(chunk)
            self._progress(done, len(requests))
        return [answer for answer in out if answer is not None]

    def _answers_to(self, chunk: list[Request]) -> list[Answer]:
        """Those that are kept, or new ones, which are kept then."""
        found = self._answers.get(chunk)
        if found is None:
            found = [(float(one.logprob), bool(one.greedy)) for one in self._score(chunk)]
            self._answers.keep(chunk, found)
        return found


def _chunks(requests: list[Request]) -> list[list[int]]:
    """Indexes of requests by chunk; the same requests always make the same chunks."""
    groups: list[list[int]] = []
    for index, (context, _) in enumerate(requests):
        if groups and requests[groups[-1][0]][0] == context:
            groups[-1].append(index)
        else:
            groups.append([index])
    sizes = [len(requests[group[0]][0]) + max(len(requests[index][1]) for index in group) for group in groups]
    chunks: list[list[int]] = []
    room = 0
    for place in sorted(range(len(groups)), key=lambda place: -sizes[place]):
        if room <= 0:
            chunks.append([])
            room = CHUNK_TOKENS
        chunks[-1] += groups[place]
        room -= sizes[place] * len(groups[place])
    return chunks


def _end_of(text: str) -> str:
    return text[-SHOWN:]
