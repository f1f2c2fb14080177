"""The decoders that `pldr bench decode` compares: one model in several forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.bench.blocks import Contender
from pipeline.bundle.formats import StoredWeights, pack
from pipeline.config.post import WeightFormat
from pldr_model.config import ModelConfig
from pldr_model.decode.decoder import Decoder
from pldr_model.model import PLDRModel, g_shape

TWIN, FULL, LIVE, LOW_RANK = "sdpa", "bundle", "live", "low_rank"
FORMATS: tuple[WeightFormat, ...] = ("bf16", "int8", "int4")


def make_contenders(config: ModelConfig, key_rank: int, context_length: int) -> dict[str, Contender]:
    """By name: `sdpa` and `bundle` in fp32, `live` if G is learned, `low_rank`, and the packed formats."""
    twin, constant = (replace(c, context_length=context_length) for c in (config.sdpa_twin(), config.with_constant_g()))
    weights = PLDRModel(twin).requires_grad_(False).state_dict()
    g_lm = torch.randn(g_shape(config))
    found = {TWIN: Contender.of(twin, weights), FULL: Contender.of(constant, weights, g_lm)}
    if config.g_source == "learned":
        found[LIVE] = replace(found[TWIN], decoder=Decoder(twin, weights, deduce=_no_prompt))
    ranks = torch.full((config.num_layers, config.num_heads), key_rank)
    found[LOW_RANK] = Contender.of(constant, weights, g_lm, ranks)
    for name in FORMATS:
        found[name] = packed(constant, weights, g_lm, name)
    return found


def packed(config: ModelConfig, weights: Mapping[str, Tensor], g_lm: Tensor, weight_format: WeightFormat) -> Contender:
    """What a bundle of this format is opened as."""
    stored = pack(weights, weight_format)
    sizes = {name: tensor.nbytes for name, tensor in stored.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return Contender(
        Decoder(config, StoredWeights(stored, shapes, weight_format), g_lm),
        weight_bytes=sum(sizes.values()) + g_lm.nbytes,
        embedding_bytes=sum(size for name, size in sizes.items() if name.startswith("embedding.")),
    )


def _no_prompt(ids_1S: Tensor) -> Tensor:
    raise AssertionError("no prompt is read")
