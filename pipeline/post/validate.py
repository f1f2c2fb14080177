"""The validator: is G_LM of this model a constant, and may it be cached? Stage `validate`.

Background: docs/certificate.md says what is measured, why, and what fools a validator. In short: every deductive tensor per
layer and head over prompts of several kinds and lengths; the answers with caches against full recomputation without any;
proof that attention is alive; the leak; and the same measure on the untrained model, which must fail.

Decision: the verdict on G_LM is by the worst head on the worst kind of prompts, measured against the very G_LM that will
be cached, in fp32 (as shipped) and, for models of up to 50M parameters, in fp64 too (which tells real variation from
round-off); both must pass. `validate` is a pure function: the same model, G, sequences and configuration on the same
machine give the same certificate, byte for byte. Nothing is read or written.

Shapes: N prompts, T = S+1 tokens, L layers, H heads, K head dim.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from pipeline.config import PostConfig
from pipeline.post import downstream
from pipeline.post.certificate import make_certificate
from pipeline.post.checks import make_checks
from pipeline.post.measures import effective_rank, numerical_rank, relative_deviation
from pipeline.post.observe import TENSORS, Observation, observe
from pipeline.post.prompts import PromptKind, few_of, held_out_text, make_kinds, sha256_kinds
from pldr_model.model import PLDRModel, g_shape

FP64_LIMIT = 50_000_000  # parameters; above it the second pass in fp64 costs minutes on a CPU
CONTROL_PROMPTS = 4  # of every kind


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
    the certificate shall say about where the weights come from. budget: the run's invariance budget, for the mends.
    Raises UserError for fewer than two usable prompts, or prompts that do not fit the model.
    """
    assert tuple(g_LHKK.shape) == g_shape(model.config), "G_LM of another model"
    model.eval()
    text_NT, num_padded = held_out_text(sequences_NT, model.config, limit=config.prompts)
    kinds = make_kinds(text_NT, model.config, seed=seed)
    learned = model.config.g_source == "learned"

    seen = observe(model, kinds)
    not_finite = list(seen.not_finite)
    not_finite += [f"cached G_LM, layer {i}, head {h}" for i, h in _not_finite_heads(g_LHKK)]
    not_finite += [f"weight {name}" for name, p in model.named_parameters() if not p.isfinite().all()]
    deviations = {"fp32": deviations_of(seen, g_LHKK)}
    if model.config.num_parameters()["total"] <= FP64_LIMIT:
        deviations["fp64"] = deviations_of(observe(copy.deepcopy(model).double(), kinds), g_LHKK, drift=True)
    measures: dict[str, Any] = {
        "not_finite": not_finite,
        "relative_deviation_g": _worst([d["G_LM"]["max"] if "G_LM" in d else None for d in deviations.values()]),
        "deviations": deviations,
        **_shape_measures(seen, g_LHKK),
        **{"losses": {}, "agreement": {}, "leak": {}, "greedy": {}, "order_parameter": {}},
    }
    if not not_finite:
        measures.update(downstream.compare_losses(model, g_LHKK, text_NT))
        measures["leak"] = downstream.leak_test(model, g_LHKK, text_NT)
        num_tokens = config.generate_tokens
        measures["greedy"] = downstream.greedy_agreement(model, g_LHKK, text_NT, num_tokens=num_tokens)
        if learned:
            measures["order_parameter"] = downstream.order_parameters(model, text_NT, num_tokens=num_tokens, seed=seed)
    controls = {"untrained": untrained_control(model, kinds, seed=seed) if learned else {}}
    return make_certificate(
        model,
        g_LHKK,
        config,
        measures=measures,
        controls=controls,
        checks=make_checks(measures, controls, config, variant=model.config.g_source, budget=budget),
        prompts={
            "sha256": sha256_kinds([*kinds, PromptKind("targets", text_NT)]),
            "kinds": {kind.name: list(kind.ids_NS.shape) for kind in kinds},
            "left_out_padded": num_padded,
            "seed": seed,
        },
        lineage={**(lineage or {}), "invariance_budget": budget},
    )


def deviations_of(seen: Observation, g_LHKK: Tensor | None, *, drift: bool = False) -> dict[str, Any]:
    """Relative deviation over inputs of each tensor: `max` over kinds, layers and heads, where it is, and all of it.

    G_LM is held against the G to be cached (None: its own mean over the prompts), the other tensors against their mean
    over all prompts. The scale is the head's RMS over all prompts. `drift`: the observation is in another precision than
    the cached G, so hold G_LM against its own mean and leave the difference of the two precisions out.
    """
    out: dict[str, Any] = {}
    for tensor in TENSORS:
        pooled = seen.pooled(tensor)
        if pooled is None:
            continue
        given = g_LHKK is not None and tensor == "G_LM" and not drift
        reference = g_LHKK.to(pooled.mean_LHKK) if given and g_LHKK is not None else pooled.mean_LHKK
        scale_LH = pooled.rms()
        by_kind = {
            kind: relative_deviation(spread, reference, scale_LH=scale_LH)
            for kind, spread in seen.spreads[tensor].items()
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
            "rms": scale_LH.tolist(),
        }
    return out


def untrained_control(model: PLDRModel, kinds: list[PromptKind], *, seed: int) -> dict[str, Any]:
    """The same measure on the same model as it is before training: drawn anew from its configuration. It must fail."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = PLDRModel(model.config).eval()
    weight = model.embedding.weight
    fresh.to(device=weight.device, dtype=weight.dtype)
    seen = observe(fresh, few_of(kinds, CONTROL_PROMPTS))
    deviations = deviations_of(seen, None)
    return {
        "relative_deviation_g": deviations["G_LM"]["max"] if "G_LM" in deviations else None,
        "row_variance_ratio": _list_or_none(seen.row_variance.mean()),
        "prompts_of_each_kind": CONTROL_PROMPTS,
        "seed": seed,
    }


def _shape_measures(seen: Observation, g_LHKK: Tensor) -> dict[str, Any]:
    """What the tensors look like: certifies nothing by itself, explains a lot."""
    finite = bool(g_LHKK.isfinite().all())
    g = g_LHKK.detach().cpu()
    return {
        "row_variance_ratio_A": {
            "mean": _list_or_none(seen.row_variance.mean()),
            "max": _list_or_none(seen.row_variance.high()),
        },
        "log_abs_det_G_LM": {
            "mean": _list_or_none(seen.log_abs_det.mean()),
            "std": _list_or_none(seen.log_abs_det.std()),
            "prompts_exactly_singular": seen.log_abs_det.not_finite,
        },
        "rank_G_LM": {
            "numerical": numerical_rank(g).tolist() if finite else None,
            "effective": effective_rank(g).tolist() if finite else None,
            "of": g.shape[-1],
        },
    }


def _not_finite_heads(g_LHKK: Tensor) -> list[tuple[int, int]]:
    bad_LH = ~g_LHKK.isfinite().all(dim=-1).all(dim=-1)
    return [(int(i), int(h)) for i, h in bad_LH.nonzero().tolist()]


def _worst(values: list[float | None]) -> float | None:
    """The largest; None when any could not be measured."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    return max(known) if len(known) == len(values) else None


def _list_or_none(x: Tensor | None) -> list[Any] | None:
    return None if x is None else list(x.tolist())
