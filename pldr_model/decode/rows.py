"""Prompts that are being continued: what a row has got, when it ends, and the choice of its next token on the device.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pldr_model.next_token import RowSettings, choose

Stop = Callable[[int, list[int]], bool] | Sequence[Sequence[int]]


class Row:
    """A prompt and what follows it; `room` is how many new tokens it may have at most."""

    __slots__ = ("failed", "index", "new", "prompt", "room", "seed")

    def __init__(self, index: int, prompt: array[int], room: int) -> None:
        self.index, self.prompt, self.room = index, prompt, room
        self.new: list[int] = []
        self.failed = False  # its logits were not finite
        self.seed = 0

    @property
    def length(self) -> int:
        """Tokens that are read of it at most: the last new one is chosen, and never read."""
        return len(self.prompt) + self.room - 1

    @property
    def left(self) -> int:
        """New tokens that it may still get."""
        return self.room - len(self.new)


@dataclass(frozen=True)
class Rules:
    """When rows end, beside having no room left."""

    eos_id: int | None
    stop: Stop | None

    def take(self, row: Row, token: int, finite: bool) -> bool:
        """Give a row its next token, if the logits were finite; False when it has ended."""
        row.failed = not finite
        if finite:
            row.new.append(token)
        return finite and not self._ended(row)

    def _ended(self, row: Row) -> bool:
        stopped = self.stop is not None and _stopped(
            row, self.stop
        )  # asked of the last token, too: a stream reads it there
        return stopped or row.left == 0 or row.new[-1] == self.eos_id


class Draws:
    """What the choice of the next token needs to know of each row, on the device; `token_B` are the last chosen."""

    def __init__(self, rows: Sequence[Row], settings: RowSettings, device: torch.device) -> None:
        self.settings = settings
        self.token_B = torch.zeros(len(rows), dtype=torch.int64, device=device)
        self.seed_B = torch.tensor([row.seed for row in rows], device=device)
        self.number_B = torch.tensor([len(row.new) for row in rows], device=device)
        self.seen_BV: Tensor | None = None
        if settings.penalizes:
            self.seen_BV = torch.zeros(len(rows), settings.vocab_size, dtype=torch.bool, device=device)
            for seen_V, row in zip(self.seen_BV, rows, strict=True):
                seen_V[row.prompt.tolist() + row.new] = True

    def next(self, logits_BV: Tensor) -> Tensor:
        """Choose each row's next token; [2,B]: the tokens, and whether the row's logits were finite."""
        low_B, high_B = logits_BV.aminmax(dim=-1)  # NaN if one is
        finite_B = (low_B > -torch.inf) & (high_B < torch.inf)
        chosen_B = choose(logits_BV, self.settings, seed_B=self.seed_B, number_B=self.number_B, seen_BV=self.seen_BV)
        self.token_B.copy_(chosen_B)
        self.number_B.add_(1)
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, chosen_B.unsqueeze(1), True)
        return torch.stack((chosen_B, finite_B))

    def put(self, slots: Sequence[int], other: Draws, rows: Sequence[int]) -> None:
        """Rows of `other` take the places `slots`."""
        to, of = (torch.tensor(each, device=self.token_B.device) for each in (slots, rows))
        for ours, theirs in zip(self._state(), other._state(), strict=True):
            ours[to] = theirs[of]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.token_B.device)
        self.token_B, self.seed_B, self.number_B = self.token_B[index], self.seed_B[index], self.number_B[index]
        self.seen_BV = None if self.seen_BV is None else self.seen_BV[index]

    def _state(self) -> list[Tensor]:
        return [self.token_B, self.seed_B, self.number_B, *([] if self.seen_BV is None else [self.seen_BV])]


def _stopped(row: Row, stop: Stop) -> bool:
    if callable(stop):
        return stop(row.index, row.new)
    return any(row.new[-len(ending) :] == list(ending) for ending in stop)
