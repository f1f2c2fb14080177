"""The extracted G_LM: the folder `g_lm/` that stage `extract` writes, and what reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pipeline.errors import UserError
from pipeline.io.sealed import publish_sealed, read_sealed
from pipeline.io.storage import publish_bytes, publish_dir, sha256_file
from pipeline.io.tensors import load_tensors, serialize
from pldr_model.config import ModelConfig
from pldr_model.model import g_shape

SCHEMA_VERSION = 2
G_FILE = "g_lm.safetensors"
SPREAD_FILE = "spread.safetensors"
RECORD_FILE = "extract.json"
HASHES = {G_FILE: "g_lm_sha256", SPREAD_FILE: "spread_sha256"}  # keys of the record


class ExtractedG(NamedTuple):
    """`g_lm` [L,H,K,K] fp32; `spread`: standard deviation of each entry over the prompts, fp32; `record`: its origin."""

    g_lm: Tensor
    spread: Tensor
    record: dict[str, Any]


def save_g(extracted: ExtractedG, out: Path) -> dict[str, Any]:
    """Write `out/{g_lm,spread}.safetensors` and `out/extract.json`; returns the record with both files' sha256."""
    with publish_dir(out) as temporary:
        publish_bytes(temporary / G_FILE, serialize({"g_lm": extracted.g_lm}))
        publish_bytes(temporary / SPREAD_FILE, serialize({"spread": extracted.spread}))
        record = {**extracted.record, **{key: sha256_file(temporary / name) for name, key in HASHES.items()}}
        publish_sealed(temporary / RECORD_FILE, record, free=HASHES.values())
    return record


def load_g(folder: Path, config: ModelConfig) -> ExtractedG:
    """What `save_g` wrote, for a model of this configuration. Raises UserError for missing, damaged or foreign files."""
    record = read_sealed(folder / RECORD_FILE, schema_version=SCHEMA_VERSION, free=HASHES.values())
    for name, key in HASHES.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; run the extract stage again")
        if sha256_file(folder / name) != record.get(key):
            raise UserError(f"{folder / name}: sha256 differs from {RECORD_FILE}: damaged; run the extract stage again")
    g_lm = load_tensors(folder / G_FILE, {"g_lm": g_shape(config)})["g_lm"]
    return ExtractedG(g_lm, load_tensors(folder / SPREAD_FILE, {"spread": g_shape(config)})["spread"], record)
