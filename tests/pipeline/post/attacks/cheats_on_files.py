"""Cheats in configurations, prompts, certificates and bundles: what a person can hand over beside a model's weights."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.bundle.read import verify_bundle
from pipeline.config.post import PostConfig
from pipeline.io.storage import render_json
from pipeline.post.package.measured_formats import pack_measured
from pipeline.post.package.measured_keys import measure_keys
from pldr_model.model import PLDRModel
from tests.helpers.bundles import reseal
from tests.pipeline.post.attacks.cheats import faint
from tests.pipeline.post.attacks.trained import BASE, POST, SIZES, Lab, language
from tests.pipeline.post.attacks.verdicts import Cases, Refused, failed_by

CHEATS = Cases()
OTHER = replace(BASE, seed=1)


@CHEATS.add(Refused("min_attention_effect"))
def floor_of_the_effect(lab: Lab) -> dict[str, Any]:
    """Attention is dead, and post.min_attention_effect is 1e-12."""
    post = PostConfig.model_validate({**POST.model_dump(), "min_attention_effect": 1e-12})
    return lab.certify(faint(lab), post=post)


@CHEATS.add(Refused("max_format_loss"))
def cap_of_the_format(lab: Lab) -> dict[str, Any]:
    """int8 weights that cost nats, and post.max_format_loss is 1e9."""
    post = PostConfig.model_validate({**POST.model_dump(), "max_format_loss": 1e9})
    return _int8(lab, post.max_format_loss)


@CHEATS.add(Refused("too much"))
def int8_that_costs_nats(lab: Lab) -> dict[str, Any]:
    """fp32 weights are certified; a few rescaled channels make int8 round all others away."""
    return _int8(lab, 0.1)


@CHEATS.add(failed_by("relative_deviation_g", "cache_gap"))
def g_of_another_model(lab: Lab) -> dict[str, Any]:
    """The cached G is that of another invariant model."""
    return lab.certify(lab.trained(), g_lm=lab.g_lm(lab.trained(OTHER)))


@CHEATS.add(failed_by("cached_g_deviation"))
def g_slightly_off(lab: Lab) -> dict[str, Any]:
    """The cached G is the model's own, scaled by 1.00005: constant, and not what the model computes."""
    model = lab.trained()
    return lab.certify(model, g_lm=lab.g_lm(model) * (1 + 5e-5))


@CHEATS.add(Refused("different model.safetensors"))
def certificate_of_another_model(lab: Lab) -> dict[str, Any]:
    """A failed model is packaged with the certificate of another that passed."""
    lab.bundle(faint(lab), lab.certificate(), "transplanted")
    return lab.certificate()


@CHEATS.add(Refused("it certifies a different"))
def certificate_put_into_a_bundle(lab: Lab) -> dict[str, Any]:
    """The certificate of another model replaces that of a bundle, whose manifest is made again."""
    other = {**lab.certificate(OTHER), "packaged": "certified"}
    return _edited(lab, "replaced", other)


@CHEATS.add(Refused("does not follow"))
def edited_verdict(lab: Lab) -> dict[str, Any]:
    """A measure says failed, the verdict certified."""
    certificate = copy.deepcopy(lab.certificate())
    certificate["measures"]["losses"]["zero"] = certificate["measures"]["losses"]["cached"]
    return _edited(lab, "verdict", certificate)


@CHEATS.add(Refused("relative_deviation_g"))
def edited_measure(lab: Lab) -> dict[str, Any]:
    """The judged deviation is smaller than those of the kinds and heads that it is the largest of."""
    certificate = copy.deepcopy(lab.certificate())
    certificate["measures"]["relative_deviation_g"] = 1e-12
    return _edited(lab, "measure", certificate)


@CHEATS.add(Refused("tier"))
def edited_tier(lab: Lab) -> dict[str, Any]:
    """The tier is better than the measures are."""
    certificate = copy.deepcopy(lab.certificate())
    certificate["tier"] = "constant by construction"
    return _edited(lab, "tier", certificate)


@CHEATS.add(Refused("above the proven bound"))
def edited_proof(lab: Lab) -> dict[str, Any]:
    """The proven bound is below a deviation that the search found."""
    certificate = copy.deepcopy(lab.certificate())
    proof, found = certificate["measures"]["proof"], certificate["measures"]["worst_row"]["max"]
    proof["per_head"] = [[found / 2 for _ in heads] for heads in proof["per_head"]]
    proof["bound"] = found / 2
    return _edited(lab, "proof", certificate)


