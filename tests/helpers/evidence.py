"""A certificate by hand: the evidence on an invariant model of two layers and two heads, without a model.

For tests of what is made of measures: checks, verdict, statement, page. That they are measured so is tested elsewhere.
"""

from __future__ import annotations

import copy
from typing import Any

from pipeline.bundle.certificate.verdict import TODAY, judged, plain
from pipeline.config.post import PostConfig
from pldr_model.config import ModelConfig

MODEL = ModelConfig(vocab_size=48, num_layers=2, num_heads=2, head_dim=8, context_length=128, A_dff=8)
KINDS = {
    **{"text": [128, 128], "text_64": [128, 64], "text_32": [128, 32], "text_16": [128, 16], "text_4": [128, 4]},
    **{"text_1": [128, 1], "random": [1, 48], "repeated": [32, 128], "padded": [32, 128], "lengths": [32, 117]},
}
DEVIATION = 2e-8  # of G_LM in fp32, half of it in fp64
BOUND = 1.15e-8


def evidence(post: PostConfig | None = None) -> dict[str, Any]:
    """What is judged: measures, controls, thresholds, settings, prompts, model, files, lineage, software."""
    post = post or PostConfig()
    leak_of = {"live_rms": 1e-7, "live_max": 1e-6, "cached_rms": 0.0, "cached_max": 0.0}
    leak = dict.fromkeys(("last_token", "last_quarter", "short"), leak_of) | {"worst_rms": 1e-7, "logit_spread": 2.0}
    agreement = {"max_abs_delta_logit": 1e-6, "kl": 1e-12, "kl_max": 1e-11, "top1": 1.0}
    losses = {"block": 5.0, "cached": 5.0, "mean": 5.0, "random_tokens": 5.0, "other": 5.0}
    losses |= {"zero": 5.19, "identity": 5.385, "plain": 5.064}
    prefix = {"block": 4.9, "prefix": 4.9, "cached": 4.9}
    stats = {name: _heads(0.1) for name in ("mean", "std", "low", "high")}
    tensors = ("A", "A_LM", "A_P", "G_LM")
    untrained = {name: deviation(0.5) for name in tensors}
    order = {"by_mean": 1e-7, "by_rms": 1e-8, "by_mean_per_head": _heads(1e-7), "by_rms_per_head": _heads(1e-8)}
    measures = {
        "not_finite": [],
        "coverage": {"ids": 47, "seen": 47},
        "relative_deviation_g": DEVIATION / 2,
        "relative_deviation_g_fp32": DEVIATION,
        "cached_g_deviation": DEVIATION / 4,
        "deviations": {
            "fp32": {name: deviation(DEVIATION) for name in tensors},
            "fp64": {name: deviation(DEVIATION / 2) for name in tensors},
        },
        "query_deviation": {
            key: value for key, value in deviation(3e-8).items() if key in ("max", "worst", "by_kind", "per_head")
        },
        "worst_row": {
            **{"max": 1.1e-8, "worst": {"layer": 1, "head": 0}, "per_head": [[1e-9, 2e-9], [1.1e-8, 3e-9]]},
            **{"starts": 24, "steps": 60, "seed": 7, "rows_from_prompts": 400},
        },
        "proof": {
            **{"bound": BOUND, "per_head": [[2e-9, 3e-9], [BOUND, 4e-9]], "closed": True, "score_bound": [1e-7, 2e-7]},
            **{"by_unit": [[0.35, 4e-4, 7e-8], [0.27, 2e-4, 3e-8]], "precision_bits": 128, "reason": None},
        },
        "row_variance_ratio_A": stats,
        "log_abs_det": {name: {**stats, "singular": _heads(0.0)} for name in tensors},
        "rank": {name: {**stats, "of": 8} for name in tensors},
        "cached_rank": {"numerical": [[8, 8], [8, 8]], "effective": [[3, 4], [2, 5]], "of": 8},
        "losses": losses,
        "prefix": prefix,
        "effects": {
            **{"num_prompts": 16, "zero": 0.19, "identity": 0.385, "plain": 0.064, "alive_layers": [1]},
            "per_layer": {"zero": [0.016, 0.17], "identity": [0.019, 0.31], "plain": [0.001, 0.05]},
        },
        "agreement": {"cached": agreement, "random_tokens": agreement, "short": agreement},
        "leak": leak,
        "greedy": {
            **{"per_decision": 1.0, "identical": 1.0, "num_prompts": 16, "prompt_length": 32, "num_tokens": 96},
            **{"decisions": 1536, "live_checks": 256},
        },
        "order_parameter": {name: dict.fromkeys(("1-2", "1-C", "2-C"), order) for name in tensors}
        if post.order_parameter
        else {},
        "fp64": {"losses": losses, "prefix": prefix, "agreement": {"cached": agreement}, "leak": leak},
    }
    asked = {"proof": post.prove, "order_parameter": post.order_parameter}
    measures |= {name: {} for name, wanted in asked.items() if not wanted}
    return plain(
        {
            "schema_version": 5,
            "measures": measures,
            "controls": {
                "random_tokens": {"loss": 5.0, "gap": 0.0, "agreement": agreement},
                "untrained": {
                    **{"seed": 0, "prompts_of_each_kind": 8, "failed": ["relative_deviation_g"]},
                    **{"relative_deviation_g": 0.5, "row_variance_ratio_A": stats, "losses": losses, "leak": leak},
                    **{"deviations": untrained, "agreement": agreement},
                },
            },
            "thresholds": {name: getattr(post, name) for name in TODAY.thresholds},
            "settings": {name: getattr(post, name) for name in TODAY.settings},
            "prompts": {
                **{"sha256": "0" * 64, "kinds": KINDS, "distinct": 128, "documents": 37, "deviating": 0},
                **{"left_out_padded": 0, "seed": 0},
            },
            "model": {**MODEL.to_dict(), "num_parameters": MODEL.num_parameters()["total"]},
            "files": {"model.safetensors": "1" * 64, "g_lm.safetensors": "2" * 64},
            "lineage": {"checkpoint": "step-000007", "step": 7, "invariance_budget": 9.5},
            "software": {"torch": "2", "device": "cpu"},
        }
    )


