"""A decoding step as CUDA graphs: all its launches at once, for a GPU that waits for Python.

A graph replays the same kernels on the same memory, so it belongs to one cache, and to one `bound` of it: one is captured in so
many tokens as `bound` counts (`BOUND_STEP`), and kept. Not for a CPU, and not worth its capture for a few tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pldr_model.decode.cache import KVCache
from pldr_model.decode.decoder import Decoder

WARM_UP = 2  # runs before a capture: kernels are chosen, and libraries loaded


class CapturedStep:
    """`decoder.step` for one cache. The logits are overwritten by the next step."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder, self._cache = decoder, cache
        self._ids_B = torch.zeros_like(cache.length_B)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # bound -> graph, its logits

    @torch.inference_mode()
    def __call__(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        """As `Decoder.step`."""
        assert cache is self._cache, "captured for another cache"
        cache.grow(1)
        self._ids_B.copy_(ids_B)
        if cache.bound not in self._graphs:
            self._graphs[cache.bound] = self._capture()
        graph, logits_BV = self._graphs[cache.bound]
        graph.replay()
        return logits_BV

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """What the runs before it write is written again by the step itself."""
        before_B = self._cache.length_B.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._decoder.step_kernels(self._ids_B, self._cache)
                self._cache.length_B.copy_(before_B)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            logits_BV = self._decoder.step_kernels(self._ids_B, self._cache)
        return graph, logits_BV
