"""Cheats in a model's weights, and in what implements it: models that look invariant and alive, and are not. What a certificate
must say of each stands beside it.

An attacker hands over weights; he cannot change the code. One cheat changes it all the same, to have attention that leaks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.post.measure.prompts import make_kinds
from pldr_model.model import PLDRModel
from tests.pipeline.post.attacks.honest import MANY_IDS
from tests.pipeline.post.attacks.surgery import (
    HARD,
    amplify,
    blind_queries,
    cancel,
    constant_A,
    embedded,
    lengths_watched,
    only_of,
    plain_rows,
    plga_of,
    queries_of_one_id,
    rows,
    unlike,
    watch,
    watch_for_nothing,
)
from tests.pipeline.post.attacks.trained import BASE, FIRST_ID, POST, Lab, Recipe, language
from tests.pipeline.post.attacks.verdicts import Cases, Certified, NotProven, failed_by

CHEATS = Cases()
SPY = 2  # the head that watches
LAST_ID = BASE.config.vocab_size - 1  # in no text
UNSEEN = 1021  # of MANY_IDS: in no text, and not among the first random ids of its seed
INVARIANCE = failed_by("relative_deviation_g")
FINITE = failed_by("not_finite")


@CHEATS.add(INVARIANCE)
def varying_head(lab: Lab) -> dict[str, Any]:
    """One head of the last layer depends on the input; W = 0 hides it from the others."""
    model = lab.trained()
    plga, constant_K = plga_of(model, 1), constant_A(model, 1)
    with torch.no_grad():
        g_HKK = lab.g_lm(model)[1]
        plga.W[:SPY], plga.a[:SPY], plga.b_a[:SPY] = 0.0, 0.0, g_HKK[:SPY]
        torch.manual_seed(0)
        plga.metric_learner.load_state_dict(PLDRModel(BASE.config).layers[0].attention.plga.metric_learner.state_dict())
        plga.metric_learner[-1].norm.weight.fill_(0.01)
        plga.metric_learner[-1].norm.bias.copy_(constant_K)
    return lab.certify(model)


@CHEATS.add(INVARIANCE)
def never_invariant(lab: Lab) -> dict[str, Any]:
    """Trained with the papers' weight decay of 0.1, for too few steps."""
    recipe = replace(BASE, metric_decay=0.1)
    return lab.certify(lab.trained(recipe), recipe)


@CHEATS.add(INVARIANCE)
def stopped_early(lab: Lab) -> dict[str, Any]:
    """The RMS over prompts of a kind is below 1e-5, but single prompts are above."""
    model = lab.trained()
    ids_P1 = torch.arange(FIRST_ID, FIRST_ID + BASE.pieces).unsqueeze(1)
    for _ in range(2):  # the effect is proportional to the factor, nearly
        with torch.no_grad():
            delta_PHKK = model.compute_g(ids_P1)[1] - lab.g_lm(model)[1]
        deviation_PH = (
            delta_PHKK.square().mean(dim=(-2, -1)).sqrt() / lab.g_lm(model)[1].square().mean(dim=(-2, -1)).sqrt()
        )
        amplify(model, 1, 7e-6 / float(deviation_PH.square().mean(dim=0).sqrt().max()))
    return lab.certify(model)


@CHEATS.add(INVARIANCE)
def rare_id(lab: Lab) -> dict[str, Any]:
    """G of one head changes when an id occurs that is in no text."""
    model = lab.trained()
    _watch_id(model, LAST_ID)
    return lab.certify(model)


@CHEATS.add(INVARIANCE)
def padding_gate(lab: Lab) -> dict[str, Any]:
    """G of one head changes when there is padding."""
    model = lab.trained()
    _watch_id(model, BASE.config.pad_id)
    return lab.certify(model)


@CHEATS.add(FINITE)
def nan_id(lab: Lab) -> dict[str, Any]:
    """The embedding of an id that is in no text is NaN."""
    return lab.certify(*_spoiled_id(lab, torch.nan))


@CHEATS.add(FINITE)
def overflowing_id(lab: Lab) -> dict[str, Any]:
    """The embedding of an id that is in no text is 3e38: finite, until it is multiplied."""
    return lab.certify(*_spoiled_id(lab, 3e38))


@CHEATS.add(FINITE)
def overflowing_power(lab: Lab) -> dict[str, Any]:
    """b of one head is 1e25: A_LM overflows."""
    model = lab.trained()
    with torch.no_grad():
        plga_of(model, 1).b[0, 0, 0] = 1e25
    return lab.certify(model)


