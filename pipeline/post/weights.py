"""Consolidated weights: the folder `{model.safetensors, config.json}` that every later stage reads.

Decision: a model is described by its `ModelConfig` alone; the names and shapes its file must have follow from that (a
model built on torch's meta device, which allocates nothing), so that a file of another model is refused by name before
any of it is read.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import ConfigError, UserError
from pipeline.io.storage import read_json, sha256_file
from pipeline.io.tensors import load_tensors
from pldr_model.config import ModelConfig
from pldr_model.model import PLDRModel

SCHEMA_VERSION = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def load_weights(folder: Path) -> tuple[PLDRModel, dict[str, Any]]:
    """The consolidated model in fp32 (evaluation mode, CPU), and its `source` record.

    Raises UserError for files that are missing, damaged (sha256), or do not fit each other.
    """
    record = read_json(folder / CONFIG, schema_version=SCHEMA_VERSION)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder / WEIGHTS}: no such file; run the consolidate stage again")
    if sha256_file(folder / WEIGHTS) != record.get("model_sha256"):
        raise UserError(f"{folder / WEIGHTS}: sha256 differs from {CONFIG}: damaged; run consolidate again")
    config = parse_model(record.get("model"), where=folder / CONFIG)
    tensors = load_tensors(folder / WEIGHTS, state_shapes(config))
    # The file that a transferred G came from is no longer needed: the weights hold it.
    given = tensors["g_lm"] if config.g_source == "file" else None
    model = PLDRModel(config if given is None else config.with_constant_g(), g_lm_LHKK=given)
    model.load_state_dict(tensors)
    source: dict[str, Any] = record.get("source") or {}
    return model.eval(), source


def parse_model(values: Any, *, where: Path) -> ModelConfig:
    """A `ModelConfig` from a file's plain values. Raises ConfigError naming the file and the key."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: holds no model configuration; it was damaged: make it again")
    try:
        return ModelConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from None


def state_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's state dict, without allocating it."""
    constant = config.g_source in ("random", "file")
    with torch.device("meta"):
        # A random G has the state dict of a given one, and needs none to be given.
        model = PLDRModel(replace(config, g_source="random", g_file=None) if constant else config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
