"""The validator: is G_LM of this model a constant, and may it be cached? Stage `validate`.

Background: docs/certificate.md says what is measured, why, and what fools a validator. In short: every deductive tensor per
layer and head over prompts of several kinds and lengths; the answers with caches against full recomputation without any;
proof that attention is alive; the leak test; and the same measure on the untrained model, which must fail.

Decision: the verdict on G_LM is by the worst head on the worst kind of prompts, measured against the same G_LM that will
be cached, in fp32 (as shipped) and in fp64 (which tells real variation from round-off); both must pass. `validate` is a
pure function: the same model, G, sequences and configuration on the same machine give the same certificate, byte for byte.
It reads and writes no files. All statistics are streamed: memory does not grow with the number of prompts.

Shapes: N prompts, T = S+1 tokens, L layers, H heads, K head dim.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from pipeline.bundle.certificate.checks import make_checks
from pipeline.config.post import PostConfig
from pipeline.post.certificate.build import make_certificate
from pipeline.post.every_input.search import search_worst_rows
from pipeline.post.measure import downstream
from pipeline.post.measure.closely import CloseLook
from pipeline.post.measure.deviation import PromptDeviations, deviations, means
from pipeline.post.measure.generation import greedy_agreement, order_parameters
from pipeline.post.measure.observe import Observation, observe
from pipeline.post.measure.prompts import PromptKind, few_of, held_out_text, make_kinds, num_distinct, sha256_kinds
from pipeline.post.measure.statistics import effective_rank, numerical_rank
from pldr_model.model import PLDRModel, g_shape

CONTROL_PROMPTS = 8  # of every kind


def validate(
    model: PLDRModel,
    g_LHKK: Tensor,
    sequences_NT: Tensor,
    config: PostConfig,
    *,
    lineage: dict[str, Any] | None = None,
    budget: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The certificate of `model` with the cached G_LM `g_LHKK`: a plain dict, ready for JSON (docs/certificate.md).

    sequences_NT: held-out token sequences [N, S+1]; the first `config.prompts` without padding are used. lineage: what
    the certificate records about the origin of the weights. budget: the run's invariance budget, for the fixes. seed: that of
    the training, from which the untrained control is initialized. Collective where torch.distributed has several ranks:
    each measures its share, and all return the same. Raises UserError for fewer than two different usable prompts, prompts that
    do not fit the model, or thresholds that no configuration may have.
    """
    assert tuple(g_LHKK.shape) == g_shape(model.config), "G_LM of another model"
    model.eval()
    text_NT, num_padded = held_out_text(sequences_NT, model.config, limit=config.prompts)
    kinds = make_kinds(text_NT, model.config, seed=seed)
    learned = model.config.g_source == "learned"

    found = _prompt_deviations(g_LHKK, kinds, config)
    measures = _measure(model, g_LHKK, text_NT, kinds, found, seed=seed)
    chosen = [found.worst_and_first(kind, config.fp64_prompts) for kind in kinds]
    few = [kind._replace(ids_NS=kind.ids_NS[these]) for kind, these in zip(kinds, chosen, strict=True)]
    _measure_fp64(measures, model, g_LHKK, text_NT[chosen[0]], few, config, seed=seed)
    if not measures["not_finite"]:
        num = {"num_tokens": config.generate_tokens, "num_prompts": config.generate_prompts}
        measures["greedy"] = greedy_agreement(model, g_LHKK, text_NT, **num)
        if learned:
            measures["order_parameter"] = order_parameters(model, text_NT, **num, seed=seed)
    controls: dict[str, Any] = {"random_tokens": _random_tokens_control(measures)}
    if learned:
        controls["untrained"] = _untrained_control(model, text_NT, kinds, config, seed=seed)
    return make_certificate(
        model,
        g_LHKK,
        config,
        measures=measures,
        controls=controls,
        prompts={
            "sha256": sha256_kinds([*kinds, PromptKind("targets", text_NT)]),
            "kinds": {kind.name: list(kind.ids_NS.shape) for kind in kinds},
            "distinct": num_distinct(text_NT),
            "documents": None,
            "deviating": found.by_kind["text"].num_above,
            "left_out_padded": num_padded,
            "seed": seed,
        },
        lineage={**(lineage or {}), "invariance_budget": budget},
    )


def _measure(
    model: PLDRModel,
    g_LHKK: Tensor,
    text_NT: Tensor,
    kinds: list[PromptKind],
    found: PromptDeviations,
    *,
    seed: int,
) -> dict[str, Any]:
    """Everything measured by passes over the prompts in the model's own precision, without generation. `found` is filled."""
    seen = observe(model, kinds, [found])
    found.merge_ranks()
    not_finite = list(seen.not_finite)
    not_finite += [f"weight {name}" for name, p in model.named_parameters() if not p.isfinite().all()]
    not_finite += [f"cached G_LM, layer {i}, head {h}" for i, h in _not_finite_heads(g_LHKK)]
    by_tensor = deviations(seen, found)
    measures: dict[str, Any] = {
        "not_finite": not_finite,
        "relative_deviation_g": None,
        "relative_deviation_g_fp32": by_tensor.get("G_LM", {}).get("max"),
        "deviations": {"fp32": by_tensor},
        **_shape_measures(seen, model.config.head_dim),
        "cached_rank": None if not_finite else _rank_of(g_LHKK),
        **{"losses": {}, "prefix": {}, "agreement": {}, "leak": {}, "greedy": {}, "order_parameter": {}, "fp64": {}},
        **{"query_deviation": {}, "worst_row": {}},
    }
    if not not_finite:
        by_kind = seen.spreads["G_LM"]
        given = {"cached": g_LHKK}
        given |= {"mean": by_kind["text"].mean_LHKK, "random_tokens": by_kind["random"].mean_LHKK}
        measures.update(downstream.compare_losses(model, given, text_NT))
        measures["leak"] = downstream.leak_test(model, given["cached"], text_NT, seed=seed)
    return measures