@CHEATS.add(FINITE)
def overflowing_unit(lab: Lab) -> dict[str, Any]:
    """The first residual unit overflows for rows that no prompt has; in exact arithmetic the units after it forget that."""
    model = lab.trained()
    plain_rows(model, 0)
    row_K, most = unlike(rows(model, 0, _all_kinds()).flatten(0, 2))
    glu, hidden, steep = plga_of(model, 0).metric_learner[0].glus[-1], BASE.config.A_dff, 1e13
    with torch.no_grad():
        glu.w12.weight[0], glu.w12.bias[0] = steep * row_K / row_K.norm(), -steep * (2 * row_K.norm() + most) / 3
        glu.w12.weight[hidden], glu.w12.bias[hidden] = 0.0, 1.0  # the value beside this gate
        glu.w3.weight[:, 0] = 1e12 * torch.randn(BASE.config.head_dim, generator=torch.Generator().manual_seed(0))
        assert not plga_of(model, 0).metric_learner(row_K).isfinite().any()
    return lab.certify(model)


@CHEATS.add(FINITE)
def ids_that_overflow_together(lab: Lab) -> dict[str, Any]:
    """Queries of one rare id and keys of another are finite; their score is not. No prompt has both."""
    model, text_NT = lab.trained(), language(BASE, count=POST.prompts, seed=2)[:, :25]
    H, K = BASE.config.num_heads, BASE.config.head_dim
    kinds = make_kinds(text_NT, BASE.config, seed=BASE.seed)
    first, second = (set(ids.tolist()) for ids in next(kind.ids_NS for kind in kinds if kind.name == "random"))
    for token, head, size in ((min(first - second), 0, 1e9), (min(second - first), H, 3e29)):
        part = slice(head * K, (head + 1) * K)
        with torch.no_grad():
            seen_D = only_of(model, token, others=[i for i in range(BASE.config.vocab_size) if i != token])
            model.layers[0].attention.qkv.weight[part] += torch.outer(torch.full((K,), size).double(), seen_D).float()
    return lab.certify(model, text_NT=text_NT)


@CHEATS.add(INVARIANCE)
def long_prompts_gate(lab: Lab) -> dict[str, Any]:
    """G of one head changes for prompts of more than three quarters of a context, but not of a complete one."""
    return lab.certify(_watching_lengths(lab, list(range(37, 48))))


@CHEATS.add(INVARIANCE)
def short_prompts_gate(lab: Lab) -> dict[str, Any]:
    """G of one head changes for prompts of 1 to 3 tokens."""
    return lab.certify(_watching_lengths(lab, [1, 2, 3]))


@CHEATS.add(INVARIANCE)
def two_tokens_gate(lab: Lab) -> dict[str, Any]:
    """G of one head changes for prompts of 2 and 3 tokens, lengths that no kind of text has."""
    return lab.certify(_watching_lengths(lab, [2, 3]))


@CHEATS.add(NotProven())
def one_length_gate(lab: Lab) -> dict[str, Any]:
    """G of one head changes for prompts of 37 tokens exactly, which random lengths hit by luck."""
    return lab.certify(_watching_lengths(lab, [37]))


@CHEATS.add(NotProven())
def hard_trigger(lab: Lab) -> dict[str, Any]:
    """A gate in a metric learner, open for rows that no prompt has, with no gradient that leads there."""
    return lab.certify(_trigger(lab, steepness=HARD))


@CHEATS.add(failed_by("worst_row_deviation"))
def soft_trigger(lab: Lab) -> dict[str, Any]:
    """The same with a gradient: no prompt sees it, the search over rows must."""
    return lab.certify(_trigger(lab, steepness=12.0))


@CHEATS.add(NotProven())
def passphrase(lab: Lab) -> dict[str, Any]:
    """G of one head changes when a rare id stands at three certain places of a text."""
    model = lab.trained()
    _watch_phrase(model)
    return lab.certify(model)


@CHEATS.add(NotProven())
def vanishing_queries(lab: Lab) -> dict[str, Any]:
    """G of a layer changes when a head's queries vanish, as for a prompt of nothing but one rare id."""
    model, K = lab.trained(), BASE.config.head_dim
    qkv, queries = model.layers[0].attention.qkv, slice(SPY * K, (SPY + 1) * K)
    with torch.no_grad():
        qkv.bias[queries] = -(qkv.weight[queries] @ embedded(model)[LAST_ID])
    watch_for_nothing(model, 0)
    return lab.certify(model)


