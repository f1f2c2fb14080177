"""The decoders that `pldr bench decode` compares: one model in several forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from pipeline.bench.blocks import Contender
from pipeline.bundle.formats import SCALE, pack
from pipeline.config.post import WeightFormat
from pldr_model.config import ModelConfig
from pldr_model.decode.decoder import Decoder
from pldr_model.decode.linear import Matrix
from pldr_model.model import PLDRModel, g_shape

TWIN, FULL, LIVE, LOW_RANK = "sdpa", "bundle", "live", "low_rank"
FORMATS: tuple[WeightFormat, ...] = ("bf16", "int8")


def make_contenders(config: ModelConfig, key_rank: int, context_length: int) -> dict[str, Contender]:
    """By name: `sdpa` and `bundle` in fp32, `live` if G is learned, `low_rank`, and the packed formats."""
    twin, constant = (replace(c, context_length=context_length) for c in (config.sdpa_twin(), config.with_constant_g()))
    weights = PLDRModel(twin).requires_grad_(False).state_dict()
    g_lm = torch.randn(g_shape(config))
    found = {TWIN: Contender.of(twin, weights), FULL: Contender.of(constant, weights, g_lm)}
    if config.g_source == "learned":
        found[LIVE] = replace(found[TWIN], decoder=Decoder(twin, weights, deduce=_no_prompt))
    for name in FORMATS:
        found[name] = Contender.of(constant, packed(weights, name), g_lm)
    return found


def packed(weights: Mapping[str, torch.Tensor], weight_format: WeightFormat) -> dict[str, Matrix | torch.Tensor]:
    """A state dict with its matrices in a format that a bundle is stored in."""
    stored = pack(weights, weight_format)
    found: dict[str, Matrix | torch.Tensor] = {}
    for name, tensor in stored.items():
        bias = stored.get(f"{name.removesuffix('weight')}bias")
        if tensor.dtype == torch.int8:
            found[name] = Matrix.int8(tensor, stored[name + SCALE], bias)
        elif tensor.dtype == torch.bfloat16:
            found[name] = Matrix.bf16(tensor, bias)
        elif not name.endswith(SCALE):
            found[name] = tensor
    return found


def _no_prompt(ids_1S: torch.Tensor) -> torch.Tensor:
    raise AssertionError("no prompt is read")
