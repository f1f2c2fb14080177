"""The texts and settings of a request: what is refused of them, in one line, before anything is computed.

Numbers (temperature, top_k, …) are checked in `pldr_model.sampling`, for every caller.
"""

from __future__ import annotations

import difflib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import UserError
from pipeline.inference.completion import StopStrings
from pipeline.tokenizer import Tokenizer

MIN_PROMPT_BYTES = 1 << 20  # a tokenizer may shorten a text (white space, unknown characters); up to here it is asked
MAX_STOP_STRINGS = 1_000_000
MAX_STOP_CHARACTERS = 1000
SETTINGS = {  # and their defaults
    "max_new_tokens": 128,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": 0,
}


class PromptEncoder:
    """Prompts to ids. A long prompt is refused by its bytes, before it is tokenized.

    Every token covers at most the bytes of the longest piece, so more bytes than the context has tokens of that size cannot
    fit. A tokenizer that normalizes or merges unknown characters may shorten a text before; so a prompt is refused by
    its bytes only when it also has more than MIN_PROMPT_BYTES, which takes 0.2 s.
    """

    def __init__(self, tokenizer: Tokenizer, *, context_length: int, prefix: list[int]) -> None:
        longest = max(len(tokenizer.piece(token).encode()) for token in range(tokenizer.vocab_size))
        self.max_bytes = max((context_length - 1) * longest, MIN_PROMPT_BYTES)
        self.tokenizer, self.context_length, self.prefix = tokenizer, context_length, prefix

    def __call__(self, prompts: Any) -> list[array[int]]:
        """The ids of each prompt. Raises UserError that names the first prompt which is no text, is empty or does not fit."""
        texts = _list_of("prompts", prompts)
        if not texts:
            raise UserError("prompts: none given; give at least one text")
        return [self._encode(f"prompts[{index}]", text) for index, text in enumerate(texts)]

    def _encode(self, name: str, text: Any) -> array[int]:
        text = _text(name, text, max_bytes=self.max_bytes, context_length=self.context_length)
        ids = array("i", self.prefix + self.tokenizer.encode(text))
        if not ids:
            raise UserError(f"{name}: empty; give at least one character")
        if len(ids) >= self.context_length:
            raise UserError(
                f"{name}: {len(ids)} tokens leave no room in the context of {self.context_length}; shorten it"
            )
        return ids


def read_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a completion, with the defaults of those that are not given. Raises UserError for an unknown name."""
    for name in settings:
        if name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, n=1)
            help = f"did you mean {near[0]}?" if near else f"there are {', '.join(SETTINGS)}, stop"
            raise UserError(f"{name}: no setting of a completion; {help}")
    return {**SETTINGS, **settings}


def read_texts(name: str, texts: Any) -> list[str]:
    """A list of valid texts, which may be empty and of any length. Raises UserError that names the first other one."""
    found = list(_list_of(name, texts))
    for index, text in enumerate(found):
        if not isinstance(text, str):
            raise UserError(f"{name}[{index}]: {_kind(text)}; give a text")
        _bytes(f"{name}[{index}]", text)
    return found


def read_stop(stop: Any) -> StopStrings:
    """The stop strings, ready to be searched for. Raises UserError."""
    texts = _list_of("stop", stop)
    if len(texts) > MAX_STOP_STRINGS:
        raise UserError(f"stop: {len(texts)} strings; give at most {MAX_STOP_STRINGS}")
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise UserError(f"stop: a list of non-empty strings is needed; stop[{index}] is {_kind(text)}")
        if len(text) > MAX_STOP_CHARACTERS:
            raise UserError(f"stop[{index}]: {len(text)} characters; give at most {MAX_STOP_CHARACTERS}")
        _bytes(f"stop[{index}]", text)
    return StopStrings(texts)


def _list_of(name: str, values: Any) -> Sequence[Any]:
    """A list, tuple, array or column as it is; anything else is refused (a text by itself, bytes, a set, a generator)."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, Sequence) and not isinstance(values, str | bytes | bytearray | memoryview):
        return values
    raise UserError(f"{name}: a list of texts is needed, not {_kind(values)}; write [text]")


def _text(name: str, text: Any, *, max_bytes: int, context_length: int) -> str:
    if not isinstance(text, str):
        raise UserError(f"{name}: {_kind(text)}; give a text")
    size = len(text) if len(text) > max_bytes else _bytes(name, text)
    if size > max_bytes:
        raise UserError(
            f"{name}: {size} bytes or more leave no room in the context of {context_length} tokens "
            f"(at most {max_bytes} are tokenized); shorten it"
        )
    return str(text)


def _bytes(name: str, text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise UserError(f"{name}: not valid UTF-8; convert it first") from None


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "one text" if value else "an empty text"
    return "None" if value is None else f"a value of type {type(value).__name__}"
