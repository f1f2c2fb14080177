"""Continuous batching: rows of one cache that prompts take in turn.

Every prompt is prefilled alone and unpadded; then rows decode together, each at its own length, a block of tokens at a time.
The host looks at a block's tokens when it is done: a row that has ended is given to the next prompt. A block is no longer than
the tokens that every row may still get, so that only `eos` and `stop` leave steps behind that nobody needs.
Decision: when no prompt waits and a quarter of the rows have ended, those that go on are copied to a smaller cache: the
copies then cost less than the steps, however the rows end. A captured step keeps its cache, whose rows only go idle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from pldr_model.decode.capture import Step
from pldr_model.decode.decoder import Decoder
from pldr_model.decode.rows import Draws, Row, Rules
from pldr_model.next_token import RowSettings


class Slots:
    """`num_slots` rows with `capacity` tokens each. block: tokens between two looks of the host. step: one in place
    of `decoder.step`, whose cache must stay the same object (a captured one)."""

    def __init__(
        self,
        decoder: Decoder,
        rules: Rules,
        settings: RowSettings,
        *,
        num_slots: int,
        capacity: int,
        g_lm: Tensor | None,
        block: int,
        step: Step | None = None,
    ) -> None:
        self._decoder, self._rules, self._settings, self._g_lm = decoder, rules, settings, g_lm
        self._block, self._step, self._fixed = block, step or decoder.step, step is not None
        self._cache = decoder.new_cache(batch_size=num_slots, capacity=capacity, g_lm=g_lm)
        self._rows: list[Row | None] = [None] * num_slots
        self._draws = Draws([], settings, decoder.device)

    def run(self, waiting: deque[Row]) -> Iterator[None]:
        """Continue all of them; yields whenever rows have got new tokens."""
        while True:
            while waiting and None in self._rows:
                self._fill(waiting)
                yield
            if not any(self._rows):
                return
            if not waiting and not self._fixed:
                self._shrink()
            self._decode_block()
            yield

    def _fill(self, waiting: deque[Row]) -> None:
        """Prefill prompts into the free slots, and choose their first tokens."""
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        new = [waiting.popleft() for _ in free[: len(waiting)]]
        logits = []
        before = None
        for slot, row in zip(free, new, strict=False):
            if row.prompt != before:  # several samples of one prompt read it once
                own, logits_1V = self._decoder.prefill(row.prompt, g_lm=self._g_lm)
                before = row.prompt
            self._cache.write_row(slot, own)
            logits.append(logits_1V)
        draws = Draws(new, self._settings, self._decoder.device)
        tokens, finite = draws.next(torch.cat(logits)).tolist()
        if len(new) == len(self._rows):
            self._draws = draws
        else:
            self._draws.put(free[: len(new)], draws, range(len(new)))
        for slot, row, token, good in zip(free, new, tokens, finite, strict=False):
            if self._rules.take(row, token, bool(good)):
                self._rows[slot] = row
        self._idle()

    def _decode_block(self) -> None:
        count = min(self._block, *(row.left for row in self._rows if row is not None))
        chosen = [self._draws.next(self._step(self._draws.token_B, self._cache)) for _ in range(count)]
        for tokens, finite in torch.stack(chosen).tolist():
            for slot, row in enumerate(self._rows):
                if row is not None and not self._rules.take(row, tokens[slot], bool(finite[slot])):
                    self._rows[slot] = None
        self._idle()

    def _idle(self) -> None:
        """Rows that nobody has go on with the others, and need room for a block as they do."""
        for slot, row in enumerate(self._rows):
            length = self._cache.lengths[slot]
            if row is None and length > min(self._block, self._cache.capacity - self._block):
                self._cache.reset(slot)

    def _shrink(self) -> None:
        live = [slot for slot, row in enumerate(self._rows) if row is not None]
        if 4 * (len(self._rows) - len(live)) >= len(self._rows):
            held = max(self._cache.lengths[slot] for slot in live)
            self._cache = self._cache.fork(live, room=self._cache.capacity - held)
            self._draws.keep(live)
            self._rows = [self._rows[slot] for slot in live]
