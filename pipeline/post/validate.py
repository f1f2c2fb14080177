"""The validator: is G_LM of this model a constant, and may it be cached? Stage `validate`.

Background: docs/certificate.md says what is measured, why, and what fools a validator. In short: every deductive tensor per
layer and head over prompts of several kinds and lengths; G_LM over the worst input that a search finds, and a proof for all;
the answers with caches against full recomputation without any; proof that attention is alive; the leak test; and the same
measure on the untrained model, which must fail.

Decision: the verdict on G_LM is by the worst head on the worst prompt, in the model's own precision against the G_LM that will
be cached, and in fp64 against the mean of fp64 (which tells real variation from round-off); both must pass, and so must the
worst rows that a search over every input finds. A proof that closes gives a better tier. `validate` is a pure function: the
same model, G, sequences and configuration on the same machine give the same certificate, byte for byte. It reads and writes no
files. All statistics are streamed: memory does not grow with the number of prompts.

Shapes: N prompts, T = S+1 tokens, L layers, H heads, K head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.bundle.certificate.checks import make_checks
from pipeline.config.post import PostConfig
from pipeline.post.certificate.build import make_certificate
from pipeline.post.every_input.magnitude import may_overflow
from pipeline.post.every_input.proof import prove
from pipeline.post.every_input.search import search_worst_rows
from pipeline.post.measure.closely import CloseLook
from pipeline.post.measure.coverage import FiniteLogits, Piece, coverage
from pipeline.post.measure.deviation import PromptDeviations, deviations, means, off_mean
from pipeline.post.measure.downstream import Outputs
from pipeline.post.measure.effects import compare_losses, effects_by_layer, estimated
from pipeline.post.measure.generation import greedy_agreement, order_parameters
from pipeline.post.measure.observe import Observation, observe
from pipeline.post.measure.parts import part
from pipeline.post.measure.prompts import PromptKind, few_of, held_out_text, make_kinds, num_distinct, sha256_kinds
from pipeline.post.measure.statistics import numerical_rank
from pldr_model.decode.low_rank import effective_rank
from pldr_model.model import PLDRModel, g_shape

CONTROL_PROMPTS = 4  # of every kind
ENERGY_LEFT_OUT = 1e-6  # by the effective rank: the share of sum(singular value^2)
FEW_PROMPTS = 2  # of outputs in fp64, and of losses with another G there and in the control: they are only shown


def validate(
    model: PLDRModel,
    g_LHKK: Tensor,
    sequences_NT: Tensor,
    config: PostConfig,
    *,
    lineage: dict[str, Any] | None = None,
    budget: float | None = None,
    seed: int = 0,
    documents: int | None = None,
    extra: Mapping[str, Tensor] | None = None,
    piece: Piece | None = None,
) -> dict[str, Any]:
    """The certificate of `model` with the cached G_LM `g_LHKK`: a plain dict, ready for JSON (docs/certificate.md).

    sequences_NT: held-out token sequences [N, S+1]; the first `config.prompts` without padding are used. lineage: what
    the certificate records about the origin of the weights. budget: the run's invariance budget, for the fixes. seed: that of
    the training, from which the untrained control is initialized. documents: how many the sequences come from.
    extra: more kinds of prompts by name, [N, <= context] (measure/prompts.py, `joined`). piece: the text of an id, to name it.
    Collective where torch.distributed has several ranks: each measures its share, and all return the same. Raises UserError for
    fewer than two different usable prompts, prompts that do not fit the model, or thresholds that no configuration may have.
    """
    assert tuple(g_LHKK.shape) == g_shape(model.config), "G_LM of another model"
    model.eval()
    text_NT, num_padded = held_out_text(sequences_NT, model.config, limit=config.prompts)
    kinds = make_kinds(text_NT, model.config, seed=seed, extra=extra)
    learned = model.config.g_source == "learned"

    found = _prompt_deviations(g_LHKK, kinds, config)
    measures = _measure(model, g_LHKK, text_NT, kinds, found, config, seed=seed, piece=piece)
    measures["coverage"] = coverage(model, next(kind for kind in kinds if kind.name == "random"))
    with part("fp64", whole=True):
        chosen = [found.worst_and_first(kind, config.fp64_prompts) for kind in kinds]
        few = [kind._replace(ids_NS=kind.ids_NS[these]) for kind, these in zip(kinds, chosen, strict=True)]
        close = measure_fp64(measures, model, g_LHKK, text_NT[chosen[0]], few, config, seed=seed)
    if close is not None:
        with part("search"):
            searched = search_worst_rows(model, g_LHKK, close.seen(), seed=seed)
            measures["worst_row"] = searched.record
            measures["query_deviation"] = close.query_deviation(searched)
        if config.prove:
            with part("proof"):
                measures["proof"] = prove(model, g_LHKK)
    if not measures["not_finite"]:
        with part("effects"):
            few_NT, least = text_NT[: config.effect_prompts], config.min_attention_effect
            measures["effects"] = effects_by_layer(model, g_LHKK, few_NT, measures["losses"], min_effect=least)
        num = {"num_tokens": config.generate_tokens, "num_prompts": config.generate_prompts}
        with part("generation"):
            measures["greedy"] = greedy_agreement(model, g_LHKK, text_NT, **num, seed=seed)
        if learned and config.order_parameter:
            with part("order parameter"):
                measures["order_parameter"] = order_parameters(model, text_NT, **num, seed=seed)
    controls: dict[str, Any] = {"random_tokens": _random_tokens_control(measures)}
    if learned:
        with part("control", whole=True):
            controls["untrained"] = untrained_control(model, text_NT, kinds, config, seed=seed)
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
            "documents": None if documents is None else min(documents, len(text_NT)),
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
    config: PostConfig,
    *,
    seed: int,
    piece: Piece | None = None,
) -> dict[str, Any]:
    """Everything measured by passes over the prompts in the model's own precision, without generation. `found` is filled."""
    watched, finite = Outputs(model, g_LHKK, text_NT, seed=seed), FiniteLogits(model, piece)
    with part("observation"):
        seen = observe(model, kinds, [finite, found, watched])
    found.merge_ranks()
    outputs = watched.merge_ranks()
    bad_ids, bad_prompts = finite.merge_ranks()
    not_finite = [*bad_ids, *seen.not_finite]
    not_finite += [f"weight {name}" for name, p in model.named_parameters() if not p.isfinite().all()]
    not_finite += [f"cached G_LM, layer {i}, head {h}" for i, h in _not_finite_heads(g_LHKK)]
    not_finite = not_finite or bad_prompts or may_overflow(model, g_LHKK)
    by_tensor = deviations(seen, found)
    measures: dict[str, Any] = {
        "not_finite": not_finite,
        "relative_deviation_g": None,
        "relative_deviation_g_fp32": by_tensor.get("G_LM", {}).get("max"),
        "cached_g_deviation": off_mean(seen, g_LHKK),
        "deviations": {"fp32": by_tensor},
        **_shape_measures(seen, model.config.head_dim),
        "cached_rank": None if not_finite else _rank_of(g_LHKK),
        **{"losses": {}, "prefix": {}, "effects": {}, "agreement": {}, "leak": {}, "greedy": {}},
        **{"order_parameter": {}, "fp64": {}, "query_deviation": {}, "worst_row": {}, "proof": {}},
    }
    if not not_finite:
        few_NT, random_LHKK = text_NT[: config.effect_prompts], seen.spreads["G_LM"]["random"].mean_LHKK
        with part("effects"):
            few = compare_losses(model, g_LHKK, few_NT, random_LHKK=random_LHKK)
        measures["losses"] = estimated(outputs["losses"], few["losses"])
        measures["prefix"] = few["prefix"]
        measures["agreement"] = outputs["agreement"] | few["agreement"]
        measures["leak"] = outputs["leak"]
    return measures


