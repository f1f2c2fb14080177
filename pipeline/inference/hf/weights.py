"""The tensors that an export's files hold: the model's, in the dtype that was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.bundle.format import state_shapes
from pipeline.bundle.formats import SECTION, pack, packed_shapes
from pipeline.errors import ConfigError, UserError
from pipeline.inference.extras import require
from pipeline.inference.hf.low_rank import join_g, layer_ranks, split_g
from pipeline.inference.hf.names import from_hf, to_hf
from pipeline.inference.hf.packed import check_sizes, config_keys, from_packed, metadata_of, to_packed
from pipeline.inference.hf.sizes import DTYPES
from pipeline.inference.opened import OpenModel
from pipeline.io.storage import sha256_file
from pipeline.io.tensors import load_tensors
from pldr_model.config import ModelConfig
from pldr_model.model import PLDRModel

Dtype = Literal["fp32", "bf16", "fp16", "int8"]


@dataclass(frozen=True)
class Weights:
    """tensors: by the names of the files. keys: of config.json, beside the sizes. metadata: of each file."""

    model: ModelConfig
    tensors: dict[str, Tensor]
    keys: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def as_model(self, dtype: torch.dtype) -> PLDRModel:
        """Our model with the weights that were written."""
        state = from_hf(join_g(from_packed(self.tensors, self.model, dtype)), self.model)
        model = PLDRModel(self.model, g_lm_LHKK=state.get("g_lm")).to(dtype)
        model.load_state_dict(state)
        return model.eval()


def weights_of(opened: OpenModel, model: PLDRModel, dtype: Dtype, *, pack_output: bool = False) -> Weights:
    """Raises UserError for numbers that the dtype cannot hold, and for a model that cannot be packed."""
    if pack_output and dtype != "int8":
        raise ConfigError(f"--pack-output: packs the output layer of --dtype int8, and this is {dtype}; leave it out")
    ranks = None if model.config.g_source == "learned" else layer_ranks(opened.key_ranks, model.config.head_dim)
    keys: dict[str, Any] = {"key_ranks": ranks}
    if dtype != "int8":
        tensors = split_g(to_hf(model.state_dict(), model.config), ranks or [])
        return Weights(model.config, _in_dtype(tensors, dtype, opened.path), keys)
    if model.config.g_source == "learned":
        raise ConfigError("--dtype int8: a metric learner is not packed; leave out --live, or export it as bf16")
    check_sizes(model.config)
    require("torchao", extra="hf-int8")
    theirs = split_g(to_hf(_stored(opened) or pack(model.state_dict(), "int8"), model.config), ranks or [])
    _require_finite(theirs, opened.path)
    packed = to_packed(theirs, pack_output=pack_output)
    keys |= config_keys(model.config, pack_output=pack_output)
    return Weights(model.config, packed, keys, metadata_of(packed))


def measured_format(opened: OpenModel) -> dict[str, Any] | None:
    """What a bundle's smaller weights cost, by its certificate; None where its weights are fp32."""
    section = (opened.certificate or {}).get(SECTION) if opened.kind == "bundle" else None
    return dict(section) if section else None


def _stored(opened: OpenModel) -> dict[str, Tensor] | None:
    """An int8 bundle's own values and scales, with G; None for other sources."""
    section, config = measured_format(opened), opened.model.config
    if section is None or section["format"] != "int8":
        return None
    file = opened.path / "model.safetensors"
    if sha256_file(file) != section["sha256"]:
        raise UserError(f"{file}: has changed since the bundle was opened; export it again")
    shapes = {name: shape for name, shape in state_shapes(config).items() if name != "g_lm"}
    stored, dtypes = packed_shapes(shapes, "int8")
    return {**load_tensors(file, stored, dtypes=dtypes), "g_lm": opened.model.constant_g()}


def _in_dtype(tensors: dict[str, Tensor], dtype: Dtype, where: Path) -> dict[str, Tensor]:
    _require_finite(tensors, where)
    cast = {name: tensor.to(getattr(torch, DTYPES[dtype])) for name, tensor in tensors.items()}
    for name, tensor in cast.items():
        if not tensor.isfinite().all():
            raise UserError(f"{where}: {name} holds numbers that {dtype} cannot; export it as bf16 or fp32")
    return cast


def _require_finite(tensors: Mapping[str, Tensor], where: Path) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{where}: {name} holds NaN or infinity; training diverged: take an earlier checkpoint")
