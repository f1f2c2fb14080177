"""Weights of an earlier model, with which a run begins at step 0 (`train.init_from`): for a longer context, or for other data.

Decision: unlike `--resume` it takes the weights alone: optimizer, schedule, data order and budget begin anew. They are read for
step 0 only, so the folder may go when the run has a checkpoint. G is the configuration's where the model does not learn it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.bundle.format import parse_model
from pipeline.bundle.weights import CONFIG, FREE, SCHEMA_VERSION, load_weights
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError
from pipeline.io.sealed import read_sealed

# What may be another one than the earlier model's: the shapes of no weight depend on it.
MAY_DIFFER = ("context_length", "rope_base", "rope_scaling", "dag_coefficients", "g_start", "g_file", "g_seed")


def require_fitting(config: RunConfig, *, tokenizer_sha256: str | None) -> dict[str, Any]:
    """What `train.init_from` says of where its weights come from (`source`). Reads no weights. tokenizer_sha256: None
    before the tokenizer is trained.

    Raises UserError or ConfigError, one line, where it is no folder of weights, or of another model or tokenizer.
    """
    assert config.train.init_from is not None
    folder = _folder(config.train.init_from)
    record = read_sealed(folder / CONFIG, schema_version=SCHEMA_VERSION, free=FREE)
    theirs = parse_model(record.get("model"), where=folder / CONFIG).to_dict()
    ours = config.model.to_dict()
    for key in ours | theirs:
        if key not in MAY_DIFFER and ours.get(key) != theirs.get(key):
            raise ConfigError(
                f"train.init_from {folder}: its {key} is {theirs.get(key)}, model.{key} is {ours.get(key)}; only "
                f"{', '.join(MAY_DIFFER)} may differ"
            )
    source: dict[str, Any] = record.get("source") or {}
    if tokenizer_sha256 is not None and source.get("tokenizer_sha256") not in (None, tokenizer_sha256):
        raise ConfigError(
            f"train.init_from {folder}: trained with another tokenizer; set tokenizer.model to that run's "
            "tokenizer/tokenizer.model"
        )
    return source


def initial_weights(init_from: str) -> dict[str, Tensor]:
    """The trained weights in a folder, by name. Raises UserError for what is damaged."""
    model, _ = load_weights(_folder(init_from))
    return dict(model.named_parameters())


def _folder(init_from: str) -> Path:
    """The folder of weights that a run directory has, or that is named itself."""
    path = Path(init_from)
    for folder in (path, path / "weights"):
        if (folder / CONFIG).is_file():
            return folder
    raise ConfigError(
        f"train.init_from {path}: no consolidated weights (weights/{CONFIG}) in it; name a run directory where "
        "`pldr consolidate` has run"
    )
