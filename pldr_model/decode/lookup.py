"""Prompt-lookup decoding: what followed the last tokens when they stood there before is read in one pass, and kept while it is
what would have been chosen.

Background: drafts from the text itself (Saxena 2023, "prompt lookup decoding") instead of a draft model (2211.17192). A
draft is fixed, so the rule of rejection sampling becomes: choose at each drafted position as ever, and keep tokens for as
long as they equal the draft; the one that differs is kept, too. Tokens are chosen from (seed, number of the token), so they
are the very ones that decoding one by one gives, and not only equally distributed.
Decision: whether a draft is tried is decided by counting, not by a clock: the same call makes the same passes, and so the same
tokens down to the last bit. `Pace` counts what passes cost and gain in steps, and stakes no more than it has: its losses are
bounded whatever the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pldr_model.decode.decoder import Decoder
from pldr_model.decode.rows import Draws, Row, Rules
from pldr_model.next_token import RowSettings

GRAMS = (4, 2)  # tokens that must have stood there before, the most first
# Tokens of a pass -> what it costs in steps of one token, at most; measured (docs/inference.md).
COSTS = ((3, 1.5), (16, 2.75), (32, 3.5))
START = 0.5  # steps that may be lost before anything was gained
INCOME = 0.02  # and for each token; so decoding takes at most 1 + INCOME times as long, and START steps more
MOST = 4.0  # that is kept of what was gained, so that losses end soon where a text stops repeating itself


class Drafts:
    """The tokens of one row, and what followed each run of tokens the last time. Takes a constant time a token."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        self._next: list[dict[tuple[int, ...], int]] = [{} for _ in GRAMS]  # run -> place of what followed
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """The row's next token."""
        tokens = self.tokens
        for size, places in zip(GRAMS, self._next, strict=True):
            if len(tokens) >= size:
                places[tuple(tokens[-size:])] = len(tokens)
        tokens.append(token)

    def find(self, count: int) -> list[int]:
        """The `count` tokens that are likely to come: those that followed the last ones the time before; none where these are
        new. Where the row ends before there are `count`, they begin again: a text that repeats itself goes on so."""
        tokens = self.tokens
        for size, places in zip(GRAMS, self._next, strict=True):
            place = places.get(tuple(tokens[-size:]))
            if place is not None:
                period = len(tokens) - place
                return [tokens[place + index % period] for index in range(count)]
        return []


class Pace:
    """How many tokens to draft: more while drafts are kept, none while they cost more than they gain."""

    def __init__(self) -> None:
        self._level, self._credit = 0, START

    def count(self) -> int:
        """Tokens to draft now."""
        for level in range(self._level, -1, -1):
            width, cost = COSTS[level]
            if self._credit >= cost - 1:
                return width - 1
        return 0

    def passed(self, drafted: int, kept: int) -> None:
        """A pass over `drafted` tokens is over, of which `kept` were right; it gave one more. 0: an ordinary step."""
        gain = INCOME * (kept + 1)
        if drafted:
            cost = next(cost for width, cost in COSTS if drafted < width)
            gain += kept + 1 - cost
            up = kept == drafted
            self._level = min(self._level + 1, len(COSTS) - 1) if up else max(self._level - (kept + 1 < cost), 0)
        self._credit = min(self._credit + gain, MOST)


def continue_alone(
    decoder: Decoder, row: Row, rules: Rules, settings: RowSettings, *, g_lm: Tensor | None
) -> Iterator[None]:
    """Continue one row; yields after each of its new tokens."""
    cache, logits_WV = decoder.prefill(row.prompt, capacity=row.length, g_lm=g_lm)
    draws, drafts, pace = Draws([row], settings, decoder.device), Drafts(row.prompt), Pace()
    draft: list[int] = []
    while True:
        for kept in range(len(logits_WV)):
            (token,), (finite,) = draws.next(logits_WV[kept : kept + 1]).tolist()
            going = rules.take(row, token, bool(finite))
            yield
            if not going:
                return
            drafts.append(token)
            if draft[kept : kept + 1] != [token]:
                break
        pace.passed(len(draft), kept)
        if kept < len(draft):
            cache.rollback([len(drafts.tokens) - 1])  # the last one is chosen, and not yet read
        draft = drafts.find(min(pace.count(), row.left - 1))
        if draft:
            ids_1W = torch.tensor([[token, *draft]], device=decoder.device)
            logits_WV = decoder.logits(decoder.read(ids_1W, cache)[0])
        else:
            logits_WV = decoder.step(draws.token_B, cache)
