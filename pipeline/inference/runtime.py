"""A loaded model: text in, text and log-probabilities out, with KV-cache and G-cache.

Decision: prompts are encoded as the training text was, without bos. A completion is decoded as the continuation of a text,
so that the space between prompt and completion is kept (SentencePiece drops a leading one). Stop strings are searched in that
text and not in tokens: a stop string may begin inside one token and end inside another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import Caution, UserError
from pipeline.inference.completion import Completion
from pipeline.inference.opened import OpenModel
from pipeline.inference.request import PromptEncoder, read_settings, read_stop, read_texts
from pipeline.inference.scoring import Scored, Scorer
from pipeline.inference.source import open_model
from pldr_model.generation import NotFiniteError, generate_steps
from pldr_model.model import PLDRModel
from pldr_model.sampling import read_sampling

NAMED = 5  # prompts in a message


class NotFiniteRows(UserError):
    """The model's logits were NaN or infinite for some prompts of a batch; the others are complete.

    rows: index of the prompt -> its new tokens before that. completions: what `generate` would have returned, with None for
    these prompts.
    """

    def __init__(self, rows: dict[int, int], completions: list[str | None]) -> None:
        named = ", ".join(f"prompts[{index}]" for index in list(rows)[:NAMED])
        more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
        first = next(iter(rows.values()))
        self.problem = f"{named}{more}: the model's logits are NaN or infinite (after {first} new tokens of the first)"
        done = sum(text is not None for text in completions)
        super().__init__(f"{self.problem}; leave it out, or take the other {done} from `completions` of this error")
        self.rows, self.completions = rows, completions


class Bundle:
    """A loaded model, ready to use: a bundle, and just as well an export or a run (`open_model`).

    `certificate`, `certified`, `config`, `tokenizer` and `model` are public and read-only. A live one computes G_LM anew from
    the complete text for each token, without any cache: the control that a cached G_LM is compared with.
    """

    def __init__(self, opened: OpenModel) -> None:
        self.opened = opened
        self.live = opened.live is not None
        self._reader = opened.decoder if opened.live is None else opened.live
        self.config, self.tokenizer = opened.config, opened.tokenizer
        self.certificate, self.certified, self.generation = opened.certificate, opened.certified, opened.generation
        # Bytes for the rows that are computed together; None: what `pldr_model.generation.memory_budget` says.
        self.memory: int | None = None
        self._prefix: list[int] = self.generation["prompt_prefix_ids"]
        self._encode = PromptEncoder(self.tokenizer, context_length=self.config.context_length, prefix=self._prefix)
        # A piece that is decoded before the new ids, so that they keep their leading space, whatever the prompt was.
        self._anchor = self.tokenizer.encode("a")[-1:]
        self._anchor_size = len(self.tokenizer.decode(self._anchor))

    @classmethod
    def load(cls, source: str | Path, overrides: list[str] | None = None, *, live: bool = False) -> Bundle:
        """Verify and load; a model that is not certified warns. Raises UserError, one line, for a damaged or foreign source.

        live: with the metric learner, from a run or from a bundle that holds it.
        """
        opened = open_model(source, overrides, live=live)
        if opened.caution is not None:
            warnings.warn(opened.caution, Caution, stacklevel=2)
        return cls(opened)

    @property
    def model(self) -> PLDRModel:
        """The model itself, in fp32; packed weights are unpacked for it."""
        return self.opened.model if self.opened.live is None else self.opened.live

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = 0,
        speculate: bool | None = None,
        **unknown: Any,
    ) -> list[str]:
        """Continue each prompt; returns the completions without the prompts, in their order.

        A completion ends after `max_new_tokens`, at a full context, at eos, or before the first `stop` string.
        temperature 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 disable those; their order and
        meaning are transformers' (`pldr_model.next_token`). The same seed gives the same text; None draws a new one. Prompts of
        a batch do not affect each other, and decode together as many as fit `memory`. speculate: whether a single prompt's text
        is read ahead where it repeats itself (`pldr_model.decode.lookup`); None: on a CPU. The tokens are the same.
        Raises UserError, before anything is computed, for empty prompts, prompts that leave no room in the context, and
        settings that are unknown, of a wrong type or out of range. Raises NotFiniteRows (a UserError), after all others have
        ended, for prompts whose logits were NaN or infinite; it holds the completions of the others.
        """
        given = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        }
        settings = read_settings({**given, **unknown})
        encoded, stops = self._encode(prompts), read_stop(stop)
        texts = [Completion(self._decode, stops) for _ in encoded]
        take = (lambda index, new: texts[index].take(new)) if stops else None
        failed: dict[int, int] = {}
        try:
            *_, new = self._steps(encoded, stop=take, settings=settings, speculate=speculate)
        except NotFiniteError as error:
            failed, new = error.rows, error.new
        for text, ids in zip(texts, new, strict=True):
            text.take(ids)
        if failed:
            raise NotFiniteRows(failed, [None if i in failed else text.finish() for i, text in enumerate(texts)])
        return [text.finish() for text in texts]

    def stream(
        self, prompt: str, *, stop: Sequence[str] = (), speculate: bool | None = None, **settings: Any
    ) -> Iterator[str]:
        """The completion that `generate` gives for one prompt, in pieces as they come. Settings and errors are those of
        `generate`; NotFiniteRows comes after the last piece, all others before this returns.

        A piece never ends inside a character, nor in what may become a stop string.
        """
        text = Completion(self._decode, read_stop(stop))
        steps = self._steps(
            self._encode([prompt]),
            stop=lambda _, new: text.take(new),
            settings=read_settings(settings),
            speculate=speculate,
        )
        return self._pieces(text, steps)

    def _pieces(self, text: Completion, steps: Iterator[list[list[int]]]) -> Iterator[str]:
        sent = 0
        try:
            for _ in steps:
                if piece := text.settled()[sent:]:
                    sent += len(piece)
                    yield piece
        except NotFiniteError as error:
            raise NotFiniteRows(error.rows, [None]) from None
        if piece := text.finish()[sent:]:
            yield piece

    def score(self, context: str, continuations: Sequence[str]) -> list[Scored]:
        """Log-probability (nats), whether greedy, and number of tokens of each continuation after the context.

        They are tokenized as lm-evaluation-harness does: white space at the end of the context belongs to the continuation,
        and the continuation is what the tokens of the complete text have beyond those of the context. An empty context is eos;
        one that is too long is cut from the left. Raises UserError for a continuation without tokens or longer than the
        model's context.
        """
        (context,) = read_texts("context", [context])
        texts = read_texts("continuations", continuations)
        start = context.rstrip()
        context_ids = self._prefix + self.tokenizer.encode(start)
        whole = [self._prefix + self.tokenizer.encode(context + text) for text in texts]
        requests = [(context_ids, ids[len(context_ids) :]) for ids in whole]
        for index, (text, (_, ids)) in enumerate(zip(texts, requests, strict=True)):
            if text and not ids:
                raise UserError(
                    f"continuations[{index}]: {text!r} has no token of its own after this context; move the border"
                )
        return self._scorer().score(requests, name="continuations")

    def logprobs(self, text: str) -> dict[str, list[Any]]:
        """`tokens` of a text (the parts that they stand for), their `ids`, `offsets` in characters, and `logprobs`: of each
        token after those before it, of the first after eos. A text longer than the context is read in windows
        (`pipeline.inference.grouping.windows`)."""
        (text,) = read_texts("text", [text])
        spans = self.tokenizer.spans(text)
        ids = [token for token, _, _ in spans]
        return {
            "tokens": [part for _, part, _ in spans],
            "ids": ids,
            "offsets": [offset for _, _, offset in spans],
            "logprobs": self._scorer().token_logprobs(ids),
        }

    def _scorer(self) -> Scorer:
        return Scorer(self._reader, live=self.live, eos_id=self.generation["eos_id"], memory=self.memory)

    def _steps(
        self,
        encoded: list[Any],
        *,
        stop: Callable[[int, list[int]], bool] | None,
        settings: dict[str, Any],
        speculate: bool | None,
    ) -> Iterator[list[list[int]]]:
        """The new tokens of every prompt after each step. Settings are checked now, the rest follows when it is asked for."""
        try:
            read_sampling(**settings)
        except ValueError as error:
            raise UserError(f"generate: {error}") from None
        return generate_steps(
            self._reader,
            encoded,
            stop=stop,
            eos_id=self.generation["eos_id"],
            use_cache=not self.live,
            memory=self.memory,
            speculate=speculate,
            **settings,
        )

    def _decode(self, new_ids: list[int]) -> str:
        """The text that these ids add to a text before them."""
        return self.tokenizer.decode(self._anchor + new_ids)[self._anchor_size :]
