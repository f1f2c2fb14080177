"""Sizes of a run on a GPU, and the forms of the model that it times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.bench.blocks import Contender
from pldr_model.config import ModelConfig
from pldr_model.decode.decoder import Weights
from pldr_model.decode.linear import Matrix
from pldr_model.model import PLDRModel, g_shape

PAPER_110M = ModelConfig(vocab_size=32000, num_layers=5, num_heads=14, head_dim=64, context_length=1024, d_ff=2389)
TINY = ModelConfig(vocab_size=96, num_layers=2, num_heads=2, head_dim=16, context_length=64, A_dff=8, num_reslayerA=1)
RANKS = (18, 64)  # numbers of a key that are kept: the published G at 1e-3 of its energy keeps 13 of 64


@dataclass(frozen=True)
class Setting:
    """What is timed. length, long: cached tokens; steps: of a block that is timed; reference: a clone of its repository."""

    device: torch.device
    config: ModelConfig
    batches: tuple[int, ...]
    length: int
    long: int
    steps: int
    rounds: int
    buffer_bytes: int
    reference: Path | None

    @classmethod
    def of(cls, *, device: str, tiny: bool, reference: Path | None) -> Setting:
        """The papers' 110M model, or a small one to try everything."""
        place = torch.device(device)
        if tiny:
            return cls(place, TINY, (1, 2), 8, 40, 3, 2, 1 << 16, reference)
        return cls(place, PAPER_110M, (1, 8, 64), 512, 16384, 24, 5, 1 << 30, reference)


@dataclass(frozen=True)
class Form:
    """A state dict as it is decoded with, on the device, and its G; `key_ranks` [L,H] for low-rank keys."""

    config: ModelConfig
    weights: Weights
    g_lm: torch.Tensor | None
    key_ranks: torch.Tensor | None = None

    def contender(self) -> Contender:
        """Its decoder."""
        return Contender.of(self.config, self.weights, self.g_lm, self.key_ranks)


def make_forms(setting: Setting, names: tuple[str, ...]) -> dict[str, Form]:
    """Of random weights, those that are named: `fp32`, `bf16`, `int8` (with bf16 activations), `bf16_sdpa`, `bf16_low_rank`.
    Contexts are long enough for `setting.long`."""
    room = max(setting.config.context_length, setting.long + 2 * setting.steps)
    twin = replace(setting.config.sdpa_twin(), context_length=room)
    constant = replace(setting.config.with_constant_g(), context_length=room)
    model = PLDRModel(twin).requires_grad_(False).to(setting.device)
    L, H, K, _ = g_shape(twin)
    g_lm = torch.randn(g_shape(twin), device=setting.device) / K**0.5
    fp32 = model.state_dict()
    bf16 = {name: tensor.bfloat16() for name, tensor in fp32.items()}
    ranks = torch.full((L, H), max(1, K * RANKS[0] // RANKS[1]))
    make = {
        "fp32": lambda: Form(constant, fp32, g_lm),
        "bf16": lambda: Form(constant, bf16, g_lm.bfloat16()),
        "int8": lambda: Form(constant, int8(fp32), g_lm.bfloat16()),
        "bf16_sdpa": lambda: Form(twin, bf16, None),
        "bf16_low_rank": lambda: Form(constant, bf16, g_lm.bfloat16(), ranks),
    }
    return {name: make[name]() for name in names}


def int8(weights: Mapping[str, torch.Tensor]) -> dict[str, Matrix | torch.Tensor]:
    """Matrices as int8 with a scale for each row, the rest as bf16."""
    found: dict[str, Matrix | torch.Tensor] = {}
    for name, tensor in weights.items():
        if tensor.ndim != 2:
            found[name] = tensor.bfloat16()
            continue
        scale_O = tensor.abs().amax(dim=1) / 127
        values_OI = (tensor / scale_O[:, None]).round().to(torch.int8)
        bias = weights.get(f"{name.removesuffix('weight')}bias")
        found[name] = Matrix.int8(values_OI, scale_O, None if bias is None else bias.bfloat16(), dtype=torch.bfloat16)
    return found
