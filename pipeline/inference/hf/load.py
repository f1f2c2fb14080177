"""An export back as our model, and any opened model as a transformers model in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.bundle.certificate.schema import read_certificate
from pipeline.bundle.format import parse_model
from pipeline.errors import UserError
from pipeline.inference.hf.low_rank import join_g, joined_shapes
from pipeline.inference.hf.manifest import read_manifest, why_uncertified
from pipeline.inference.hf.names import check_shapes, from_hf, to_hf
from pipeline.inference.hf.packed import from_packed, holds_integers, is_packed, unpacked_shapes
from pipeline.inference.hf.plugin import require_tested
from pipeline.inference.hf.shards import Found, find_tensors, read_tensors
from pipeline.inference.hf.sizes import hf_config, model_config
from pipeline.inference.hf.tokenizer import fast_tokenizer
from pipeline.inference.opened import OpenModel
from pipeline.io.storage import MANIFEST, read_json
from pipeline.tokenizer import Tokenizer
from pldr_model.config import ModelConfig
from pldr_model.model import PLDRModel


class ExportParts(NamedTuple):
    """A verified export. weights: our state dict in fp32, with `g_lm` [L,H,K,K] unless the export is live."""

    config: ModelConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    certificate: dict[str, Any] | None
    manifest: dict[str, Any]


def read_export(folder: str | Path) -> ExportParts:
    """Verify what `export_hf` wrote, and read it. Raises UserError, one line, for a damaged or foreign directory."""
    path = Path(folder)
    manifest = read_manifest(path)
    config = model_config(read_json(path / "config.json"), where=path / "config.json")
    recorded = parse_model(manifest["model"], where=path / MANIFEST)
    if _differ(config, recorded):
        raise UserError(f"{path / 'config.json'}: another model than MANIFEST.json's; export the model again")
    weights = read_weights(path, recorded)
    certificate = path / "certificate.json"
    return ExportParts(
        recorded,
        weights,
        Tokenizer.load(path / "tokenizer.model"),
        read_certificate(certificate) if certificate.is_file() else None,
        manifest,
    )


def _differ(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two configurations are of different mathematics, whatever they record beside it."""
    keys = ("vocab_size", "num_layers", "num_heads", "head_dim", "context_length", "feed_forward_size", "rope_base",
            "rope_style", "rope_scaling", "layer_norm_eps", "g_source", "pad_id", "eos_id")  # fmt: skip
    return any(getattr(one, key) != getattr(other, key) for key in keys)


def read_weights(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict in fp32. Sizes, names and shapes are compared before anything is allocated."""
    found = find_tensors(folder)
    check_size(found, config, folder)
    packed, shapes = is_packed(found), {name: each.shape for name, each in found.items()}
    try:
        if packed:
            filled = read_json(folder / "config.json")["intermediate_size"]  # as `model_config` checked it
            shapes = unpacked_shapes(shapes, config, filled)
        check_shapes(joined_shapes(shapes), config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if not packed:
        return from_hf(join_g(read_tensors(found)), config)
    tensors = from_packed(read_tensors(found, may_be_int8=holds_integers), config, torch.float32)
    return from_hf(join_g(tensors), config)


def check_size(found: Mapping[str, Found], config: ModelConfig, folder: Path) -> None:
    """Before the shapes of a huge model are computed. Raises UserError for weights that are too few."""
    numbers = sum(math.prod(each.shape) for each in found.values())
    if numbers < config.num_parameters()["total"]:
        raise UserError(
            f"{folder / 'config.json'}: describes a larger model than the weights are; export the model again"
        )


def build(opened: OpenModel, *, dtype: str = "fp32", live: bool = False) -> tuple[Any, Any]:
    """`(PldrForCausalLM, PreTrainedTokenizerFast)` of an opened model, in memory, without writing anything."""
    source = opened.live if live else opened.model
    if source is None:
        raise UserError(f"{opened.path}: has no metric learner, so its G_LM cannot be live; name a run's YAML")
    model = build_model(source, uncertified=why_uncertified(opened, dtype=dtype, live=live), dtype=dtype)
    return model, fast_tokenizer(opened.tokenizer, context_length=source.config.context_length)


def build_model(source: PLDRModel, *, uncertified: str | None = None, dtype: str = "fp32") -> Any:
    """`PldrForCausalLM` with a model's weights, in evaluation mode."""
    require_tested()
    from pipeline.inference.hf.modeling_pldr import PldrForCausalLM

    config = hf_config(source.config, uncertified=uncertified, dtype=dtype)
    with torch.device("meta"):
        model: Any = PldrForCausalLM(config)  # type: ignore[no-untyped-call]
    state = to_hf(source.state_dict(), source.config)
    model.load_state_dict({name: tensor.to(config.dtype) for name, tensor in state.items()}, assign=True)
    return model.eval()
