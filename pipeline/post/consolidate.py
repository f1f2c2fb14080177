"""ZeRO checkpoint -> one safetensors file: stage `consolidate`.

A DeepSpeed checkpoint keeps fp32 weights in pieces, in pickle files: pipeline/checkpoint/deepspeed_files.py finds and joins
them. A checkpoint is trusted only when it is COMMITTED, every listed file has its sha256, and there is no unlisted `.pt`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.bundle.format import parse_model, state_shapes
from pipeline.bundle.weights import CONFIG, SCHEMA_VERSION, save_weights
from pipeline.checkpoint.deepspeed_files import ZeroState
from pipeline.checkpoint.format import checkpoint_name, model_of, verify
from pipeline.config.keys import trained_by
from pipeline.errors import UserError
from pipeline.io.storage import (
    MANIFEST,
    read_json,
    require_free_space,
    sha256_file,
    sha256_json,
)
from pldr_model.config import ModelConfig

START = ("g_source", "g_start")  # keys of `model` that the weights' first values come from, beside sizes


def consolidate(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Merge a committed checkpoint into `out/{model.safetensors, config.json}`, fp32, with our parameter names.

    `config.json` holds the model's configuration and, under `source`, where the weights came from: checkpoint name, step,
    tokens, data fingerprint, tokenizer, MLflow run, the invariance budget spent, the step after which G was frozen (None: it
    was not), and the digest of the checkpoint's manifest. Returns `source` with `model_sha256` and `num_parameters`. Raises
    UserError for a checkpoint that is not committed, damaged, of another model, or holds NaN.
    """
    state = verify(checkpoint)
    config = parse_model(model_of(state), where=checkpoint / "state.json")
    # DeepSpeed's own files are in a folder named after the step, even if the checkpoint was renamed.
    weights = _fit(_merge(checkpoint / checkpoint_name(state["step"])), config, where=checkpoint)
    source = {
        "checkpoint": checkpoint.name,
        **recipe_of(state["config"]),
        "checkpoint_sha256": sha256_file(checkpoint / MANIFEST),
        "run_config_sha256": sha256_json(state["config"]),
        **{key: state.get(key) for key in ("step", "sequences_consumed", "tokens_consumed")},
        "invariance_budget": state.get("budget"),
        "frozen": state.get("frozen"),
        **({} if state.get("shared") is None else {"shared": state["shared"]}),
        **{key: state.get(key) for key in ("data_fingerprint", "tokenizer_sha256", "mlflow_run_id")},
    }
    require_free_space(out, 2 * sum(t.numel() * 4 for t in weights.values()), "the consolidated model")
    save_weights(weights, config, out, source=source)
    record = read_json(out / CONFIG, schema_version=SCHEMA_VERSION)
    return {
        **source,
        "model_sha256": record["model_sha256"],
        "num_parameters": config.num_parameters()["total"],
    }


def recipe_of(config: dict[str, Any]) -> dict[str, Any]:
    """`seed` and `recipe` from a run's configuration: what model card and certificate report about the training."""
    train, model = config.get("train") or {}, config.get("model") or {}
    return {
        "seed": config.get("seed"),
        "recipe": {
            key: of[key] for of, keys in ((train, trained_by("train")), (model, START)) for key in keys if key in of
        },
    }


def _merge(folder: Path) -> dict[str, Tensor]:
    """All weights and buffers of a DeepSpeed tag folder in fp32, under the names the model gave them."""
    state = ZeroState(folder)
    weights = {name: state.tensor(name) for name in state.shapes}
    weights |= {name: buffer.detach().float() for name, buffer in state.buffers.items()}
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}


def _fit(weights: dict[str, Tensor], config: ModelConfig, *, where: Path) -> dict[str, Tensor]:
    """The weights in the model's order. Raises UserError naming the first that is missing, extra, misshapen or not finite."""
    expected = state_shapes(config)
    for name, shape in expected.items():
        if name not in weights:
            raise UserError(
                f"{where}: {name} is missing; state.json describes a different model than the weights: use another checkpoint"
            )
        if tuple(weights[name].shape) != shape:
            raise UserError(
                f"{where}: {name} is {list(weights[name].shape)}, state.json describes {list(shape)}: use another checkpoint"
            )
        if not torch.isfinite(weights[name]).all():
            raise UserError(f"{where}: {name} holds NaN or infinity: training diverged; use an earlier checkpoint")
    for name in weights:
        if name not in expected and name != "g_lm":  # an identity G is a buffer that is not in the state dict
            raise UserError(f"{where}: {name} is not in the model that state.json describes: use another checkpoint")
    return {name: weights[name].contiguous() for name in expected}
