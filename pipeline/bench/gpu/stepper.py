"""One step of a decoder: as it is, as a CUDA graph, or compiled first."""

from __future__ import annotations

import copy
from typing import Literal

import torch

from pipeline.bench.blocks import Step
from pldr_model.decode.capture import CapturedStep
from pldr_model.decode.decoder import Decoder

Mode = Literal["eager", "captured", "compiled"]


def stepper(decoder: Decoder, mode: Mode) -> Step:
    """Compiled steps are captured, too. A device without graphs runs the step as it is, or compiled."""
    if mode == "compiled":
        decoder = copy.copy(decoder)
        decoder.step_kernels = torch.compile(decoder.step_kernels, dynamic=False)  # type: ignore[method-assign]
    captures = mode != "eager" and decoder.device.type == "cuda"
    return CapturedStep(decoder.step_kernels) if captures else decoder.step
