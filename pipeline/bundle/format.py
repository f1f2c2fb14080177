"""What a bundle is made of: its files and the tensors in them.

    config.json                 ModelConfig of the constant-G model, weight format, ranks of keys, and whether it is certified
    model.safetensors           weights without the metric learner: fp32, bf16, int8 or int4 (formats.py)
    g_lm.safetensors            the cached G_LM [L,H,K,K]
    metric_learner.safetensors  optional: the metric learner, fp32 (metric_learner.py)
    tokenizer.model             SentencePiece
    generation_config.json      how prompts are encoded, ids
    certificate.json            docs/certificate.md
    README.md                   model card
    MANIFEST.json               sha256 and size of every file, lineage, and a digest of itself

Decisions. The same inputs give the same bytes: no time of day anywhere. `MANIFEST.json` is in canonical form and holds its
own digest, so that one changed byte anywhere is an error; this protects against damage and mix-ups, not against forgery:
it is not a signature. Loading runs no code from the folder and unpickles nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipeline.errors import ConfigError
from pipeline.io.tensors import sha256_tensors
from pipeline.tokenizer import Tokenizer
from pldr_model.config import ModelConfig
from pldr_model.model import PLDRModel

SCHEMA_VERSION = 1
MAX_SMALL = 64 << 20  # bytes allowed for a file without tensors
UNCERTIFIED_LINE = "# PLDR-LLM bundle, UNCERTIFIED: its cached G_LM may give other answers than the model"
FILES = (
    "README.md",
    "certificate.json",
    "config.json",
    "g_lm.safetensors",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.model",
)
RANKS = "key_ranks"  # in config.json: of keys, [L][H]; left out where they are full
METRIC_LEARNER = "metric_learner.safetensors"  # optional


def generation_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Prompts are encoded as training text was: no bos (documents were joined by eos alone) and no prefix."""
    return {
        "schema_version": SCHEMA_VERSION,
        "prompt_prefix_ids": [],
        "context_length": config.context_length,
        "pad_id": config.pad_id,
        "bos_id": config.bos_id,
        "eos_id": config.eos_id,
        "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
    }


def bundle_tensors(model: PLDRModel) -> dict[str, Tensor]:
    """The weights that a bundle keeps: all but the metric learner, W, b, P, a, b_a, and a constant G."""
    return {name: t for name, t in model.state_dict().items() if ".plga." not in name and name != "g_lm"}


def bundle_g(g_LHKK: Tensor) -> dict[str, Tensor]:
    """The contents of `g_lm.safetensors`."""
    return {"g_lm": g_LHKK.detach().cpu().float()}


def certified_files(model: PLDRModel, g_LHKK: Tensor) -> dict[str, str]:
    """The sha256 of the fp32 tensor files of a bundle of this model and G_LM."""
    return {
        "model.safetensors": sha256_tensors(bundle_tensors(model)),
        "g_lm.safetensors": sha256_tensors(bundle_g(g_LHKK)),
    }


def parse_model(values: Any, *, where: Path) -> ModelConfig:
    """A `ModelConfig` from the plain values in a file. Raises ConfigError naming the file and the key."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: holds no model configuration: damaged; make it again")
    try:
        return ModelConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from None


class WithoutInit(TorchFunctionMode):
    """Normal draws do nothing: on the meta device they import torch._dynamo, which takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.nn.init.normal_, torch.Tensor.normal_):
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def state_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's state dict, without allocating it."""
    constant = config.g_source in ("random", "file")
    with torch.device("meta"), WithoutInit():
        # A random G has the state dict of a given one, and needs none to be given.
        model = PLDRModel(replace(config, g_source="random", g_file=None) if constant else config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
