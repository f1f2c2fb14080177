"""One step of a decoder: as it is, as a CUDA graph, or compiled first."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor

from pipeline.bench.blocks import Step
from pldr_model.decode.cache import KVCache
from pldr_model.decode.capture import CapturedStep
from pldr_model.decode.decoder import Decoder

Mode = Literal["eager", "captured", "compiled"]


def stepper(decoder: Decoder, mode: Mode) -> Step:
    """For one cache, the first that it is called with. Compiled steps are captured, too. A device without graphs runs the step
    as it is, or compiled."""
    if mode == "compiled":
        decoder = copy.copy(decoder)
        decoder.step_kernels = torch.compile(decoder.step_kernels, dynamic=False)  # type: ignore[method-assign]
    if mode == "eager" or decoder.device.type != "cuda":
        return decoder.step
    return _Captured(decoder)


class _Captured:
    """Captures when it meets its cache."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._step: CapturedStep | None = None

    def __call__(self, ids_B: Tensor, cache: KVCache) -> Tensor:
        if self._step is None:
            self._step = CapturedStep(self._decoder, cache)
        return self._step(ids_B, cache)
