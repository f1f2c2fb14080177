"""`POST /v1/completions`: prompts in, text out, as one JSON object or as a stream of server-sent events.

An ASGI application of its own, so that it hears of a client that is gone, waits for one that reads slowly, and holds its room
until the answer is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from pipeline.errors import UserError
from pipeline.inference.completion import StopStrings
from pipeline.inference.serve.engine import DecodeRequest, Engine, EngineError, Token
from pipeline.inference.serve.errors import ApiError, wrong
from pipeline.inference.serve.limits import ClientGone, Load, read_body, while_wanted
from pipeline.inference.serve.metrics import Metrics
from pipeline.inference.serve.models import Models
from pipeline.inference.serve.prompt_input import Prompt, Prompts, count_prompts
from pipeline.inference.serve.protocol import CompletionRequest, check_stream_options, read_request
from pipeline.inference.serve.text import Choice, Logprobs, Piece
from pldr_model.sampling import seeds_of

Emit = Callable[[int, Piece], Awaitable[None]]  # a piece of the choice with this index
EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
LAST_WORDS_S = 1.0  # to tell a client in a stream why it ends


@dataclass
class Job:
    """A request, read: everything that decoding it needs."""

    request: CompletionRequest
    model: str
    engine: Engine
    prompts: list[Prompt]
    stops: StopStrings
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))
    began: float = field(default_factory=time.perf_counter)
    new_tokens: int = 0

    def usage(self) -> dict[str, int]:
        """Tokens read and made."""
        read = sum(len(prompt.ids) for prompt in self.prompts)
        return {
            "prompt_tokens": read,
            "completion_tokens": self.new_tokens,
            "total_tokens": read + self.new_tokens,
        }


class Completions:
    """The endpoint. on_prompt: gets the ids of every prompt that the default model decodes (the drift sentinel samples
    them)."""

    def __init__(
        self,
        models: Models,
        prompts: Prompts,
        load: Load,
        metrics: Metrics,
        *,
        fingerprint: str,
        on_prompt: Callable[[list[int]], object] | None = None,
    ) -> None:
        self._models, self._prompts, self._load, self._metrics = models, prompts, load, metrics
        self._fingerprint, self._on_prompt = fingerprint, on_prompt

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI. Raises ApiError before anything is sent."""
        with self._load.request() as slots:
            body = await read_body(receive, dict(scope["headers"]), self._load.limits.max_body)
            request = read_request(CompletionRequest, body)
            check_stream_options(request)
            model, engine = self._models.ready(request.model)
            slots.hold(count_prompts(request) * request.n)
            prompts = await self._prompts.read(request)
            job = Job(request, model, engine, prompts, self._prompts.stops(request.stop))
            for prompt in prompts:
                self._metrics.prompt(model, len(prompt.ids))
                if self._on_prompt is not None and model == self._models.default:
                    self._on_prompt(prompt.ids)
            try:
                if request.stream:
                    await self._stream(job, receive, send)
                else:
                    answer = await while_wanted(self._whole(job), receive, self._load)
                    await _send_json(send, answer)
            except ClientGone:
                self._metrics.aborted(model)

    async def _whole(self, job: Job) -> dict[str, Any]:
        """The answer in one piece."""
        count = len(job.prompts) * job.request.n
        wanted = job.request.logprobs is not None
        choices = [Piece("", Logprobs() if wanted else None) for _ in range(count)]

        async def add(index: int, piece: Piece) -> None:
            choice = choices[index]
            choice.text += piece.text
            choice.finish_reason = piece.finish_reason
            if choice.logprobs is not None and piece.logprobs is not None:
                choice.logprobs.extend(piece.logprobs)

        await self._decode(job, add)
        answer = self._envelope(job, [_choice(index, piece) for index, piece in enumerate(choices)])
        return answer | {"usage": job.usage()}

    async def _stream(self, job: Job, receive: Any, send: Any) -> None:
        """The answer as events. What goes wrong after the first of them is an event, too."""
        options = job.request.stream_options
        with_usage = options is not None and options.include_usage
        extra: dict[str, Any] = {"usage": None} if with_usage else {}
        started = False
        one_at_a_time = asyncio.Lock()

        async def event(data: dict[str, Any] | None) -> None:
            nonlocal started
            async with one_at_a_time:
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
                text = b"[DONE]" if data is None else orjson.dumps(data)
                await send({"type": "http.response.body", "body": b"data: %b\n\n" % text, "more_body": True})

        async def add(index: int, piece: Piece) -> None:
            await event(self._envelope(job, [_choice(index, piece)]) | extra)

        async def work() -> None:
            await self._decode(job, add)
            if with_usage:
                await event(self._envelope(job, []) | {"usage": job.usage()})
            await event(None)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await while_wanted(work(), receive, self._load)
        except ApiError as error:
            if not started:
                raise
            self._metrics.refused(error.status)
            with contextlib.suppress(TimeoutError):  # of one that does not read
                async with asyncio.timeout(LAST_WORDS_S):
                    await event(error.body())
                    await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _decode(self, job: Job, emit: Emit) -> None:
        """Decode all choices side by side. Raises ApiError."""
        n = job.request.n
        seed = secrets.randbits(63) if job.request.seed is None else job.request.seed
        seeds = seeds_of([prompt.ids for prompt in job.prompts for _ in range(n)], seed)
        tasks = [
            asyncio.ensure_future(self._prompt(job, prompt, index * n, seeds[index * n : (index + 1) * n], emit))
            for index, prompt in enumerate(job.prompts)
        ]
        try:
            await asyncio.gather(*tasks)
        except UserError as error:
            param = str(error).partition(":")[0]
            raise wrong(param if param in CompletionRequest.model_fields else "prompt", str(error)) from None
        except EngineError as error:
            raise ApiError(500, f"the engine failed: {error}", code="engine_failed") from None
        finally:
            await _cancel(tasks)

    async def _prompt(self, job: Job, prompt: Prompt, first: int, seeds: list[int], emit: Emit) -> None:
        """The choices of one prompt, after its echo."""
        request, offset = job.request, 0
        if request.echo:
            tokens = [Token(id) for id in prompt.ids]
            if request.logprobs is not None:
                tokens = await job.engine.score(prompt.ids, request.logprobs)
            echo = self._prompts.texts.echo(prompt.text, tokens, request.logprobs)
            offset = len(echo.text)
            for index in range(len(seeds)):
                await emit(first + index, echo)
        tasks = [
            asyncio.ensure_future(self._choice(job, prompt, first + index, seed, offset, emit))
            for index, seed in enumerate(seeds)
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            await _cancel(tasks)

    async def _choice(self, job: Job, prompt: Prompt, index: int, seed: int, offset: int, emit: Emit) -> None:
        request = job.request
        room = min(request.max_tokens, self._prompts.context_length - len(prompt.ids))
        choice = Choice(
            self._prompts.texts,
            job.stops,
            eos_id=self._prompts.eos_id,
            max_tokens=room,
            num_top=request.logprobs,
            offset=offset,
        )
        if room:
            decode = DecodeRequest(
                ids=prompt.ids,
                max_tokens=room,
                temperature=request.temperature,
                top_k=max(request.top_k, 0),
                top_p=request.top_p,
                min_p=request.min_p,
                repetition_penalty=request.repetition_penalty,
                seed=seed,
                num_top=request.logprobs,
            )
            await self._follow(job, choice, job.engine.decode(decode), index, emit)
        piece, reason = choice.piece(), choice.finish_reason
        if piece is None or reason is None:
            raise EngineError("it ended a sequence too early")
        await emit(index, piece)
        self._metrics.ended(job.model, reason, num_tokens=len(choice.ids), seconds=time.perf_counter() - job.began)

    async def _follow(self, job: Job, choice: Choice, steps: Any, index: int, emit: Emit) -> None:
        """Pass on what an engine's tokens settle, up to the end."""
        last = job.began
        try:
            async for tokens in steps:
                before = len(choice.ids)
                choice.take(tokens)
                count, now = len(choice.ids) - before, time.perf_counter()
                job.new_tokens += count
                self._metrics.tokens(job.model, count, first=not before, seconds=now - last)
                last = now
                if choice.finish_reason is not None:
                    return
                if (piece := choice.piece()) is not None:
                    await emit(index, piece)
        finally:
            await steps.aclose()

    def _envelope(self, job: Job, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": job.id,
            "object": "text_completion",
            "created": job.created,
            "model": job.model,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
        }


def _choice(index: int, piece: Piece) -> dict[str, Any]:
    logprobs = None if piece.logprobs is None else piece.logprobs.as_json()
    return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}


async def _send_json(send: Any, data: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    body = orjson.dumps(data)
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _cancel(tasks: Sequence[asyncio.Future[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
