"""Parity with the reference implementation: a golden case against ours, number by number.

A case is a folder with the reference's own `config.json`, `state_dict.safetensors`, `expected.safetensors`
(logits, losses, deductive outputs, gradients), `trajectory.json` (losses of 12 AdamW steps) and
`generation.json` (greedy tokens with KV- and G-cache).

Two right implementations differ by rounding, and some of these numbers magnify rounding: gradients near the 1e-9
floor of A_LM, and a trajectory of steps along such gradients. By how much is measured, not assumed: our side runs
again with its weights perturbed by a few epsilons, and the `spread` is what that changes. A difference above its
limit is a failure, unless rounding explains it: up to `EXPLAINED` spreads it is `ill_conditioned`, and such a
number proves nothing about anything smaller. In fp32 only logits, the loss and greedy tokens are judged (`LIMITS`):
the reference's own fp32 gradients are percents off its fp64 ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pldr_model.config import ModelConfig
from pldr_model.convert import from_reference, load_checkpoint_file, to_reference
from pldr_model.decode.decoder import Decoder
from pldr_model.generation import generate
from pldr_model.loss import dag_regularizer, losses_of_logits, total_loss
from pldr_model.model import PLDRModel
from pldr_model.plga import DeductiveOutputs

_FILES = (
    "config.json",
    "state_dict.safetensors",
    "expected.safetensors",
    "trajectory.json",
    "generation.json",
)
PERTURBATION = 4.0  # epsilons, relative: 9e-16 in fp64, 5e-7 in fp32
SEEDS = 3  # perturbed runs
EXPLAINED = 5.0  # spreads. Summing a batch in another order gave up to 0.84 of one where it gave more than 1e-9
CEILING = 1e-3  # of the number's size: no spread explains a larger difference

NUMBERS = (
    "logits",
    *DeductiveOutputs._fields,
    "loss",
    "total_loss",
    "dag",
    "gradients",
    "trajectory",
    "cached_logits",
)
# Largest differences that pass whatever the spread is, by precision. In fp32 only what a user sees is judged (see above).
LIMITS: dict[torch.dtype, dict[str, float]] = {
    torch.float64: dict.fromkeys(NUMBERS, 1e-9),
    torch.float32: {"logits": 2e-5, "cached_logits": 2e-5, "loss": 1e-6},
}

Numbers = dict[str, dict[str, Tensor]]  # quantity -> key of the golden files -> tensor


def parity(case: str | Path) -> dict[str, Any]:
    """Largest absolute difference of each quantity, and what rounding alone does to it.

    Keys: `NUMBERS` (`cached_logits`: prefill + decoding through the caches against the full pass with the same G)
    and `greedy_equal`; `dag_overflowed_in_reference` (the DAG terms whose golden value is inf: ours are finite and
    left out of `dag`); `spread` (quantity -> largest difference between ours and ours perturbed) and `perturbation`
    (of the weights, relative); `ill_conditioned`, the quantities above their limit that the spread explains, `failed`,
    those that it does not, and `not_judged`, those without a limit (LIMITS, by the case's precision).
    Errors: ValueError, one line, for a folder that is not a golden case, or a damaged one.
    """
    try:
        return _compared(_read(Path(case)))
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        why = (str(error).splitlines() or [""])[0].removeprefix(f"{case}: ")
        raise ValueError(f"{case}: not a whole golden case ({type(error).__name__}: {why}); copy it again") from error


def _compared(golden: _Golden) -> dict[str, Any]:
    ours, theirs = _run(golden, golden.weights), golden.numbers()
    overflowed = [key for key in ours["dag"] if theirs[key].isinf()]
    result: dict[str, Any] = {name: _difference(ours[name], theirs, without=overflowed) for name in NUMBERS[:-1]}
    greedy = golden.generation["greedy_with_kv_and_g_cache"]
    model = golden.model(golden.weights)
    result["greedy_equal"] = generate(model, [golden.generation["prompt"]], max_new_tokens=len(greedy)) == [greedy]
    full = _logits_without_cache(golden, golden.weights)
    result["cached_logits"] = _difference(ours["cached_logits"], full)
    result["dag_overflowed_in_reference"] = [key.removeprefix("dag_") for key in overflowed]

    result["perturbation"] = PERTURBATION * torch.finfo(golden.dtype).eps
    perturbed = [_run(golden, _perturb(golden.weights, result["perturbation"], seed)) for seed in range(SEEDS)]
    result["spread"] = {
        name: max(_difference(run[name], ours[name], without=overflowed) for run in perturbed) for name in NUMBERS
    }
    above = [name for name, limit in LIMITS[golden.dtype].items() if not result[name] <= limit]
    sizes = {name: _size(ours[name]) for name in above}
    result["ill_conditioned"] = [
        name for name in above if result[name] <= min(EXPLAINED * result["spread"][name], CEILING * sizes[name])
    ]
    result["failed"] = [name for name in above if name not in result["ill_conditioned"]]
    result["not_judged"] = [name for name in NUMBERS if name not in LIMITS[golden.dtype]]
    result["failed"] += [] if result["greedy_equal"] else ["greedy_equal"]
    return result


class _Golden(NamedTuple):
    """The files of a case."""

    config: ModelConfig
    weights: dict[str, Tensor]
    expected: dict[str, Tensor]
    trajectory: dict[str, Any]
    generation: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        return self.weights["final_layer.weight"].dtype

    def numbers(self) -> dict[str, Tensor]:
        """The reference's numbers, the losses of the trajectory among them."""
        steps = self.trajectory["steps"]
        return self.expected | {
            f"step{index}.{key}": torch.tensor(step[key], dtype=torch.float64)
            for index, step in enumerate(steps)
            for key in ("loss", "total_loss")
        }

    def model(self, weights: dict[str, Tensor]) -> PLDRModel:
        """These weights, in the reference's names, in a model of their own precision."""
        model = PLDRModel(self.config).to(self.dtype)
        model.load_state_dict(from_reference(weights, self.config))
        return model


def _read(case: Path) -> _Golden:
    for name in _FILES:
        if not (case / name).is_file():
            raise ValueError(f"{name} is missing")
    golden = _Golden(
        ModelConfig.from_reference(json.loads((case / "config.json").read_text())),
        load_checkpoint_file(case / "state_dict.safetensors"),
        load_checkpoint_file(case / "expected.safetensors"),
        json.loads((case / "trajectory.json").read_text()),
        json.loads((case / "generation.json").read_text()),
    )
    if not golden.trajectory["steps"]:
        raise ValueError("trajectory.json has no steps")
    return golden


def _run(golden: _Golden, weights: dict[str, Tensor]) -> Numbers:
    """All our numbers with these weights, under the names of the golden files."""
    model, ids = golden.model(weights), golden.expected["ids"]
    logits_BSV, outputs = model(ids[:, :-1], return_outputs=True)
    tokens = losses_of_logits(logits_BSV, ids[:, 1:], pad_id=golden.config.pad_id)
    losses = total_loss(tokens, golden.config, outputs=outputs)
    torch.autograd.backward(losses.total)
    numbers: Numbers = {"logits": {"logits": logits_BSV.detach()}}
    for name in DeductiveOutputs._fields:
        numbers[name] = {f"layer{i}.{name}": getattr(layer, name).detach() for i, layer in enumerate(outputs)}
    numbers["loss"] = {"loss": losses.cross_entropy}
    numbers["total_loss"] = {"total_loss": losses.total.detach()}
    numbers["dag"] = {
        f"dag_{name}": dag_regularizer([getattr(layer, name).detach() for layer in outputs])
        for name in ("A_LM", "A_P", "G_LM")
    }
    assert all(term.isfinite() for term in numbers["dag"].values()), "a DAG term is not finite"
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    numbers["gradients"] = {f"grad.{key}": gradient for key, gradient in to_reference(gradients, golden.config).items()}
    numbers["cached_logits"] = _logits_through_caches(golden, weights)
    numbers["trajectory"] = _train(golden.model(weights), ids, golden.trajectory)
    return numbers


def _train(model: PLDRModel, ids: Tensor, trajectory: dict[str, Any]) -> dict[str, Tensor]:
    """Twelve AdamW steps on the case's batch: weight decay on everything, gradients clipped by value, linear
    warm-up from 0, cosine to a tenth. Loss and total loss before each step."""
    setting = trajectory["optimizer"]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=setting["lr"],
        betas=tuple(setting["betas"]),
        eps=setting["eps"],
        weight_decay=setting["weight_decay"],
    )
    seen = {}
    for index, golden in enumerate(trajectory["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = golden["lr"]
        tokens, outputs = model(ids[:, :-1], targets=ids[:, 1:], return_outputs=True)
        losses = total_loss(tokens, model.config, outputs=outputs)
        optimizer.zero_grad()
        torch.autograd.backward(losses.total)
        torch.nn.utils.clip_grad_value_(model.parameters(), setting["clip_value"])
        optimizer.step()
        seen[f"step{index}.loss"] = losses.cross_entropy
        seen[f"step{index}.total_loss"] = losses.total.detach()
    return seen


def _sequence(golden: _Golden) -> Tensor:
    """The golden prompt and its greedy tokens, [1,S]."""
    ids = golden.generation["prompt"] + golden.generation["greedy_with_kv_and_g_cache"]
    return torch.tensor([ids[: golden.config.context_length]])


@torch.inference_mode()
def _logits_through_caches(golden: _Golden, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits after the golden prompt and after each later token, [1,S,V]."""
    model, ids_1S, start = golden.model(weights), _sequence(golden), len(golden.generation["prompt"])
    decoder = Decoder.of(model)
    cache, logits_1V = decoder.prefill(ids_1S[0, :start], capacity=ids_1S.shape[1])
    cached = [logits_1V, *(decoder.step(ids_1, cache) for ids_1 in ids_1S[:, start:].unbind(1))]
    return {"cached_logits": torch.stack(cached, dim=1)}


@torch.inference_mode()
def _logits_without_cache(golden: _Golden, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same from one full pass with the prompt's G."""
    model, ids_1S, start = golden.model(weights), _sequence(golden), len(golden.generation["prompt"])
    g_lm = model.compute_g(ids_1S[:, :start], padded=False)
    return {"cached_logits": model(ids_1S, g_lm=g_lm, padded=False)[:, start - 1 :]}


def _perturb(weights: dict[str, Tensor], size: float, seed: int) -> dict[str, Tensor]:
    """Every weight times 1 + size * u, u uniform in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: weight * (1 + size * (2 * torch.rand(weight.shape, generator=generator, dtype=weight.dtype) - 1))
        for key, weight in weights.items()
    }


def _difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, without: Sequence[str] = ()) -> float:
    """Largest |ours - theirs|; NaN anywhere gives inf, so that it can never pass a `<=`."""
    return max((_largest(ours[key], theirs[key]) for key in ours if key not in without), default=0.0)


def _largest(ours: Tensor, theirs: Tensor) -> float:
    assert ours.numel() == theirs.numel() and (ours.ndim == 0 or ours.shape == theirs.shape), "another shape"
    largest = (ours.double().reshape(theirs.shape) - theirs.double()).abs().max().item()
    return math.inf if math.isnan(largest) else float(largest)


def _size(numbers: Mapping[str, Tensor]) -> float:
    """Largest absolute value."""
    return max(float(tensor.abs().max()) for tensor in numbers.values())
