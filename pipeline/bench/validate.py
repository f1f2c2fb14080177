"""Where a validation's time goes, and how long one would take: `pldr bench validate [CONFIG]`.

On a model of the configuration's sizes with random weights (its G_LM does not depend on the input, as after training) and
random tokens. Every part of `validate` is run with few prompts, all parts in turn, again and again, so that a busy machine
slows all alike. The cost of a part is taken to be linear in its prompts: fixed + each * prompts, by least squares.

Decision: prompts are cut to a quarter of the context, which takes minutes where full ones take an hour, and the cost of each is
multiplied by what a pass over the full context costs beside one over the quarter, measured in the same rounds.

Decision (the error): how much a measurement scatters is taken to be a share of it, the same for all parts, and estimated from
the residuals of all of them together, because few repetitions of one part say nothing. The error of a part is the standard
error of a prediction from its fit with that scatter, and that of the sum has the error of the ratio of the passes too. It says
how far noise may have moved the estimate, not whether costs are linear or the machine will be as busy.

CPU seconds are given beside seconds: on a shared machine they depend less on what else runs, with OMP_NUM_THREADS=1 least.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from pipeline.config.post import PostConfig
from pipeline.post import validate
from pipeline.post.every_input.proof import prove
from pipeline.post.every_input.search import search_worst_rows
from pipeline.post.measure.closely import CloseLook
from pipeline.post.measure.downstream import CAUSAL_PROMPTS, LEAK_PROMPTS, Outputs
from pipeline.post.measure.effects import compare_losses, effects_by_layer
from pipeline.post.measure.generation import greedy_agreement
from pipeline.post.measure.observe import observe
from pipeline.post.measure.parts import costs, part
from pipeline.post.measure.prompts import PromptKind, few_of, make_kinds
from pldr_model.config import ModelConfig
from pldr_model.metric_learner import ResidualUnit
from pldr_model.model import PLDRModel
from pldr_model.plga import PLGA

PAPER_110M = ModelConfig(vocab_size=32000, num_layers=5, num_heads=14, head_dim=64, context_length=1024, d_ff=2389)
CLOCKS = ("seconds", "cpu_seconds")
CUT = 4  # of the context in a measured prompt
FEWER = {
    "leak": LEAK_PROMPTS,
    "causality": CAUSAL_PROMPTS,
}  # parts for which a validation takes no more prompts of a kind


class Work(NamedTuple):
    """A piece of a validation. `run` does it with so many prompts; a validation gives it `prompts`.

    layers: None, or it is done for one layer with so many heads instead of prompts, and a validation does it for all of these.
    """

    name: str
    run: Callable[[int], None]
    prompts: int
    layers: int | None = None


class Line(NamedTuple):
    """The cost of a part: fixed + each * prompts."""

    fixed: float
    each: float


def bench(config: ModelConfig, post: PostConfig, *, prompts: int = 1, rounds: int = 2) -> dict[str, Any]:
    """Time every part with `prompts` and with twice as many, `rounds` times each, all parts in turn.

    Returns `parts`: part -> `prompts` (the number that a validation gives it; of search and proof: heads of a layer), and for
    `seconds` and `cpu_seconds` each `fixed`, `each` (of a prompt of full context), `total` (at that number), `error` (standard
    error of the total); `seconds` and `cpu_seconds`: `total` and `error` of all parts; `scatter`: standard deviation of a
    measurement as a share of it, and `full_pass`: cost of a pass over the full context beside one over `tokens`, both by clock;
    `measured`: how often a part was run, and `measured_prompts` over all of these; `tokens`: of a measured prompt;
    `parameters`, `threads`, `device`.
    """
    model = _model(config)
    tokens = max(2, config.context_length // CUT)
    pieces = _pieces(model, post, tokens, (prompts, 2 * prompts))
    counts = np.array([prompts, 2 * prompts] * rounds)
    measured: list[dict[str, tuple[float, float]]] = []
    of_part: dict[str, int] = {}
    for count in counts.tolist():
        measured.append({})
        for work in pieces:
            with costs() as counted:
                work.run(count)
            for name, wall in counted.wall.items():
                label = f"{name}, {work.name}" if len(counted.wall) > 1 or name != work.name else name
                measured[-1][label] = (wall, counted.cpu[name])
                of_part[label] = min(FEWER.get(name, work.prompts), work.prompts)
    layers = {work.name: work.layers for work in pieces if work.layers is not None}
    passes = [(found.pop("full pass"), found.pop("cut pass")) for found in measured]
    del of_part["full pass"], of_part["cut pass"]
    result: dict[str, Any] = {
        "parts": {name: {"prompts": of_part[name]} for name in of_part},
        "scatter": {},
        "full_pass": {},
    }
    for index, clock in enumerate(CLOCKS):
        seconds = {name: np.array([found.get(name, (0.0, 0.0))[index] for found in measured]) for name in of_part}
        lines = {name: _line(counts, values) for name, values in seconds.items()}
        scatter = _scatter(counts, seconds, lines)
        ratio = statistics.median(full[index] / cut[index] for full, cut in passes)
        for name, line in lines.items():
            times = layers.get(name, 1)
            scale = times if name in layers else ratio
            fixed, each = times * line.fixed, scale * line.each
            error = scale * _error(counts, seconds[name], scatter, of_part[name])
            total = fixed + each * of_part[name]
            result["parts"][name][clock] = {"fixed": fixed, "each": each, "total": total, "error": error}
        found = [entry[clock] for entry in result["parts"].values()]
        of_prompts = sum(entry["total"] - entry["fixed"] for entry in found)
        errors = [entry["error"] for entry in found] + [of_prompts * scatter * math.sqrt(2 / len(passes))]
        result[clock] = {"total": sum(entry["total"] for entry in found), "error": math.hypot(*errors)}
        result["scatter"][clock], result["full_pass"][clock] = scatter, ratio
    return {
        **result,
        "measured": len(counts),
        "measured_prompts": int(counts.sum()),
        "tokens": tokens,
        "parameters": config.num_parameters()["total"],
        "threads": torch.get_num_threads(),
        "device": str(model.embedding.weight.device),
    }


def table(result: dict[str, Any]) -> list[str]:
    """What `bench` returned, for a terminal: the most expensive part first."""
    rows = sorted(result["parts"].items(), key=lambda item: -item[1]["cpu_seconds"]["total"])
    lines = [f"{'part':<26} {'prompts':>8} {'fixed':>9} {'each':>9} {'CPU s':>9} {'+-':>7} {'seconds':>9} {'+-':>7}"]
    for name, found in [*rows, ("all", {"prompts": "", **{clock: result[clock] for clock in CLOCKS}})]:
        cpu, wall = found["cpu_seconds"], found["seconds"]
        first = [f"{cpu[key]:9.3f}" if key in cpu else " " * 9 for key in ("fixed", "each")]
        last = f"{cpu['total']:9.1f} {cpu['error']:7.1f} {wall['total']:9.1f} {wall['error']:7.1f}"
        lines.append(f"{name:<26} {found['prompts']:>8} {' '.join(first)} {last}")
    return lines


def _model(config: ModelConfig) -> PLDRModel:
    """Random weights; the last norm of each metric learner has no gain, so that G_LM is constant."""
    torch.manual_seed(0)
    model = PLDRModel(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, PLGA):
                norm = cast(ResidualUnit, module.metric_learner[-1]).norm
                norm.weight.zero_()
                norm.bias.normal_()
    return model.cuda() if torch.cuda.is_available() else model


def _pieces(model: PLDRModel, post: PostConfig, tokens: int, counts: Sequence[int]) -> list[Work]:
    """Everything that a validation measures, with prompts of `tokens`, `counts` of them. Kinds equally many are one piece."""
    config = model.config
    shape = (post.prompts, config.context_length + 1)
    full_NT = torch.randint(min(4, config.vocab_size - 1), config.vocab_size, shape)
    numbers = {kind.name: len(kind.ids_NS) for kind in make_kinds(full_NT, config, seed=0)}
    text_NT = full_NT[:, : tokens + 1]
    kinds = make_kinds(text_NT, config, seed=0)
    device = model.embedding.weight.device
    g_LHKK = model.compute_g(text_NT[:1, :-1].to(device))[:, 0].detach()
    groups: dict[int, list[PromptKind]] = {}
    for kind in kinds:  # text of other lengths is named by them
        groups.setdefault(numbers.get(kind.name, post.prompts), []).append(kind)

    @torch.inference_mode()
    def live(name: str, ids_1S: Tensor) -> None:
        with part(name):
            model(ids_1S.to(device), padded=False)

    def observed(group: list[PromptKind], count: int) -> None:
        with part("observation"):
            observe(model, few_of(group, count), [Outputs(model, g_LHKK, text_NT, seed=0)])

    def effects(count: int) -> None:
        few_NT = text_NT[:count]
        with part("effects"):
            losses = compare_losses(model, g_LHKK, few_NT, random_LHKK=g_LHKK)["losses"]
            effects_by_layer(model, g_LHKK, few_NT, losses, min_effect=post.min_attention_effect)

    def generation(count: int) -> None:
        with part("generation"):
            greedy_agreement(model, g_LHKK, text_NT, num_tokens=post.generate_tokens, num_prompts=count, seed=0)

    def fp64(count: int) -> None:
        with part("fp64", whole=True):
            measures: dict[str, Any] = {"not_finite": [], "deviations": {}}
            validate.measure_fp64(measures, model, g_LHKK, text_NT[:count], few_of(kinds, count), post, seed=0)

    def control(count: int) -> None:
        with part("control", whole=True):
            validate.untrained_control(model, text_NT[:count], few_of(kinds, count), post, seed=0)

    def search(heads: int) -> None:
        small, g_1HKK, close = layers[heads]
        with part("search"):
            search_worst_rows(small, g_1HKK, close.seen(), seed=0)

    def proof(heads: int) -> None:
        with part("proof"):
            prove(*layers[heads][:2])

    works = [
        Work("full pass", lambda n: live("full pass", full_NT[:1, :-1]), 1),
        Work("cut pass", lambda n: live("cut pass", text_NT[:1, :-1]), 1),
    ]
    for number, group in groups.items():
        name = group[0].name if group[0].name in ("text", "random") else "other kinds"
        works.append(Work(name, partial(observed, group), number))
    works += [
        Work("effects", effects, min(post.effect_prompts, post.prompts)),
        Work("generation", generation, min(post.generate_prompts, post.prompts)),
        Work("fp64", fp64, min(post.fp64_prompts, post.prompts)),
    ]
    if config.g_source == "learned":
        layers = {heads: _one_layer(config, post, text_NT[:1], heads) for heads in counts}
        works.append(Work("control", control, min(validate.CONTROL_PROMPTS, post.prompts)))
        works.append(Work("search", search, config.num_heads, config.num_layers))
        if post.prove:
            works.append(Work("proof", proof, config.num_heads, config.num_layers))
    return works


def _one_layer(
    config: ModelConfig, post: PostConfig, text_1T: Tensor, heads: int
) -> tuple[PLDRModel, Tensor, CloseLook]:
    """A model of one layer with so many heads, its G_LM, and what a search starts from."""
    model = _model(replace(config, num_layers=1, num_heads=heads))
    kinds = [PromptKind("text", text_1T[:, :-1])]
    g_1HKK = model.compute_g(kinds[0].ids_NS.to(model.embedding.weight.device))[:, 0].detach()
    measures: dict[str, Any] = {"not_finite": [], "deviations": {}}
    close = validate.measure_fp64(measures, model, g_1HKK, text_1T, kinds, post, seed=0)
    assert close is not None, "it learns its G"
    return model, g_1HKK, close


def _line(counts: np.ndarray, seconds: np.ndarray) -> Line:
    """Least squares."""
    each, fixed = np.polyfit(counts, seconds, 1)
    return Line(float(fixed), float(each))


def _scatter(counts: np.ndarray, seconds: dict[str, np.ndarray], lines: dict[str, Line]) -> float:
    """Standard deviation of a measurement over its size: the residuals of all parts together, two parameters a part."""
    shares = [
        (seconds[name] - (line.fixed + line.each * counts)) / seconds[name].mean()
        for name, line in lines.items()
        if seconds[name].all()  # not what is too short to have been seen each time
    ]
    free = len(shares) * (len(counts) - 2)
    return math.sqrt(sum(float((share**2).sum()) for share in shares) / free) if free > 0 else math.nan


def _error(counts: np.ndarray, seconds: np.ndarray, scatter: float, count: float) -> float:
    """Standard error of the fitted line at `count` prompts, for measurements that scatter by this share."""
    spread = float(((counts - counts.mean()) ** 2).sum())
    return float(scatter * seconds.mean() * math.sqrt(1 / len(counts) + (count - counts.mean()) ** 2 / spread))
