"""One step of a decoder: as it is, as a CUDA graph, or compiled first."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.bench.blocks import Step
from pldr_model.decode.cache import KVCache
from pldr_model.decode.decoder import Decoder

WARM_UP = 3  # steps before a capture: kernels are loaded and workspaces allocated


def stepper(decoder: Decoder, mode: str) -> Step:
    """mode: `eager`, `captured`, or `compiled` (which is captured, too, where graphs exist)."""
    if mode == "eager":
        return decoder.step
    kernels: Step = decoder.step_kernels
    if mode == "compiled":
        kernels = torch.compile(kernels, dynamic=False)
    if decoder.device.type != "cuda":
        return _Grown(kernels)
    return _Captured(kernels)


class _Grown:
    """The host's side of a step, then its kernels."""

    def __init__(self, kernels: Step) -> None:
        self._kernels = kernels

    def __call__(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        cache.grow(1)
        return self._kernels(ids_B, cache)


class _Captured:
    """The kernels as a graph for each cache and bound."""

    def __init__(self, kernels: Step) -> None:
        self._kernels = kernels
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        cache.grow(1)
        key = (id(cache), cache.bound)
        if key not in self._graphs:
            self._graphs[key] = self._capture(ids_B, cache)
        graph, own_B, logits_BV = self._graphs[key]
        own_B.copy_(ids_B)
        graph.replay()
        return logits_BV

    def _capture(self, ids_B: Tensor, cache: KVCache) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        own_B, length_B = ids_B.clone(), cache.length_B.clone()
        stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._kernels(own_B, cache)
                cache.length_B.copy_(length_B)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits_BV = self._kernels(own_B, cache)
        cache.length_B.copy_(length_B)
        return graph, own_B, logits_BV
