"""The engine `transformers`: their continuous batching over a paged KV-cache, in a thread of this process.

Decision: the cache is sized here. Their default takes most of the memory there is, and for attention with a mask (on a CPU) it
needs as much again (20 GB, measured).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator
from typing import Any

import torch

from pipeline.errors import UserError, first_line
from pipeline.inference.opened import OpenModel
from pipeline.inference.serve.choose import Choose, Draw, name_tokens
from pipeline.inference.serve.engine import DecodeRequest, EngineError, EngineLoad, Token
from pldr_model.generation import memory_budget

PAGE = 16  # tokens of one sequence that share a page of the cache
BATCH_TOKENS = 512  # that one pass reads: new tokens of all sequences, and pieces of prompts
SCORE_ROWS = 128  # positions whose log-probabilities are in memory at once
STOP_S = 10.0
log = logging.getLogger(__name__)


class ContinuousEngine:
    """transformers' continuous batching over an opened model with a constant G."""

    name = "transformers"

    def __init__(self, opened: OpenModel, *, max_sequences: int) -> None:
        self._opened, self._max_sequences = opened, max_sequences
        self._choose = Choose()
        self._ids = itertools.count()
        self._model: Any = None
        self._manager: Any = None
        self._scoring = asyncio.Lock()
        self._failed: str | None = None

    async def start(self) -> None:
        """Build the model and start the thread."""
        await asyncio.to_thread(self._start)

    def _start(self) -> None:
        from transformers import GenerationConfig, LogitsProcessorList
        from transformers.generation.continuous_batching.cb_logits_processors import (
            ContinuousBatchingLogitsProcessorList,
        )

        from pipeline.inference.hf.load import build

        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        model, _ = build(self._opened)
        model.set_attn_implementation("sdpa")
        with torch.inference_mode():
            manager = model.init_continuous_batching(
                GenerationConfig(do_sample=False, eos_token_id=self._opened.generation["eos_id"]),
                cache_config(model, self._opened, self._max_sequences),
            )
            manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([self._choose]))
            manager.logit_processor.tensors_required = 1
            manager.start()
        self._model, self._manager = model, manager

    async def stop(self) -> None:
        """End the thread."""
        if self._manager is not None:
            await asyncio.to_thread(self._manager.stop, timeout=STOP_S, hard_stop=True)

    def problem(self) -> str | None:
        """Why nothing can be decoded now."""
        if self._manager is None:
            return "the model is being loaded"
        if not self._manager.is_running():
            return f"the engine has stopped ({self._manager.background_thread_status.fatal_error or 'on request'})"
        return None

    def load(self) -> EngineLoad:
        """Their scheduler's numbers; those of a moment, read without a lock."""
        processor = None if self._manager is None else self._manager.batch_processor
        if processor is None:
            return EngineLoad()
        scheduler = processor.scheduler
        used = 1.0 - processor.cache.compute_free_capacity()
        return EngineLoad(len(scheduler.active_requests), len(scheduler.waiting_requests), used)

    async def decode(self, request: DecodeRequest) -> AsyncGenerator[list[Token], None]:
        """The tokens of one sequence, as many at a time as have come.

        Their attention reads the keys and values of all sequences of a pass and masks what is not a sequence's own. Zero times
        NaN is NaN: one sequence that is not finite makes its neighbors so. Each of them is looked at alone, and continued if
        it is finite there.
        """
        draw = Draw(request)
        while True:
            steps = self._run(draw)
            try:
                async for tokens in steps:
                    yield tokens
            finally:
                await steps.aclose()
            if not draw.failed:
                return
            async with self._scoring:
                finite = await asyncio.to_thread(self._is_finite, request.ids + [token.id for token in draw.tokens])
            if not finite:
                raise UserError(
                    f"the model's logits are NaN or infinite after {len(draw.tokens)} new tokens; leave this prompt out"
                )
            draw = draw.again()

    async def _run(self, draw: Draw) -> AsyncGenerator[list[Token], None]:
        """Hand a sequence, with the tokens that it has, to the engine, until it ends or fails."""
        name, sent = f"sequence-{next(self._ids)}", len(draw.tokens)
        self._choose.draws[name] = draw
        came = asyncio.Event()
        last: Any = None

        def receive(output: Any) -> None:
            nonlocal last
            last = output
            came.set()

        manager, request = self._manager, draw.request
        manager.register_result_handler(name, receive)
        try:
            ids = request.ids + [token.id for token in draw.tokens]
            if manager.add_request(ids, name, max_new_tokens=request.max_tokens - sent, streaming=True) is None:
                raise EngineError(self.problem() or "it takes no requests")
            while not draw.failed:
                await came.wait()
                came.clear()
                output = last  # before the tokens are read: the engine goes on while they are
                if output.error is not None:
                    raise EngineError(first_line(RuntimeError(output.error)))
                if new := draw.tokens[sent:]:
                    sent += len(new)
                    yield new
                if output.is_finished():
                    return
        finally:
            if last is None or not last.is_finished():
                manager.cancel_request(name)
                with manager.output_router._lock:
                    manager.output_router.result_handlers.pop(name, None)
            del self._choose.draws[name]

    async def score(self, ids: list[int], num_top: int) -> list[Token]:
        """A pass of our own model: the engine has logits of new tokens only, and a plain pass of its model, beside its thread,
        gives other numbers (transformers keeps state in the modules)."""
        async with self._scoring:
            return await asyncio.to_thread(self._score, ids, num_top)

    @torch.inference_mode()
    def _score(self, ids: list[int], num_top: int) -> list[Token]:
        logits_SV = self._logits(ids)
        tokens = [Token(ids[0])]
        for start in range(0, len(ids) - 1, SCORE_ROWS):
            end = min(start + SCORE_ROWS, len(ids) - 1)
            tokens += name_tokens(logits_SV[start:end], ids[start + 1 : end + 1], num_top)
        return tokens

    @torch.inference_mode()
    def _is_finite(self, ids: list[int]) -> bool:
        """Whether the next token of this sequence has finite logits."""
        return bool(self._logits(ids)[-1].isfinite().all())

    def _logits(self, ids: list[int]) -> torch.Tensor:
        logits_BSV = self._opened.model(torch.tensor([ids]), padded=False)
        assert isinstance(logits_BSV, torch.Tensor)
        return logits_BSV[0]


def cache_config(model: Any, opened: OpenModel, max_sequences: int) -> Any:
    """The size of the paged cache: room for all sequences at full length, but no more than `memory_budget`, and no less than
    one. Each of its tokens is counted with what a pass needs beside it: its key and value read back, and its column of the
    mask."""
    from transformers import ContinuousBatchingConfig

    config, sizes = opened.config, model.config
    itemsize = model.dtype.itemsize
    head = sizes.num_attention_heads * sizes.head_dim * itemsize
    batch_tokens = max(BATCH_TOKENS, max_sequences)
    token_bytes = 2 * sizes.num_hidden_layers * head + 3 * head + batch_tokens * itemsize
    tokens = min(
        max_sequences * config.context_length, memory_budget(opened.model.embedding.weight.device) // token_bytes
    )
    # One page more for each sequence than it fills, and what their scheduler keeps free before it begins a new one.
    pages = max(tokens, 2 * config.context_length) // PAGE + max_sequences
    return ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=pages,
        max_batch_tokens=batch_tokens,
        max_requests_per_batch=max_sequences,
        allow_block_sharing=False,  # pages of a pass that was not finite would be kept for later prompts
        auto_switch_to_flash=False,
        use_async_batching=False,
        use_cuda_graph=False,
    )