def judged_by_hand(post: PostConfig | None = None, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The certificate of the evidence with changes, {"measures.losses.zero": 5.0}; judged, not checked for consistency."""
    found = evidence(post)
    for path, value in (changes or {}).items():
        found = edited(found, path, value)
    return {**found, **judged(found)}


def varying(deviation_g: float, *, fp64: float | None = None) -> dict[str, Any]:
    """Changes to the evidence of a model whose G_LM deviates so in fp32 and fp64."""
    double = deviation_g if fp64 is None else fp64
    return {
        **{"measures.relative_deviation_g": double, "measures.relative_deviation_g_fp32": deviation_g},
        "measures.deviations.fp32.G_LM": deviation(deviation_g),
        "measures.deviations.fp64.G_LM": deviation(double),
        "prompts.deviating": 128 if deviation_g > 1e-5 else 0,
    }


def deviation(largest: float) -> dict[str, Any]:
    """Of a tensor: the worst head is head 1 of layer 0, on one-token prompts."""
    by_kind = {kind: largest if kind in ("text", "text_1") else largest / 2 for kind in KINDS}
    per_head = [[largest / 3, largest], [largest / 4, largest / 5]]
    return {
        **{
            "max": largest,
            "worst": {"kind": "text_1", "layer": 0, "head": 1},
            "by_kind": by_kind,
            "per_head": per_head,
        },
        **{"rms_deviation_by_kind": by_kind, "rms_deviation_per_head": per_head},
        **{"max_abs_delta": largest, "max_abs_delta_per_head": per_head, "rms": _heads(1.0)},
    }


def edited(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a dotted path."""
    changed = copy.deepcopy(tree)
    node: Any = changed
    *parents, last = path.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[int(last) if isinstance(node, list) else last] = value
    return changed


def _heads(value: float) -> list[list[float]]:
    return [[value] * 2] * 2
