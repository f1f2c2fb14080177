"""What decodes behind the server: token ids in, token ids out. Text, stop strings, limits and HTTP are the server's."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from pldr_model.sampling import Sampling


@dataclass(frozen=True)
class DecodeRequest:
    """One sequence to decode. The server has checked all of it: ids, settings, and that it fits the context.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 disable those. seed: of this very sequence; its
    tokens depend on nothing else. num_top: how many of the best tokens to name at each position; None for no
    log-probabilities at all.
    """

    ids: list[int]
    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    num_top: int | None = None

    def sampling(self) -> Sampling:
        """What `pldr_model.next_token` chooses by."""
        return Sampling(
            self.max_tokens,
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            self.seed,
        )


@dataclass(frozen=True)
class Token:
    """A token and how probable the model found it, in nats, at temperature 1. `top`: the best tokens there, best first."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class EngineLoad:
    """What an engine is doing: sequences that decode and that wait, and the part of its KV-cache in use."""

    running: int = 0
    waiting: int = 0
    cache_usage: float = 0.0


class EngineError(RuntimeError):
    """The engine failed; one line. The client learns that the server failed, and the log says why."""


class Engine(Protocol):
    """What every engine has. All methods are called in the server's event loop.

    A request that the model has no answer for (logits that are not finite) raises UserError, which the client sees.
    """

    name: str  # in logs and metrics: "transformers", "vllm", "live"

    async def start(self) -> None:
        """Get ready to decode; the server answers 503 until then. Raises UserError or EngineError."""

    async def stop(self) -> None:
        """Let go of everything. What is being decoded raises EngineError."""

    def problem(self) -> str | None:
        """Why nothing can be decoded now, in one line; None when ready."""

    def load(self) -> EngineLoad:
        """What it is doing now."""

    def decode(self, request: DecodeRequest) -> AsyncGenerator[list[Token], None]:
        """The new tokens as they come, at least one at a time and more if the reader was slow. Ends after eos (kept) or
        max_tokens. Closing the iterator (`aclose`, or cancelling its task) ends the work. Raises UserError, EngineError."""

    async def score(self, ids: list[int], num_top: int) -> list[Token]:
        """The tokens of a prompt with their log-probabilities; the first has none."""
