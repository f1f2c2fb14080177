"""One step of a decoder: as it is, as a CUDA graph, or compiled first."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.bench.blocks import Step
from pldr_model.decode.cache import KVCache
from pldr_model.decode.capture import CapturedStep
from pldr_model.decode.decoder import Decoder


def stepper(decoder: Decoder, mode: str) -> Step:
    """mode: `eager`, `captured`, or `compiled` (which is captured, too, where graphs exist)."""
    if mode == "eager":
        return decoder.step
    kernels: Step = decoder.step_kernels
    if mode == "compiled":
        kernels = torch.compile(kernels, dynamic=False)
    return CapturedStep(kernels) if decoder.device.type == "cuda" else _Grown(kernels)


class _Grown:
    """The host's side of a step, then its kernels."""

    def __init__(self, kernels: Step) -> None:
        self._kernels = kernels

    def __call__(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        cache.grow(1)
        return self._kernels(ids_B, cache)