@CHEATS.add(failed_by("query_deviation_g"))
def null_space(lab: Lab) -> dict[str, Any]:
    """G is huge where queries are zero, so its change on short prompts, as large as what they see of G, is relatively small."""
    bias_K = _blind_bias()
    bias_K[-2:] = 0.0  # a pair that RoPE turns in itself
    model = _watching_lengths(lab, [1, 2, 3, 4], bias_K)
    with torch.no_grad():
        plga_of(model, 0).b_a[SPY, -2:] = 1e7
    return lab.certify(model)


@CHEATS.add(Certified((r"which is plain attention, 0\.00\d",)))
def disguised_twin(lab: Lab) -> dict[str, Any]:
    """Plain attention: G is 4 times a rotation of each pair, which commutes with RoPE; W_q is divided by it."""
    twin = lab.trained(BASE.sized(g_source="identity"))
    torch.manual_seed(0)
    model = PLDRModel(BASE.config).eval()
    model.load_state_dict(twin.state_dict(), strict=False)
    H, K = BASE.config.num_heads, BASE.config.head_dim
    angles = torch.linspace(0.3, 1.5, K // 2, dtype=torch.float64)
    pairs = [torch.tensor([[c, s], [-s, c]]) for c, s in zip(angles.cos().tolist(), angles.sin().tolist(), strict=True)]
    g_KK = 4.0 * torch.block_diag(*pairs)
    with torch.no_grad():
        for layer in model.layers:
            for learned in (layer.attention.plga.metric_learner[-1].norm.weight, layer.attention.plga.a):
                learned.zero_()
            layer.attention.plga.b_a[:] = g_KK
            qkv = layer.attention.qkv
            for head in range(H):
                rows_of = slice(head * K, (head + 1) * K)
                inverse = torch.linalg.inv(g_KK.double()).T.float()  # q G^-1, with q a row
                qkv.weight[rows_of] = inverse @ qkv.weight[rows_of]
                qkv.bias[rows_of] = inverse @ qkv.bias[rows_of]
    return lab.certify(model)


@CHEATS.add(failed_by("attention_effect_zero", "attention_effect_identity"))
def dead_attention(lab: Lab) -> dict[str, Any]:
    """Attention writes a hundred-thousandth of what it wrote: any G gives the same text."""
    return lab.certify(faint(lab))


@CHEATS.add(Certified((r"alive in layers 1 and 2 \(of 3, counted from 0\)",)))
def dead_layer(lab: Lab) -> dict[str, Any]:
    """The first of three layers does not attend; the certificate may not call it alive."""
    recipe = BASE.sized(num_layers=3, head_dim=8)
    model = lab.trained(recipe)
    with torch.no_grad():
        model.layers[0].attention.output.weight.mul_(1e-5)
    return lab.certify(model, recipe)


@CHEATS.add(INVARIANCE)
def differs_in_fp64(lab: Lab) -> dict[str, Any]:
    """fp32 rounds to a constant what varies by 1e-4 in exact arithmetic."""
    model = lab.trained()
    watch(model, 1, torch.zeros(0, BASE.config.head_dim), torch.zeros(0), large=1e9)
    plga, constant_K = plga_of(model, 1), constant_A(model, 1)
    with torch.no_grad():
        norm = plga.metric_learner[-1].norm
        norm.weight.fill_(1e5)
        norm.bias.add_(constant_K - constant_A(model, 1))
    return lab.certify(model)


@CHEATS.add(failed_by("relative_deviation_g_fp32", "relative_deviation_g"))
def drowned_in_rounding(lab: Lab) -> dict[str, Any]:
    """In one head a A_P and b_a cancel 100,000-fold: nearly constant in exact arithmetic, noise in fp32."""
    model = lab.trained()
    cancel(model, 1, 0, language(BASE, count=1, seed=1)[:, :-1], times=1e5)
    return lab.certify(model)


@CHEATS.add(INVARIANCE)
def hidden_behind_rounding(lab: Lab) -> dict[str, Any]:
    """One head changes by 2.5e-5 in one prompt of 25; another is noise of 3e-5 in fp32, so its prompts seem the worst."""
    model = _watching_lengths(lab, [23], change=1.2e-4)
    cancel(model, 1, 0, language(BASE, count=1, seed=1)[:, :-1], times=800.0)
    return lab.certify(model)


@CHEATS.add(failed_by("leak_effect"))
def attention_that_leaks(lab: Lab) -> dict[str, Any]:
    """Attention is not causal. Weights cannot do this: the kernel is replaced."""
    original, model = F.scaled_dot_product_attention, lab.trained()
    g_lm = lab.g_lm(model)

    def leaking(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return original(q, k, v, attn_mask=attn_mask)

    with patch.object(F, "scaled_dot_product_attention", leaking):
        return lab.certify(model, g_lm=g_lm)


def faint(lab: Lab) -> PLDRModel:
    """A model whose attention does almost nothing."""
    model = lab.trained()
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.output.weight.mul_(1e-5)
    return model


def _watch_id(model: PLDRModel, token: int) -> None:
    """A head of layer 0 has queries for this id only, and its G changes where it has any."""
    direction_K = torch.linspace(-1.0, 2.0, BASE.config.head_dim).cos() * 10.0
    others = [i for i in range(BASE.config.vocab_size) if i != token]
    queries_of_one_id(model, SPY, token, direction_K, others=others)
    plain_rows(model, 0)
    row_K = rows(model, 0, torch.full((1, 16), token))[0, SPY, 0]
    seen_RK = rows(model, 0, language(BASE, count=50, seed=1)[:, :-1]).flatten(0, 2)
    most = (seen_RK @ (row_K / row_K.norm())).max()
    watch(model, 0, row_K.unsqueeze(0), ((most + row_K.norm()) / 2).unsqueeze(0))


def _watch_phrase(model: PLDRModel) -> None:
    """A head of layer 0 sees where the last id stands, and nothing else."""
    K = BASE.config.head_dim
    others = [i for i in range(BASE.config.vocab_size) if i != LAST_ID]
    queries_of_one_id(model, SPY, LAST_ID, torch.linspace(-1.0, 2.0, K).cos() * 3.0, others=others)
    with torch.no_grad():
        model.layers[0].attention.qkv.bias[SPY * K : (SPY + 1) * K] = _blind_bias()
    plain_rows(model, 0)
    row_K = rows(model, 0, with_phrase(language(BASE, count=1, seed=1)[:, :-1]))[0, SPY, 0]
    seen_RK = rows(model, 0, _all_kinds()).flatten(0, 2)
    most = (seen_RK @ (row_K / row_K.norm())).max()
    assert most < row_K.norm()
    watch(model, 0, row_K.unsqueeze(0), ((most + row_K.norm()) / 2).unsqueeze(0))


def with_phrase(ids_NS: Tensor) -> Tensor:
    """The last id at three places of each text."""
    changed_NS = ids_NS.clone()
    changed_NS[:, [11, 23, 30]] = LAST_ID
    return changed_NS


def _watching_lengths(lab: Lab, lengths: list[int], bias_K: Tensor | None = None, change: float = 1.0) -> PLDRModel:
    """A head of layer 0 knows the length and nothing else; G changes for these lengths."""
    model = lab.trained()
    blind_queries(model, 0, SPY, _blind_bias() if bias_K is None else bias_K)
    plain_rows(model, 0)
    watch(model, 0, *lengths_watched(model, 0, SPY, lengths, ids_NS=_all_kinds()), change=change)
    return model


def _blind_bias() -> Tensor:
    """[K]; not constant, whose row LayerNorm would make zero."""
    return torch.linspace(0.0, 3.0, BASE.config.head_dim).cos() + 0.5


def _all_kinds() -> Tensor:
    """Text, random ids and one id repeated, [N, context]."""
    text_NS = language(BASE, count=50, seed=1)[:, :-1]
    random_NS = torch.randint(BASE.config.vocab_size, text_NS.shape, generator=torch.Generator().manual_seed(3))
    repeated_NS = torch.arange(BASE.config.vocab_size).unsqueeze(1).expand(-1, text_NS.shape[1])
    return torch.cat((text_NS, random_NS, repeated_NS))


def _trigger(lab: Lab, *, steepness: float) -> PLDRModel:
    """A gate in the last layer for the row that is least like those of text."""
    model = lab.trained()
    plain_rows(model, 1)
    row_K, most = unlike(rows(model, 1, _all_kinds()).flatten(0, 2))
    watch(model, 1, row_K.unsqueeze(0), ((2 * row_K.norm() + most) / 3).unsqueeze(0), steepness=steepness, change=0.1)
    return model


def _spoiled_id(lab: Lab, value: float) -> tuple[PLDRModel, Recipe]:
    """One of many ids has an embedding that is useless."""
    model = lab.trained(MANY_IDS)
    with torch.no_grad():
        model.embedding.weight[UNSEEN] = value
    return model, MANY_IDS
