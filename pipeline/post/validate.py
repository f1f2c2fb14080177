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
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.bundle.certificate.checks import make_checks
from pipeline.bundle.certificate.consistency import largest
from pipeline.config.post import PostConfig
from pipeline.post.certificate.build import make_certificate
from pipeline.post.measure import downstream
from pipeline.post.measure.coverage import Piece, check_finite, coverage
from pipeline.post.measure.generation import greedy_agreement, order_parameters
from pipeline.post.measure.observe import TENSORS, Observation, observe
from pipeline.post.measure.prompts import (
    EXTRA,
    PromptKind,
    few_of,
    held_out_text,
    make_kinds,
    num_distinct,
    sha256_kinds,
)
from pipeline.post.measure.statistics import effective_rank, numerical_rank, relative_deviation
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
    documents: int | None = None,
    extra: Mapping[str, Tensor] | None = None,
    piece: Piece | None = None,
) -> dict[str, Any]:
    """The certificate of `model` with the cached G_LM `g_LHKK`: a plain dict, ready for JSON (docs/certificate.md).

    sequences_NT: held-out token sequences [N, S+1]; the first `config.prompts` without padding are used. lineage: what
    the certificate records about the origin of the weights. budget: the run's invariance budget, for the fixes. seed: that of
    the training, from which the untrained control is initialized. documents: from how many they are samples.
    extra: more kinds of prompts by name, [N, <= context] (prompts.py, `joined`). piece: the text of an id, to name it.
    Collective where torch.distributed has several ranks: each measures its share, and all return the same. Raises UserError for
    fewer than two different usable prompts, prompts that do not fit the model, or thresholds that no configuration may have.
    """
    assert tuple(g_LHKK.shape) == g_shape(model.config), "G_LM of another model"
    model.eval()
    text_NT, num_padded = held_out_text(sequences_NT, model.config, limit=config.prompts)
    kinds = make_kinds(text_NT, model.config, seed=seed, extra=extra)
    learned = model.config.g_source == "learned"

    random = next(kind for kind in kinds if kind.name == "random")
    given = [kind for kind in kinds if kind.name.startswith(EXTRA)]
    bad_logits = [bad for kind in (random, *given) for bad in check_finite(model, kind, piece)]
    measures = _measure(model, g_LHKK, text_NT, kinds, seed=seed, bad_logits=bad_logits)
    measures["coverage"] = coverage(model, random)
    _measure_fp64(measures, model, g_LHKK, text_NT, kinds, config, seed=seed)
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
            "documents": documents,
            "left_out_padded": num_padded,
            "seed": seed,
        },
        lineage={**(lineage or {}), "invariance_budget": budget},
    )


def _measure(
    model: PLDRModel,
    g_LHKK: Tensor | None,
    text_NT: Tensor,
    kinds: list[PromptKind],
    *,
    seed: int,
    bad_logits: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything measured by passes over the prompts in the model's own precision, without generation.

    g_LHKK None: use the mean over the text prompts themselves. bad_logits: what is known to be not finite (coverage.py).
    """
    seen = observe(model, kinds)
    not_finite = [*bad_logits, *seen.not_finite]
    not_finite += [f"weight {name}" for name, p in model.named_parameters() if not p.isfinite().all()]
    if g_LHKK is not None:
        not_finite += [f"cached G_LM, layer {i}, head {h}" for i, h in _not_finite_heads(g_LHKK)]
    deviations = _deviations(seen, g_LHKK)
    measures: dict[str, Any] = {
        "not_finite": not_finite,
        "relative_deviation_g": deviations["G_LM"]["max"] if "G_LM" in deviations else None,
        "deviations": {"fp32": deviations},
        **_shape_measures(seen, model.config.head_dim),
        "cached_rank": None if g_LHKK is None or not_finite else _rank_of(g_LHKK),
        **{"losses": {}, "prefix": {}, "agreement": {}, "leak": {}, "greedy": {}, "order_parameter": {}, "fp64": {}},
    }
    if not not_finite:
        by_kind = seen.spreads["G_LM"]
        given = {"cached": by_kind["text"].mean_LHKK if g_LHKK is None else g_LHKK}
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
    """Add the measures of the same weights in fp64, over the first prompts of every kind; the larger deviation is judged."""
    double = copy.deepcopy(model).double()
    deviations = _deviations(observe(double, few_of(kinds, config.fp64_prompts)), g_LHKK, drift=True)
    measures["deviations"]["fp64"] = deviations
    found = [d["G_LM"]["max"] if "G_LM" in d else None for d in measures["deviations"].values()]
    measures["relative_deviation_g"] = largest(found)
    if not measures["not_finite"]:
        text_NT = text_NT[: config.fp64_prompts]
        measures["fp64"] = {
            **downstream.compare_losses(double, {"cached": g_LHKK.double()}, text_NT),
            "leak": downstream.leak_test(double, g_LHKK.double(), text_NT, seed=seed),
        }


def _deviations(seen: Observation, g_LHKK: Tensor | None, *, drift: bool = False) -> dict[str, Any]:
    """Relative deviation over inputs of each tensor: `max` over kinds, layers and heads, where it is, and all of it.

    G_LM is compared with the G to be cached (None: its own mean over the prompts), the other tensors with their mean over
    all prompts. The scale is the head's RMS over all prompts. `drift`: the observation is in another precision than the
    cached G, so compare G_LM with its own mean, which leaves out the difference between the precisions.
    """
    out: dict[str, Any] = {}
    for tensor in TENSORS:
        pooled = seen.pooled(tensor)
        if pooled is None:
            continue
        given = g_LHKK is not None and tensor == "G_LM" and not drift
        reference = g_LHKK.detach().cpu().double() if given and g_LHKK is not None else pooled.mean_LHKK
        scale_LH = pooled.rms()
        by_kind = {
            kind: relative_deviation(spread, reference, scale_LH=scale_LH)
            for kind, spread in seen.spreads[tensor].items()
            if spread.count
        }
        per_head_LH = torch.stack(list(by_kind.values())).amax(dim=0)
        kind, where = max(by_kind.items(), key=lambda item: float(item[1].max()))
        layer, head = divmod(int(where.argmax()), where.shape[1])
        out[tensor] = {
            "max": float(per_head_LH.max()),
            "worst": {"kind": kind, "layer": layer, "head": head},
            "by_kind": {kind: float(value.max()) for kind, value in by_kind.items()},
            "per_head": per_head_LH.tolist(),
            "max_abs_delta": float(pooled.max_from(reference).max()),
            "max_abs_delta_per_head": pooled.max_from(reference).tolist(),
            "rms": scale_LH.tolist(),
        }
    return out


def _untrained_control(
    model: PLDRModel, text_NT: Tensor, kinds: list[PromptKind], config: PostConfig, *, seed: int
) -> dict[str, Any]:
    """The same measures on the model before training, initialized again from its seed. It must fail."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = PLDRModel(model.config).eval()
    weight = model.embedding.weight
    fresh.to(device=weight.device, dtype=weight.dtype)
    measures = _measure(fresh, None, text_NT[:CONTROL_PROMPTS], few_of(kinds, CONTROL_PROMPTS), seed=seed)
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
