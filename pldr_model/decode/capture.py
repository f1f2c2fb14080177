"""A decoding step as CUDA graphs: all its launches at once, for a GPU that waits for Python.

A graph replays the same kernels on the same memory, so it belongs to one cache and to one `bound` of it. `bound` grows every
`BOUND_STEP` tokens; another graph is captured then, and all are kept for as long as the cache. Not for a CPU, and not worth its
capture for a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pldr_model.decode.cache import KVCache

Step = Callable[[Tensor, KVCache], Tensor]
WARM_UP = 3  # runs before a capture: kernels are loaded and workspaces allocated


class Graph(NamedTuple):
    """A captured step; `logits_BV` are overwritten by the next."""

    graph: torch.cuda.CUDAGraph
    ids_B: Tensor
    logits_BV: Tensor


class CapturedStep:
    """In place of `decoder.step`. kernels: `decoder.step_kernels`, or a compiled form of it."""

    def __init__(self, kernels: Step) -> None:
        self._kernels = kernels
        self._graphs: WeakKeyDictionary[KVCache, dict[int, Graph]] = WeakKeyDictionary()

    @torch.inference_mode()
    def __call__(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        """Logits [B,V], in a tensor that the next step overwrites."""
        cache.grow(1)
        graphs = self._graphs.setdefault(cache, {})
        if cache.bound not in graphs:
            graphs[cache.bound] = self._capture(ids_B, cache)
        captured = graphs[cache.bound]
        captured.ids_B.copy_(ids_B)
        captured.graph.replay()
        return captured.logits_BV

    def _capture(self, ids_B: Tensor, cache: KVCache) -> Graph:
        """Capture the step for the cache's `bound`. The warm-up runs write keys and add to lengths: lengths are put back, and
        the replay that follows writes the same keys again."""
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
        return Graph(graph, own_B, logits_BV)
