"""Consolidated weights: the folder `{model.safetensors, config.json}` that stage `consolidate` writes and later stages read.

Decision: a model is described by its `ModelConfig` alone. The names and shapes that its file must have follow from that (by
a model on torch's meta device, which allocates nothing), so that a file of another model is refused before it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.bundle.format import parse_model, state_shapes
from pipeline.errors import UserError
from pipeline.io.sealed import publish_sealed, read_sealed
from pipeline.io.storage import publish_bytes, publish_dir, sha256_file
from pipeline.io.tensors import load_tensors, serialize
from pldr_model.config import ModelConfig
from pldr_model.model import PLDRModel

SCHEMA_VERSION = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FREE = ("model_sha256",)  # compared with the weights themselves


def save_weights(weights: Mapping[str, Tensor], config: ModelConfig, out: Path, *, source: dict[str, Any]) -> None:
    """Write `out/{model.safetensors, config.json}`: a state dict in fp32, and where it comes from."""
    with publish_dir(out) as temporary:
        note = json.dumps({"schema_version": SCHEMA_VERSION, "model": config.to_dict()}, sort_keys=True)
        publish_bytes(temporary / WEIGHTS, serialize(weights, note=note))
        publish_sealed(
            temporary / CONFIG,
            {
                "schema_version": SCHEMA_VERSION,
                "model": config.to_dict(),
                "model_sha256": sha256_file(temporary / WEIGHTS),
                "source": source,
            },
            free=FREE,
        )


def load_weights(folder: Path) -> tuple[PLDRModel, dict[str, Any]]:
    """The consolidated model in fp32 (evaluation mode, CPU), and its `source` record.

    Raises UserError for files that are missing, damaged (sha256), or do not match each other.
    """
    record = read_sealed(folder / CONFIG, schema_version=SCHEMA_VERSION, free=FREE)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder / WEIGHTS}: no such file; run the consolidate stage again")
    if sha256_file(folder / WEIGHTS) != record.get("model_sha256"):
        raise UserError(f"{folder / WEIGHTS}: sha256 differs from {CONFIG}: damaged; run the consolidate stage again")
    config = parse_model(record.get("model"), where=folder / CONFIG)
    tensors = load_tensors(folder / WEIGHTS, state_shapes(config))
    # The file that a transferred G came from is no longer needed: the weights include it.
    given = tensors["g_lm"] if config.g_source == "file" else None
    model = PLDRModel(config if given is None else config.with_constant_g(), g_lm_LHKK=given)
    model.load_state_dict(tensors)
    source: dict[str, Any] = record.get("source") or {}
    return model.eval(), source
