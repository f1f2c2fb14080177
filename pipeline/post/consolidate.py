"""ZeRO checkpoint -> one safetensors file: stage `consolidate`.

Background: a DeepSpeed checkpoint keeps fp32 weights in pieces: in `*_optim_states.pt` of every rank (ZeRO 1-3), in the
model file itself (stage 0, fp32), or in the model file's optimizer entry (stage 0, bf16). DeepSpeed's own
`get_fp32_state_dict_from_zero_checkpoint` merges ZeRO 1-3, but it asks torch for `weights_only=False`, that is, for
pickles that may run code.

Decision: its merging is used and its unpickling is not. `TORCH_FORCE_WEIGHTS_ONLY_LOAD` (torch's own switch, which
outranks the argument) is set around the call, with the three harmless DeepSpeed classes that checkpoints hold allowed by
name. A checkpoint is believed only when it is COMMITTED, every listed file has its sha256, and no unlisted `.pt` lies
between them.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoints import checkpoint_name, safe_unpickling, verify
from pipeline.errors import UserError, first_line
from pipeline.post.tensors import serialise
from pipeline.post.weights import CONFIG, SCHEMA_VERSION, WEIGHTS, parse_model, state_shapes
from pipeline.storage import (
    MANIFEST,
    publish_bytes,
    publish_dir,
    publish_json,
    read_json,
    require_free_space,
    sha256_file,
    sha256_json,
)
from pldr_model.config import ModelConfig
from pldr_model.model import is_metric_parameter


def consolidate(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Merge a committed checkpoint into `out/{model.safetensors, config.json}`, fp32, with our parameter names.

    `config.json` holds the model's configuration and, under `source`, where the weights came from: checkpoint name, step,
    tokens, data fingerprint, tokenizer, MLflow run, and the digest of the checkpoint's manifest. Returns `source` with
    `model_sha256` and `num_parameters`. Raises UserError for a checkpoint that is not committed, damaged, of another
    model, or holds NaN.
    """
    state = verify(checkpoint)
    config = parse_model(state["config"].get("model"), where=checkpoint / "state.json")
    weights = _fit(_merge(_tag_folder(checkpoint, state)), config, where=checkpoint)
    source = {
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": sha256_file(checkpoint / MANIFEST),
        "run_config_sha256": sha256_json(state["config"]),
        **{key: state.get(key) for key in ("step", "sequences_consumed", "tokens_consumed")},
        **{key: state.get(key) for key in ("data_fingerprint", "tokenizer_sha256", "mlflow_run_id")},
    }
    require_free_space(out, 2 * sum(t.numel() * 4 for t in weights.values()), "the consolidated model")
    with publish_dir(out) as temporary:
        note = json.dumps({"schema_version": SCHEMA_VERSION, "model": config.to_dict()}, sort_keys=True)
        publish_bytes(temporary / WEIGHTS, serialise(weights, note=note))
        publish_json(
            temporary / CONFIG,
            {
                "schema_version": SCHEMA_VERSION,
                "model": config.to_dict(),
                "model_sha256": sha256_file(temporary / WEIGHTS),
                "source": source,
            },
        )
    record = read_json(out / CONFIG, schema_version=SCHEMA_VERSION)
    return {
        **source,
        "model_sha256": record["model_sha256"],
        "num_parameters": config.num_parameters()["total"],
    }


def _tag_folder(checkpoint: Path, state: dict[str, Any]) -> Path:
    """DeepSpeed's own files lie in a folder named for the step, whatever the checkpoint has been renamed to."""
    folder = checkpoint / checkpoint_name(state["step"])
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; this checkpoint has no weights: name another one")
    return folder


def _merge(folder: Path) -> dict[str, Tensor]:
    """All weights and buffers of a DeepSpeed tag folder in fp32, under the names the model gave them."""
    try:
        with safe_unpickling():
            if any(folder.glob("*_optim_states.pt")):
                weights = _merge_zero(folder)
            else:
                weights = _read_stage_0(folder / "mp_rank_00_model_states.pt")
    except UserError:
        raise
    except (pickle.UnpicklingError, OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
        kind = "they hold more than tensors" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise UserError(
            f"{folder}: DeepSpeed's files cannot be merged: {kind}; nothing of them was executed: name another checkpoint"
        ) from error
    return {name.replace("_orig_mod.", ""): tensor.detach().float() for name, tensor in weights.items()}


def _merge_zero(folder: Path) -> dict[str, Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # prints, tqdm
        merged: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    return merged


def _read_stage_0(path: Path) -> dict[str, Tensor]:
    """Stage 0: the module as it is (fp32), or with the fp32 masters that its bf16 optimizer keeps.

    The masters lie in the optimizer's order, nameless: the group of all other parameters, then the metric learner's.
    Each must round to the bf16 weight it is taken for, so that a wrong order can never pass.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; this checkpoint has no weights: name another one")
    content = torch.load(path, map_location="cpu", weights_only=True)
    module: dict[str, Tensor] = dict(content["module"])
    if all(t.dtype == torch.float32 for t in module.values() if t.is_floating_point()):
        return module
    names = [name for name in module if name not in set(content["buffer_names"])]
    names.sort(key=is_metric_parameter)  # stable: within a group the module's order
    masters = [master for group in content["optimizer"].get("fp32_groups", []) for master in group]
    rounded = [m.detach().to(module[n].dtype).view(module[n].shape) for n, m in zip(names, masters, strict=True)]
    if not all(torch.equal(module[name], weight) for name, weight in zip(names, rounded, strict=True)):
        raise UserError(
            f"{path}: the fp32 weights of ZeRO stage 0 in bf16 are in no known order; use train.zero_stage=1"
        )
    return {**module, **dict(zip(names, masters, strict=True))}


def _fit(weights: dict[str, Tensor], config: ModelConfig, *, where: Path) -> dict[str, Tensor]:
    """The weights in the model's order. Raises UserError naming the first that is missing, extra, misshapen or not finite."""
    expected = state_shapes(config)
    for name, shape in expected.items():
        if name not in weights:
            raise UserError(f"{where}: {name} is missing; state.json describes another model than the weights")
        if tuple(weights[name].shape) != shape:
            raise UserError(f"{where}: {name} is {list(weights[name].shape)}, state.json describes {list(shape)}")
        if not torch.isfinite(weights[name]).all():
            raise UserError(f"{where}: {name} holds NaN or infinity; training diverged: take an earlier checkpoint")
    for name in weights:
        if name not in expected and name != "g_lm":  # an identity G is a buffer that no state dict needs
            raise UserError(f"{where}: {name} is no part of the model that state.json describes")
    return {name: weights[name].contiguous() for name in expected}
