"""A server without an engine that needs packages or processes: the real decoder, one sequence at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from pipeline.inference.serve.engine import DecodeRequest, EngineLoad, Token
from pldr_model.generation import generate_steps
from pldr_model.model import PLDRModel


class StepsEngine:
    """`pldr_model.generation` in the event loop; a token is a step, and `delay_s` after each lets others run."""

    name = "steps"

    def __init__(self, model: PLDRModel, *, eos_id: int, delay_s: float = 0.0) -> None:
        self._model, self._eos_id, self._delay_s = model, eos_id, delay_s
        self.ready, self.running, self.closed = True, 0, 0

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    def problem(self) -> str | None:
        return None if self.ready else "not ready"

    def load(self) -> EngineLoad:
        return EngineLoad(running=self.running)

    async def decode(self, request: DecodeRequest) -> AsyncIterator[list[Token]]:
        self.running += 1
        try:
            steps = generate_steps(
                self._model,
                [request.ids],
                max_new_tokens=request.max_tokens,
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
                eos_id=self._eos_id,
                seed=request.seed,
            )
            for new in steps:
                yield [Token(new[0][-1], -1.0 if request.num_top is not None else None)]
                await asyncio.sleep(self._delay_s)
        finally:
            self.running -= 1
            self.closed += 1

    async def score(self, ids: list[int], num_top: int) -> list[Token]:
        return [Token(ids[0]), *(Token(id, -1.0) for id in ids[1:])]
