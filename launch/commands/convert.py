"""`pldr import` and `pldr export`: checkpoints of the reference implementation to and from our safetensors folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config.load import load_config
from pipeline.errors import ConfigError, UserError
from pipeline.io import storage
from pldr_model.config import ModelConfig, RopeStyle
from pldr_model.convert import from_reference, infer_config, load_checkpoint_file, save_checkpoint_file, to_reference

SCHEMA_VERSION = 1


def import_reference(
    source: str,
    target: str,
    *,
    model: str | None,
    context_length: int,
    rope_style: RopeStyle,
    show: Callable[[str], None],
) -> dict[str, Any]:
    """Reference checkpoint -> FOLDER/{model.safetensors, config.json}. Raises UserError naming the file, key or shape."""
    from safetensors.torch import save_file

    try:
        state = load_checkpoint_file(source)
        if model is not None:
            config = read_model_config(model)
        else:
            config = infer_config(state, context_length=context_length, rope_style=rope_style)
        weights = from_reference(state, config)
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    folder = Path(target)

    def write(temporary: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)

    storage.publish(folder / "model.safetensors", write)
    storage.publish_json(
        folder / "config.json",
        {
            "schema_version": SCHEMA_VERSION,
            "model": config.to_dict(),
            "model_sha256": storage.sha256_file(folder / "model.safetensors"),
            "source": {"imported_from": Path(source).name, "sha256": storage.sha256_file(source)},
        },
    )
    count = sum(tensor.numel() for tensor in weights.values())
    show(f"{folder}: {len(weights)} tensors, {count:,} numbers")
    return {"folder": str(folder), "tensors": len(weights), "numbers": count}


def export_reference(source: str, target: str, show: Callable[[str], None]) -> dict[str, Any]:
    """FOLDER/{model.safetensors, config.json} -> a reference checkpoint (.pth or .safetensors, by the target's name)."""
    from safetensors.torch import load_file

    folder = Path(source)
    record = storage.read_json(folder / "config.json", schema_version=SCHEMA_VERSION)
    if Path(target).suffix not in (".pth", ".safetensors"):
        raise ConfigError(f"{target}: name a .pth or a .safetensors file")
    if storage.sha256_file(folder / "model.safetensors") != record.get("model_sha256"):
        raise UserError(f"{folder / 'model.safetensors'}: sha256 differs from config.json: damaged")
    try:
        weights = to_reference(load_file(folder / "model.safetensors"), ModelConfig.from_dict(record["model"]))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{folder}: {error}") from error
    suffix = Path(target).suffix

    def write(temporary: Path) -> None:
        named = temporary.with_name(temporary.name + suffix)  # the ending chooses the format
        save_checkpoint_file(weights, named)
        named.replace(temporary)

    storage.publish(target, write)
    show(f"{target}: {len(weights)} tensors")
    return {"checkpoint": target, "tensors": len(weights)}


def read_model_config(path: str) -> ModelConfig:
    """A model's sizes from a run's YAML, our `config.json`, the reference's or the transformers port's JSON."""
    if Path(path).suffix in (".yaml", ".yml"):
        return load_config(path).model
    values = storage.read_json(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no model configuration")
    try:
        if "num_hidden_layers" in values:
            return ModelConfig.from_transformers(values)
        if "max_seq_len" in values:
            return ModelConfig.from_reference(values)
        return ModelConfig.from_dict(values.get("model", values))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {json.dumps(str(error))[1:-1]}") from error
