"""From an engine's tokens to what a client reads: text, log-probabilities, and where a completion ends.

A stream and an answer in one piece are made of the same pieces, so both say the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.inference.completion import Completion, StopStrings
from pipeline.inference.serve.engine import Token
from pipeline.tokenizer import SPECIAL_IDS, Tokenizer


@dataclass
class Logprobs:
    """OpenAI's four lists: for each token its text, its log-probability, the best ones there, and where it begins."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The four lists."""
        return dict(vars(self))

    def extend(self, other: Logprobs) -> None:
        """Append another piece's."""
        for name, values in vars(other).items():
            getattr(self, name).extend(values)


@dataclass
class Piece:
    """A part of a choice's text with its tokens. `finish_reason` is that of the last piece."""

    text: str
    logprobs: Logprobs | None
    finish_reason: str | None = None


class Texts:
    """Texts of tokens, for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # A piece that is decoded before new ids, so that they keep their leading space, whatever the prompt was.
        self._anchor = tokenizer.encode("a")[-1:]
        self._anchor_size = len(tokenizer.decode(self._anchor))

    def continuation(self, new_ids: list[int]) -> str:
        """The text that these ids add to a text before them."""
        return self._tokenizer.decode(self._anchor + new_ids)[self._anchor_size :]

    def beginning(self, ids: list[int]) -> str:
        """The text of ids at the beginning of a text."""
        return self._tokenizer.decode(ids)

    def name(self, token: int) -> str:
        """A text for one token, different for each: its piece; a byte as OpenAI writes it, a special token by its name."""
        if (byte := self._tokenizer.byte(token)) is not None:
            return f"bytes:\\x{byte:02x}"
        piece = self._tokenizer.piece(token)
        return piece if token in SPECIAL_IDS.values() else piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")

    def logprobs(self, tokens: Iterable[tuple[Token, int]]) -> Logprobs:
        """OpenAI's lists of tokens and the places where they begin. The token itself is always among the best ones named."""
        found = Logprobs()
        for token, offset in tokens:
            found.tokens.append(self.name(token.id))
            found.text_offset.append(offset)
            found.token_logprobs.append(token.logprob)
            if token.logprob is None:
                found.top_logprobs.append(None)
            else:
                best = dict(token.top) | {token.id: token.logprob}
                found.top_logprobs.append({self.name(id): value for id, value in best.items()})
        return found

    def echo(self, text: str | None, tokens: list[Token], num_top: int | None) -> Piece:
        """The prompt as the first piece of its answer: the text as it was given, or that of its ids."""
        reader = Completion(self.continuation, StopStrings())
        ids: list[int] = []
        starts = []
        for token in tokens:
            starts.append(reader.size)
            ids.append(token.id)
            reader.take(ids)
        decoded = self.beginning(ids)
        dropped = len(reader.finish()) - len(decoded)  # a space that only a continuation begins with
        whole = decoded if text is None else text
        if num_top is None:
            return Piece(whole, None)
        placed = [
            (token, min(max(start - dropped, 0), len(whole))) for token, start in zip(tokens, starts, strict=True)
        ]
        return Piece(whole, self.logprobs(placed))


class Choice:
    """One completion while it is decoded. Feed it tokens (`take`), and read off what is settled (`piece`)."""

    def __init__(
        self, texts: Texts, stops: StopStrings, *, eos_id: int, max_tokens: int, num_top: int | None, offset: int
    ) -> None:
        self._texts, self._eos_id, self._max_tokens, self._num_top = texts, eos_id, max_tokens, num_top
        self._completion, self._stops = Completion(texts.continuation, stops), stops
        self._offset = offset  # of the completion in the answer: behind the prompt, if that is echoed
        self._waiting: list[tuple[Token, int]] = []  # tokens whose text has not been sent, and where it begins
        self._sent = 0  # characters
        self.ids: list[int] = []
        self.finish_reason: str | None = "length" if not max_tokens else None

    def take(self, tokens: list[Token]) -> None:
        """Read on; tokens after the end are left out."""
        for token in tokens:
            if self.finish_reason is not None:
                return
            self._waiting.append((token, self._completion.size))
            self.ids.append(token.id)
            if self._completion.take(self.ids) or token.id == self._eos_id:
                self.finish_reason = "stop"
            elif len(self.ids) == self._max_tokens:
                self.finish_reason = "length"

    def piece(self) -> Piece | None:
        """What is new and will not change; None if that is nothing."""
        ended = self.finish_reason is not None
        text = self._completion.finish() if ended else self._completion.settled()
        if ended:
            cut = self._completion.stopped
            ready = [one for one in self._waiting if not cut or one[1] < len(text)]
            self._waiting = []
        else:
            ready = [one for one in self._waiting if one[1] < len(text)]
            self._waiting = self._waiting[len(ready) :]
        new, self._sent = text[self._sent :], len(text)
        if not ended and not new and not ready:
            return None
        found = None
        if self._num_top is not None:
            found = self._texts.logprobs([(token, self._offset + start) for token, start in ready])
        return Piece(new, found, self.finish_reason)
