"""What `pldr import hf` reads: our exports, what `save_pretrained` makes of them, and the published port's checkpoints.

Weights come from safetensors, in one file or several with an index, never from a pickle, and no code of the directory runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pipeline.errors import UserError
from pipeline.inference.hf.load import read_export, read_weights
from pipeline.inference.hf.manifest import MAX_SMALL
from pipeline.inference.hf.shards import Found, find_tensors, read_tensors, weight_files
from pipeline.inference.hf.sizes import model_config
from pipeline.io.storage import MANIFEST, read_json, sha256_file, sha256_json
from pldr_model.config import ModelConfig
from pldr_model.convert import from_reference


class Imported(NamedTuple):
    """weights: our state dict in fp32 at least, with `g_lm` [L,H,K,K] for a constant G. source: for the folder's record."""

    config: ModelConfig
    weights: dict[str, Tensor]
    source: dict[str, Any]


def read_directory(folder: str | Path) -> Imported:
    """The model in a directory. Raises UserError, one line, for a directory that is damaged, or of another kind."""
    path = Path(folder)
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file; name a directory that `pldr export hf` or `save_pretrained` wrote")
    if file.stat().st_size > MAX_SMALL:
        raise UserError(f"{file}: {file.stat().st_size} bytes, too large: damaged; download or export it again")
    values = read_json(file)
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind == "pldr" and "num_hidden_layers" not in values:
        raise UserError(f"{path}: a bundle; `pldr export hf` reads it as it is")
    if kind not in ("pldr", "pldrllm"):
        raise UserError(
            f"{file}: model_type {kind!r} is neither 'pldr' (our exports) nor 'pldrllm' (the published port)"
        )
    if kind == "pldrllm":
        return _read_port(path, values)
    if (path / MANIFEST).is_file():
        parts = read_export(path)
        return Imported(parts.config, parts.weights, _source(path, parts.manifest["bundle_sha256"]))
    config = model_config(values, where=file)
    return Imported(config, read_weights(path, config), _source(path, _sha256_weights(find_tensors(path))))


def _read_port(path: Path, values: dict[str, Any]) -> Imported:
    file = path / "config.json"
    try:
        config = ModelConfig.from_transformers(values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: {error}") from None
    if config.g_source not in ("learned", "identity"):
        raise UserError(
            f"{file}: custom_G_type {values['custom_G_type']!r}: its G_LM is not among the published weights"
        )
    found = find_tensors(path)
    try:
        weights = from_reference(read_tensors(found), config)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return Imported(config, weights, _source(path, _sha256_weights(found)))


def _source(path: Path, sha256: str) -> dict[str, Any]:
    return {"imported_from": path.resolve().name, "sha256": sha256}


def _sha256_weights(found: dict[str, Found]) -> str:
    """That of the only file, or of the hashes of all."""
    hashes = [sha256_file(file) for file in weight_files(found)]
    return hashes[0] if len(hashes) == 1 else sha256_json(hashes)
