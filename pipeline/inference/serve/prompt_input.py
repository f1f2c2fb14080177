"""Prompts and stop strings of a request: texts or token ids, checked before anything is decoded.

The rules for texts are those of `Bundle.generate` (`pipeline.inference.request`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.inference.completion import StopStrings
from pipeline.inference.request import PromptEncoder, read_stop
from pipeline.inference.serve.errors import ApiError, wrong
from pipeline.inference.serve.protocol import CompletionRequest
from pipeline.inference.serve.text import Texts
from pipeline.tokenizer import Tokenizer

ELSEWHERE = 20_000  # characters: a longer text is tokenized in a thread, because others would wait 4 ms and more


def count_prompts(request: CompletionRequest) -> int:
    """How many prompts a request has, before they are read."""
    given = request.prompt
    several = isinstance(given, list) and len(given) > 0 and not isinstance(given[0], int)
    return len(given) if several else 1


@dataclass(frozen=True)
class Prompt:
    """The ids of one prompt; `text` as it was given, None if ids were."""

    ids: list[int]
    text: str | None


class Prompts:
    """Reads them for one model."""

    def __init__(self, tokenizer: Tokenizer, *, context_length: int, vocab_size: int, prefix: list[int], max_stop: int):
        self.tokenizer, self.texts = tokenizer, Texts(tokenizer)
        self.context_length, self.eos_id = context_length, tokenizer.eos_id
        self._vocab_size, self._max_stop = vocab_size, max_stop
        self._encode = PromptEncoder(tokenizer, context_length=context_length, prefix=prefix)

    async def read(self, request: CompletionRequest) -> list[Prompt]:
        """The prompts of a request. Raises ApiError."""
        given = request.prompt
        if isinstance(given, str):
            return await self._of_texts([given])
        if not isinstance(given, list) or not given:
            raise _wrong("a text, a list of texts, token ids or lists of token ids is needed, and at least one")
        if all(isinstance(one, str) for one in given):
            return await self._of_texts(given)
        if all(isinstance(one, list) for one in given):
            return [self._of_ids(f"prompt[{index}]", ids) for index, ids in enumerate(given)]
        return [self._of_ids("prompt", given)]

    def stops(self, given: Any) -> StopStrings:
        """The stop strings of a request. Raises ApiError."""
        texts = [given] if isinstance(given, str) else given
        try:
            if isinstance(texts, list) and len(texts) > self._max_stop:
                raise UserError(f"stop: {len(texts)} strings; this server takes at most {self._max_stop}")
            return read_stop(texts)
        except UserError as error:
            raise wrong("stop", str(error)) from None

    async def ids_of(self, text: str) -> list[int]:
        """The ids of a text of any length that `PromptEncoder` would tokenize. Raises ApiError."""
        if len(text.encode()) > self._encode.max_bytes:
            raise _wrong(f"more than {self._encode.max_bytes} bytes; send less")
        return list(await _in_thread(len(text), self.tokenizer.encode, text))

    def check_ids(self, name: str, ids: list[Any]) -> None:
        """Raises ApiError for what is no token id."""
        if not all(type(one) is int and 0 <= one < self._vocab_size for one in ids):
            raise wrong(
                name.partition("[")[0], f"{name}: holds something else than token ids from 0 to {self._vocab_size - 1}"
            )

    async def _of_texts(self, texts: list[str]) -> list[Prompt]:
        try:
            found = await _in_thread(sum(map(len, texts)), self._encode, texts)
        except UserError as error:
            raise wrong("prompt", str(error), code="prompt_refused") from None
        return [Prompt(list(ids), text) for ids, text in zip(found, texts, strict=True)]

    def _of_ids(self, name: str, ids: list[Any]) -> Prompt:
        if not ids:
            raise _wrong(f"{name} is empty; give at least one token")
        self.check_ids(name, ids)
        if len(ids) >= self.context_length:
            raise _wrong(f"{name}: {len(ids)} tokens leave no room in the context of {self.context_length}; shorten it")
        return Prompt(ids, None)


async def _in_thread(size: int, work: Any, argument: Any) -> Any:
    return work(argument) if size < ELSEWHERE else await asyncio.to_thread(work, argument)


def _wrong(problem: str) -> ApiError:
    return wrong("prompt", problem if problem.startswith("prompt") else f"prompt: {problem}", code="prompt_refused")