def _measure_fp64(
    measures: dict[str, Any],
    model: PLDRModel,
    g_LHKK: Tensor,
    text_NT: Tensor,
    kinds: list[PromptKind],
    config: PostConfig,
    *,
    seed: int,
) -> None:
    """Add the measures of the same weights in fp64 over these prompts; G_LM's deviation there is judged, and the worst rows.

    What the prompts move is measured from their own mean in fp64: the distance between the precisions is not variation. The
    search is against the cached G.
    """
    double = copy.deepcopy(model).double()
    references = means(double, kinds[0])
    found = _prompt_deviations(references["G_LM"], kinds, config)
    if model.config.g_source == "learned" and not measures["not_finite"]:
        close = CloseLook(double, references, kinds)
        with close.queries():
            seen = observe(double, kinds, [close, found])
        close.merge_ranks()
        searched = search_worst_rows(double, g_LHKK, close.seen(), seed=seed)
        measures["worst_row"] = searched.record
        measures["query_deviation"] = close.query_deviation(searched)
    else:
        seen = observe(double, kinds, [found])
    found.merge_ranks()
    measures["deviations"]["fp64"] = deviations(seen, found)
    measures["relative_deviation_g"] = measures["deviations"]["fp64"].get("G_LM", {}).get("max")
    if not measures["not_finite"]:
        measures["fp64"] = {
            **downstream.compare_losses(double, {"cached": g_LHKK.double()}, text_NT),
            "leak": downstream.leak_test(double, g_LHKK.double(), text_NT, seed=seed),
        }


def _prompt_deviations(reference_LHKK: Tensor, kinds: list[PromptKind], config: PostConfig) -> PromptDeviations:
    return PromptDeviations(reference_LHKK, kinds, keep=config.fp64_prompts, above=config.max_relative_deviation_g)


def _untrained_control(
    model: PLDRModel, text_NT: Tensor, kinds: list[PromptKind], config: PostConfig, *, seed: int
) -> dict[str, Any]:
    """The same measures on the model before training, initialized again from its seed. It must fail."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = PLDRModel(model.config).eval()
    weight = model.embedding.weight
    fresh.to(device=weight.device, dtype=weight.dtype)
    text_NT, kinds = text_NT[:CONTROL_PROMPTS], few_of(kinds, CONTROL_PROMPTS)
    g_LHKK = means(fresh, kinds[0])["G_LM"]
    measures = _measure(fresh, g_LHKK, text_NT, kinds, _prompt_deviations(g_LHKK, kinds, config), seed=seed)
    measures["relative_deviation_g"] = measures["relative_deviation_g_fp32"]
    checks = make_checks(
        measures, {}, config, variant=model.config.g_source, num_prompts=config.min_prompts, budget=None
    )
    return {
        "seed": seed,
        "prompts_of_each_kind": CONTROL_PROMPTS,
        "failed": [check.measure for check in checks if not check.passed and check.value is not None],
        **{name: measures[name] for name in ("relative_deviation_g", "row_variance_ratio_A", "losses", "leak")},
        "deviations": measures["deviations"]["fp32"],
        "agreement": measures["agreement"].get("cached", {}),
    }


def _random_tokens_control(measures: dict[str, Any]) -> dict[str, Any]:
    """The same model with G_LM from random tokens: where G_LM is constant, this is as good as one from text."""
    losses = measures["losses"]
    if not losses:
        return {}
    return {
        "loss": losses["random_tokens"],
        "gap": losses["random_tokens"] - losses["block"],
        "agreement": measures["agreement"]["random_tokens"],
    }


def _shape_measures(seen: Observation, head_dim: int) -> dict[str, Any]:
    """Determinants, ranks and row variance of the tensors: recorded as explanation, not judged."""
    return {
        "row_variance_ratio_A": seen.row_variance.as_dict() if "A" in seen.spreads else None,
        "log_abs_det": {
            name: {**scalars.as_dict(), "singular": scalars.not_finite_LH.tolist()}
            for name, scalars in seen.log_abs_det.items()
        },
        "rank": {name: {**scalars.as_dict(), "of": head_dim} for name, scalars in seen.rank.items()},
    }


def _rank_of(g_LHKK: Tensor) -> dict[str, Any]:
    g = g_LHKK.detach().cpu()
    return {"numerical": numerical_rank(g).tolist(), "effective": effective_rank(g).tolist(), "of": g.shape[-1]}


def _not_finite_heads(g_LHKK: Tensor) -> list[tuple[int, int]]:
    bad_LH = ~g_LHKK.isfinite().all(dim=-1).all(dim=-1)
    return [(int(i), int(h)) for i, h in bad_LH.nonzero().tolist()]
