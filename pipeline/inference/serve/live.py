"""The engine of `NAME:live`: the model with its metric learner, to compare with the cached G_LM that `NAME` is served with.

Each prompt is answered with the G_LM that the metric learner deduces from it, which decoding then keeps, like keys and values.
Decisions. One sequence decodes at a time, and others wait: this is a reference to compare with, not a way to serve. Tokens are
chosen as `Bundle.generate` chooses them (`pldr_model.next_token`), so that the same seed gives both models the same draws and a
difference is the models'. Log-probabilities of a prompt (`score`) are those of one pass with G_LM of the complete prompt: it
has seen the tokens that it predicts.

Shapes: S tokens, V vocabulary.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.inference.serve.engine import DecodeRequest, EngineError, EngineLoad, Token
from pldr_model.decode.cache import KVCache
from pldr_model.decode.decoder import Decoder
from pldr_model.model import PLDRModel
from pldr_model.next_token import RowSettings, choose

LIVE = ":live"  # how the id of a live model ends
Result = TypeVar("Result")


class LiveEngine:
    """An `Engine` over a live model (CPU, evaluation mode)."""

    name = "live"

    def __init__(self, model: PLDRModel, *, eos_id: int) -> None:
        self._model, self._decoder, self._eos_id = model, Decoder.of(model), eos_id
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._thread: ThreadPoolExecutor | None = None

    async def start(self) -> None:
        """Get ready to decode."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="live-model")

    async def stop(self) -> None:
        """What is being decoded raises EngineError at its next token."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=False, cancel_futures=True)

    def problem(self) -> str | None:
        """Why nothing can be decoded now; None when ready."""
        return "not started, or stopped" if self._thread is None else None

    def load(self) -> EngineLoad:
        """One sequence decodes, the others wait."""
        return EngineLoad(running=int(self._turn.locked()), waiting=self._waiting)

    async def decode(self, request: DecodeRequest) -> AsyncGenerator[list[Token], None]:
        """The new tokens, one at a time. Ends after eos (kept) or max_tokens. Raises UserError, EngineError."""
        async with self._my_turn():
            sequence = _Sequence(self._decoder, request)
            for _ in range(request.max_tokens):
                token = await self._in_thread(sequence.next)
                yield [token]
                if token.id == self._eos_id:
                    return

    async def score(self, ids: list[int], num_top: int) -> list[Token]:
        """The tokens of a prompt with their log-probabilities; the first has none. Raises UserError, EngineError."""
        async with self._my_turn():
            return await self._in_thread(lambda: _score(self._model, ids, num_top))

    @contextlib.asynccontextmanager
    async def _my_turn(self) -> AsyncIterator[None]:
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._turn.release()

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        """Run it where the event loop is not held up. Raises EngineError for whatever is not the request's fault."""
        if self._thread is None:
            raise EngineError("the live model was stopped")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except RuntimeError as error:  # torch's, and an executor's that was shut down
            raise EngineError(f"the live model failed: {' '.join(str(error).split())[:200]}") from None


class _Sequence:
    """A prompt and what follows it."""

    def __init__(self, decoder: Decoder, request: DecodeRequest) -> None:
        self._request = request
        self._decoder = decoder
        self._cache: KVCache | None = None
        self._unread = request.ids
        V = decoder.config.vocab_size
        self._settings = RowSettings.of([request.sampling()], vocab_size=V)
        self._seed_1, self._number = torch.tensor([request.seed]), 0
        self._seen_1V = torch.zeros(1, V, dtype=torch.bool)

    @torch.inference_mode()
    def next(self) -> Token:
        """Read what has not been read, and choose a token."""
        if self._cache is None:
            capacity = len(self._unread) + self._request.max_tokens - 1  # the last new token is chosen and never read
            self._cache, logits_1V = self._decoder.prefill(self._unread, capacity=max(capacity, len(self._unread)))
        else:
            logits_1V = self._decoder.step(torch.tensor(self._unread), self._cache)
        logits_V = logits_1V[0]
        _require_finite(logits_V)
        self._seen_1V[:, self._unread] = True
        number_1 = torch.tensor([self._number])
        token_1 = choose(logits_V[None], self._settings, seed_B=self._seed_1, number_B=number_1, seen_BV=self._seen_1V)
        chosen = int(token_1)
        self._unread, self._number = [chosen], self._number + 1
        return _token(chosen, logits_V, self._request.num_top)


@torch.inference_mode()
def _score(model: PLDRModel, ids: list[int], num_top: int) -> list[Token]:
    logits_SV = model(torch.tensor([ids]), padded=False)[0]
    _require_finite(logits_SV)
    after = zip(ids[1:], logits_SV, strict=False)  # nothing follows the last token
    return [Token(ids[0]), *(_token(token, logits_V, num_top) for token, logits_V in after)]


def _token(chosen: int, logits_V: Tensor, num_top: int | None) -> Token:
    if num_top is None:
        return Token(chosen)
    log_p_V = logits_V.double().log_softmax(dim=-1)
    best = log_p_V.topk(min(num_top, len(log_p_V)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Token(chosen, float(log_p_V[chosen]), top)


def _require_finite(logits: Tensor) -> None:
    if not logits.isfinite().all():
        raise UserError("prompt: the live model's logits are NaN or infinite after it; change it")
