"""Parity with the reference implementation: a golden case against ours, number by number.

A case is a folder with the reference's own `config.json`, `state_dict.safetensors`, `expected.safetensors`
(logits, losses, deductive outputs, gradients), `trajectory.json` (losses of 12 AdamW steps) and
`generation.json` (greedy tokens with KV- and G-cache). fp64 cases agree to 1e-9 in everything. In fp32 only
logits, the loss and greedy tokens are judged (`LIMITS`): gradients are ill-conditioned near the 1e-9 floor of
A_LM (the reference's own fp32 ones are percents off its fp64 ones).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pldr_model.config import ModelConfig
from pldr_model.convert import from_reference, load_checkpoint_file, to_reference
from pldr_model.generation import generate
from pldr_model.loss import dag_regularizer, total_loss
from pldr_model.model import PLDRModel
from pldr_model.plga import DeductiveOutputs

_FILES = (
    "config.json",
    "state_dict.safetensors",
    "expected.safetensors",
    "trajectory.json",
    "generation.json",
)


# Largest differences that rounding explains, by precision. In fp32 only what a user sees is judged (see above).
LIMITS: dict[torch.dtype, dict[str, float]] = {
    torch.float64: dict.fromkeys(
        ("logits", *DeductiveOutputs._fields, "loss", "total_loss", "dag", "gradients", "trajectory", "cached_logits"),
        1e-9,
    ),
    torch.float32: {"logits": 2e-5, "cached_logits": 2e-5, "loss": 1e-6},
}


def parity(case: str | Path) -> dict[str, Any]:
    """Largest absolute difference of each quantity, and `greedy_equal`.

    Keys: logits, A, A_LM, A_P, G_LM, loss, total_loss, dag, gradients, trajectory, greedy_equal; beside them
    `cached_logits` (prefill + decoding through the caches against the full pass with the same G) and
    `dag_overflowed_in_reference` (the DAG terms whose golden value is inf: ours are finite and left out of
    `dag`), and `failed`, the quantities above their limit (LIMITS, by the case's precision).
    Errors: ValueError for a folder that is not a golden case.
    """
    case = Path(case)
    for name in _FILES:
        if not (case / name).is_file():
            raise ValueError(f"{case}: {name} is missing; give the folder of a golden case")
    config = ModelConfig.from_reference(json.loads((case / "config.json").read_text()))
    weights = load_checkpoint_file(case / "state_dict.safetensors")
    expected = load_checkpoint_file(case / "expected.safetensors")
    ids = expected["ids"]
    inputs_BS, targets_BS = ids[:, :-1], ids[:, 1:]

    model = _load(config, weights)
    logits_BSV, outputs = model(inputs_BS, return_outputs=True)
    losses = total_loss(logits_BSV, targets_BS, config, outputs=outputs)
    torch.autograd.backward(losses.total)

    result: dict[str, Any] = {"logits": _difference(logits_BSV, expected["logits"])}
    for name in DeductiveOutputs._fields:
        result[name] = max(
            _difference(getattr(layer, name), expected[f"layer{i}.{name}"]) for i, layer in enumerate(outputs)
        )
    result["loss"] = _difference(losses.cross_entropy, expected["loss"])
    result["total_loss"] = _difference(losses.total, expected["total_loss"])
    result["dag"], overflowed = _dag_difference(outputs, expected)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    result["gradients"] = max(
        _difference(gradient, expected[f"grad.{key}"]) for key, gradient in to_reference(gradients, config).items()
    )
    trajectory = json.loads((case / "trajectory.json").read_text())
    result["trajectory"] = _trajectory_difference(_load(config, weights), ids, trajectory)
    generation = json.loads((case / "generation.json").read_text())
    model = _load(config, weights)
    greedy = generation["greedy_with_kv_and_g_cache"]
    ours = generate(model, [generation["prompt"]], max_new_tokens=len(greedy))
    result["greedy_equal"] = ours == [greedy]
    result["cached_logits"] = _cached_difference(model, generation["prompt"] + greedy, len(generation["prompt"]))
    result["dag_overflowed_in_reference"] = overflowed
    limits = LIMITS[weights["final_layer.weight"].dtype]
    result["failed"] = [name for name, limit in limits.items() if not result[name] <= limit]
    result["failed"] += [] if result["greedy_equal"] else ["greedy_equal"]
    return result


def _load(config: ModelConfig, weights: dict[str, Tensor]) -> PLDRModel:
    """The golden weights in a model of their own precision."""
    model = PLDRModel(config).to(weights["final_layer.weight"].dtype)
    model.load_state_dict(from_reference(weights, config))
    return model


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest |ours - theirs|; NaN anywhere gives inf, so that it can never pass a `<=`."""
    assert ours.numel() == theirs.numel() and (ours.ndim == 0 or ours.shape == theirs.shape)
    largest = (ours.detach().double().reshape(theirs.shape) - theirs.double()).abs().max().item()
    return math.inf if math.isnan(largest) else float(largest)


def _dag_difference(outputs: list[DeductiveOutputs], expected: dict[str, Tensor]) -> tuple[float, list[str]]:
    differences, overflowed = [0.0], []
    for name in ("A_LM", "A_P", "G_LM"):
        ours, theirs = dag_regularizer([getattr(layer, name) for layer in outputs]), expected[f"dag_{name}"]
        assert ours.isfinite(), f"DAG term of {name} is not finite"
        if theirs.isinf():
            overflowed.append(name)
        else:
            differences.append(_difference(ours, theirs))
    return max(differences), overflowed


def _trajectory_difference(model: PLDRModel, ids: Tensor, trajectory: dict[str, Any]) -> float:
    """Twelve AdamW steps on the case's batch: weight decay on everything, gradients clipped by value, linear
    warm-up from 0, cosine to a tenth. Loss and total loss are compared before each step."""
    setting = trajectory["optimizer"]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=setting["lr"],
        betas=tuple(setting["betas"]),
        eps=setting["eps"],
        weight_decay=setting["weight_decay"],
    )
    worst = 0.0
    for golden in trajectory["steps"]:
        for group in optimizer.param_groups:
            group["lr"] = golden["lr"]
        logits_BSV, outputs = model(ids[:, :-1], return_outputs=True)
        losses = total_loss(logits_BSV, ids[:, 1:], model.config, outputs=outputs)
        optimizer.zero_grad()
        torch.autograd.backward(losses.total)
        torch.nn.utils.clip_grad_value_(model.parameters(), setting["clip_value"])
        optimizer.step()
        pairs = ((losses.cross_entropy, "loss"), (losses.total, "total_loss"))
        worst = max(worst, *(_difference(ours, torch.tensor(golden[key], dtype=torch.float64)) for ours, key in pairs))
    return worst


@torch.inference_mode()
def _cached_difference(model: PLDRModel, ids: list[int], prompt_length: int) -> float:
    """Logits after the prompt and after each later token, through the caches, against one full pass with the
    prompt's G."""
    ids_1S = torch.tensor([ids[: model.config.context_length]])
    cache = model.new_cache(batch_size=1, capacity=ids_1S.shape[1])
    cached = [model.extend(ids_1S[:, :prompt_length], cache)]
    for position in range(prompt_length, ids_1S.shape[1]):
        cached.append(model.extend(ids_1S[:, position : position + 1], cache))
    full_1SV = model(ids_1S, g_lm=cache.g_lm, padded=False)
    return _difference(torch.stack(cached, dim=1), full_1SV[:, prompt_length - 1 :])