@CHEATS.add(Refused("too much"))
def low_rank_keys_that_cost_nats(lab: Lab) -> dict[str, Any]:
    """Keys of one number each, for which the certificate of the full ones is to stand."""
    _low_rank(lab, 1, "one-number")
    return lab.certificate()


@CHEATS.add(Refused("no measurement of these key ranks"))
def edited_ranks(lab: Lab) -> dict[str, Any]:
    """A bundle is to decode with fewer numbers of a key than were measured."""
    path = _low_rank(lab, SIZES.head_dim, "ranks")
    record = json.loads((path / "config.json").read_bytes())
    record["key_ranks"] = [[1 for _ in row] for row in record["key_ranks"]]
    (path / "config.json").write_bytes(render_json(record))
    reseal(path)
    verify_bundle(path)
    return lab.certificate()


@CHEATS.add(Refused("does not follow from the ranks"))
def edited_numbers_of_keys(lab: Lab) -> dict[str, Any]:
    """The certificate claims a smaller cache than its ranks give."""
    path = _low_rank(lab, SIZES.head_dim, "numbers")
    certificate = json.loads((path / "certificate.json").read_bytes())
    certificate["key_rank"]["bytes_per_token"] = 8
    (path / "certificate.json").write_bytes(render_json(certificate))
    reseal(path)
    verify_bundle(path)
    return lab.certificate()


@CHEATS.add(Refused("outside the model's vocabulary"))
def tokens_of_another_tokenizer(lab: Lab) -> dict[str, Any]:
    """The prompts have ids that the model does not know."""
    return lab.certify(lab.trained(), text_NT=language(BASE, count=POST.prompts, seed=2) + 40)


@CHEATS.add(Refused("the same text"))
def one_prompt_repeated(lab: Lab) -> dict[str, Any]:
    """100 prompts, all the same."""
    return lab.certify(lab.trained(), text_NT=language(BASE, count=1, seed=2).repeat(POST.prompts, 1))


@CHEATS.add(failed_by("held_out_prompts"))
def few_prompts_repeated(lab: Lab) -> dict[str, Any]:
    """100 prompts, of which 5 are different."""
    return lab.certify(lab.trained(), text_NT=language(BASE, count=5, seed=2).repeat(POST.prompts // 5, 1))


def _low_rank(lab: Lab, rank: int, name: str) -> Path:
    """A bundle of the base model whose keys all have this rank."""
    model, certificate = lab.trained(), lab.certificate()
    g_LHKK = lab.g_lm(model)
    post = PostConfig.model_validate({**POST.model_dump(), "key_rank": {"ranks": rank}, "max_key_loss": 0.1})
    rank_LH = torch.full(g_LHKK.shape[:2], rank)
    text_NT, sha256 = language(BASE, count=50, seed=2), certificate["files"]["model.safetensors"]
    section = measure_keys(model, g_LHKK, rank_LH, text_NT, post, sha256=sha256)
    return lab.bundle(model, certificate, name, key_rank_section=section)


def _edited(lab: Lab, name: str, certificate: dict[str, Any]) -> dict[str, Any]:
    """Put the certificate into a bundle of the base model, make the manifest fit, and read it as a user does."""
    path = lab.bundle(lab.trained(), lab.certificate(), name)
    (path / "certificate.json").write_bytes(render_json({**certificate, "packaged": "certified"}))
    reseal(path)
    verify_bundle(path)
    read: dict[str, Any] = json.loads((path / "certificate.json").read_bytes())
    return read


def _int8(lab: Lab, allowed: float) -> dict[str, Any]:
    """A bundle of int8 weights of a certified model: one column of a matrix is huge, what it multiplies is as small."""
    model = lab.trained()
    _unbalance(model)
    certificate = lab.certify(model)
    assert certificate["verdict"] == "certified", "rescaling changed the model"
    packed = pack_measured(
        model,
        lab.g_lm(model),
        language(BASE, count=50, seed=2),
        "int8",
        max_loss_difference=allowed,
        max_prompts=50,
    )
    assert packed.section["loss_difference"] > 1.0, packed.section
    lab.bundle(model, certificate, "int8", packed=packed)
    return certificate


@torch.no_grad()
def _unbalance(model: PLDRModel) -> None:
    """In every matrix that writes to the residual stream one column is 1e5 times as large: the model computes the same."""
    for layer in model.layers:
        forward, attention = layer.feed_forward, layer.attention
        for into, out, row in (
            (forward.w12, forward.w3, forward.w3.in_features),  # the first value
            (attention.qkv, attention.output, 2 * attention.num_heads * attention.head_dim),  # the first value
        ):
            into.weight[row] /= 1e5
            into.bias[row] /= 1e5
            out.weight[:, 0] *= 1e5
