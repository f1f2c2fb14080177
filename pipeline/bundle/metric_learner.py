"""The optional file `metric_learner.safetensors` of a bundle: what the model had in place of its cached G_LM.

With it a bundle holds the live model again: G_LM of any prompt can be deduced and compared with the cached one, in the same
process. The weights of the rest are those of `model.safetensors`, so only a bundle of fp32 weights may have it.

What binds it. The manifest has its sha256, like that of every file. A certificate names the hashes of weights and G_LM, and
none of the metric learner's; so a reader of a certified bundle deduces G_LM of one token, and refuses a file by which it is not
the certified one. An uncertified bundle's G_LM may be any: there the manifest alone binds it.

Shapes: L layers, H heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.bundle.format import WithoutInit, parse_model, state_shapes
from pipeline.config.post import PostConfig
from pipeline.errors import UserError
from pipeline.io.tensors import load_tensors
from pldr_model.config import ModelConfig
from pldr_model.model import PLDRModel

WITHOUT_FP32 = (
    "the live model has the certified weights, which are fp32, and these are {}; "
    "use post.weight_format=fp32, or leave out the metric learner"
)


def metric_learner_tensors(model: PLDRModel) -> dict[str, Tensor]:
    """The metric learner, W, b, P, a, b_a of every layer. Raises UserError for a model that deduces no G_LM."""
    if model.config.g_source != "learned":
        raise UserError(
            f"with_metric_learner: this model has none (its g_source is {model.config.g_source}), G_LM is constant by "
            "construction; bundle it without"
        )
    return {name: tensor for name, tensor in model.state_dict().items() if _is_learner(name)}


def read_metric_learner(
    path: Path, certificate: Mapping[str, Any], weights: Mapping[str, Tensor], g_LHKK: Tensor, *, certified: bool
) -> dict[str, Tensor]:
    """The file's tensors, checked to be of the certificate's model. weights: fp32. Raises UserError, one line."""
    config = model_of(certificate, where=path.parent / "certificate.json")
    if config.g_source != "learned":
        raise UserError(f"{path}: its certificate is of a model without a metric learner; make the bundle again")
    learner = load_tensors(path, {name: shape for name, shape in state_shapes(config).items() if _is_learner(name)})
    if certified:
        token_11 = torch.tensor([[config.eos_id]])
        found = relative_deviation(assemble(config, weights, learner).compute_g(token_11, padded=False)[:, 0], g_LHKK)
        allowed = certified_deviation(certificate)
        if not float(found.max()) <= allowed:
            raise UserError(
                f"{path}: G_LM by it is another one than the certified (it deviates by {float(found.max()):.2g}, allowed "
                f"{allowed:g}): it belongs to another model; make the bundle again"
            )
    return learner


def model_of(certificate: Mapping[str, Any], *, where: Path) -> ModelConfig:
    """The certified model's configuration, with its metric learner."""
    return parse_model({k: v for k, v in certificate["model"].items() if k != "num_parameters"}, where=where)


def assemble(config: ModelConfig, weights: Mapping[str, Tensor], learner: Mapping[str, Tensor]) -> PLDRModel:
    """The live model of these tensors, which it shares and does not copy."""
    with torch.device("meta"), WithoutInit():
        model = PLDRModel(config)
    model.load_state_dict({**weights, **learner}, assign=True)
    return model.eval().requires_grad_(False)


def relative_deviation(g_LHKK: Tensor, reference_LHKK: Tensor) -> Tensor:
    """[L,H]: RMS of the difference over the head's RMS in the reference, the certificate's measure, worked out in fp64.
    NaN or infinite where G is."""
    wide, reference = g_LHKK.double(), reference_LHKK.double()
    return (wide - reference).square().mean(dim=(-2, -1)).sqrt() / reference.square().mean(dim=(-2, -1)).sqrt()


def certified_deviation(certificate: Mapping[str, Any]) -> float:
    """The largest relative deviation of G_LM, in fp32, from the cached one that the certificate allows; of one from before
    schema 5, what is allowed today."""
    key = "max_relative_deviation_g_fp32"
    return float(certificate["thresholds"].get(key, PostConfig.model_fields[key].default))


def _is_learner(name: str) -> bool:
    return ".plga." in name