def measure_fp64(
    measures: dict[str, Any],
    model: PLDRModel,
    g_LHKK: Tensor,
    text_NT: Tensor,
    kinds: list[PromptKind],
    config: PostConfig,
    *,
    seed: int,
) -> CloseLook | None:
    """Add the measures of the same weights in fp64 over these prompts, of which the first kind is that of `text_NT`. Returns
    the queries and rows that the search for the worst rows needs; None where G_LM is not deduced, or something was not finite.

    What the prompts move is measured from their own mean in fp64: the distance between the precisions is not variation.
    """
    double = copy.deepcopy(model).double()
    references = means(double, kinds[0])
    found = _prompt_deviations(references["G_LM"], kinds, config)
    outputs = Outputs(double, g_LHKK, text_NT, seed=seed, first=FEW_PROMPTS)
    close = None
    if model.config.g_source == "learned" and not measures["not_finite"]:
        close = CloseLook(double, references, kinds)
        with close.queries():
            seen = observe(double, kinds, [close, found, outputs])
        close.merge_ranks()
    else:
        seen = observe(double, kinds, [found, outputs])
    found.merge_ranks()
    of_outputs = outputs.merge_ranks()
    measures["deviations"]["fp64"] = deviations(seen, found)
    measures["relative_deviation_g"] = measures["deviations"]["fp64"].get("G_LM", {}).get("max")
    if not measures["not_finite"]:
        few = compare_losses(double, g_LHKK, text_NT[:FEW_PROMPTS])
        measures["fp64"] = {
            **of_outputs,
            "losses": estimated(of_outputs["losses"], few["losses"]),
            "prefix": few["prefix"],
        }
    return close


def _prompt_deviations(reference_LHKK: Tensor, kinds: list[PromptKind], config: PostConfig) -> PromptDeviations:
    return PromptDeviations(reference_LHKK, kinds, keep=config.fp64_prompts, above=config.max_relative_deviation_g)


def untrained_control(
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
    few = config.model_copy(update={"effect_prompts": FEW_PROMPTS})
    measures = _measure(fresh, g_LHKK, text_NT, kinds, _prompt_deviations(g_LHKK, kinds, config), few, seed=seed)
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
    effective = effective_rank(g, left_out=ENERGY_LEFT_OUT)
    return {"numerical": numerical_rank(g).tolist(), "effective": effective.tolist(), "of": g.shape[-1]}


def _not_finite_heads(g_LHKK: Tensor) -> list[tuple[int, int]]:
    bad_LH = ~g_LHKK.isfinite().all(dim=-1).all(dim=-1)
    return [(int(i), int(h)) for i, h in bad_LH.nonzero().tolist()]
