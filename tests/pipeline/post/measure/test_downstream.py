"""Losses, agreement, leak and greedy text against direct computation, whatever the batches."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.post.extract import extract_g
from pipeline.post.measure import observe
from pipeline.post.measure.downstream import CAUSAL_PROMPTS, LEAK_PROMPTS, Agreement, Outputs, compare
from pipeline.post.measure.generation import _one_in_each_part, greedy_agreement
from pipeline.post.measure.prompts import PromptKind, equal_lengths, make_kinds
from pldr_model.generation import generate
from pldr_model.model import PLDRModel


def agreement_of(*pairs: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    agreement = Agreement()
    for live, cached in pairs:
        part = Agreement()
        compare(part, live, cached)
        agreement.merge(part)
    return agreement.as_dict()


def test_agreement_of_known_logits() -> None:
    live = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    found = agreement_of((live, live + 3.0))  # a constant shift changes no answer
    assert found["kl"] == pytest.approx(0.0, abs=1e-12) and found["top1"] == 1.0
    other = torch.tensor([[[0.0, 2.0, 0.0], [0.0, 1.0, 0.0]]])
    found = agreement_of((live, other))
    p, q = live[0, 0].double().softmax(-1), other[0, 0].double().softmax(-1)
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum()) / 2)
    assert found["top1"] == 0.5 and found["max_abs_delta_logit"] == 2.0
    found = agreement_of((live, other), (live, torch.full_like(live, math.nan)), (live, live))
    assert all(math.isnan(found[key]) for key in ("kl", "top1", "max_abs_delta_logit", "kl_max"))


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 0.3, 3.0, 300.0])
def test_kl_is_that_of_log_probabilities_in_fp64(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    live = 4 * torch.randn(1, 64, 500, generator=generator)
    cached = live + size * (torch.randn(live.shape, generator=generator) + 1)
    log_p, log_q = live.double().log_softmax(-1), cached.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    found = agreement_of((live, cached))
    assert found["kl"] == pytest.approx(float(kl.mean()), rel=1e-2 if size < 1e-5 else 1e-4)
    assert found["kl_max"] == pytest.approx(float(kl.max()), rel=0.1 if size < 1e-5 else 1e-3)


def measured(model: PLDRModel, text: torch.Tensor, **changes: Any) -> dict[str, Any]:
    """What a watcher of the live passes over every kind of prompt finds."""
    g_lm = changes.get("g_lm", extract_g(model, text[:, :-1], "mean").g_lm)
    outputs = Outputs(model, g_lm, text, seed=0)
    observe.observe(model, make_kinds(text, model.config, seed=0), [outputs])
    return outputs.merge_ranks()


@pytest.mark.parametrize("batch_sequences", [1, 2, 100])
def test_what_live_passes_show_is_what_passes_one_by_one_show(
    tiny: SimpleNamespace, text: torch.Tensor, monkeypatch: pytest.MonkeyPatch, batch_sequences: int
) -> None:
    model, text = tiny.make_model(gain=1.0), text[:5]
    monkeypatch.setattr(observe, "BATCH_LOGITS", batch_sequences * text.shape[1] * tiny.config.vocab_size)
    g_lm = extract_g(model, text[:, :-1], "mean").g_lm
    found = measured(model, text)
    with torch.inference_mode():
        for name, g in (("block", None), ("cached", g_lm)):
            direct = [F.cross_entropy(model(row[None, :-1], g_lm=g)[0], row[1:]) for row in text]
            assert found["losses"][name] == pytest.approx(float(torch.stack(direct).mean()), abs=1e-5), name
        kinds = [kind for kind in make_kinds(text, model.config, seed=0) if kind.name.startswith(("text_", "lengths"))]
        short = [row.unsqueeze(0) for kind in kinds for same in equal_lengths(kind.ids_NS) for row in same]
        pairs = [(model(ids), model(ids, g_lm=g_lm)) for ids in short]
    expected = agreement_of(*pairs)
    for key, value in expected.items():
        assert found["agreement"]["short"][key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


def test_short_prompts_are_measured_for_themselves(tiny: SimpleNamespace, text: torch.Tensor) -> None:
    """A G that moves on short prompts only, as one-token prompts of a nearly invariant model do."""
    model = tiny.make_model(gain=0.0)
    plga = model.layers[0].attention.plga
    original = plga.forward

    def gated(q_BHSK: torch.Tensor) -> Any:
        outputs = original(q_BHSK)
        return outputs._replace(G_LM=outputs.G_LM * (3.0 if q_BHSK.shape[2] <= 4 else 1.0))

    plga.forward = gated
    found = measured(model, text)
    assert found["agreement"]["cached"]["kl"] < 1e-9 and found["agreement"]["short"]["kl"] > 1e-4
    assert found["agreement"]["short"]["top1"] < 0.999


def test_the_leak_is_seen_where_there_is_one_and_only_there(tiny: SimpleNamespace, text: torch.Tensor) -> None:
    for gain, leaks in ((0.0, False), (1.0, True)):
        leak = measured(tiny.make_model(gain=gain), text)["leak"]
        for what in ("last_token", "last_quarter", "short"):
            assert (leak[what]["live_rms"] > 1e-3) == leaks and leak[what]["live_max"] >= leak[what]["live_rms"]
            assert leak[what]["cached_max"] < 1e-5 and leak["logit_spread"] > 0.1
        assert leak["worst_rms"] == max(leak[what]["live_rms"] for what in ("last_token", "last_quarter", "short"))


def test_what_is_summed_does_not_grow_with_prompts(tiny: SimpleNamespace, text: torch.Tensor) -> None:
    model, sizes = tiny.make_model(), []
    for count in (12, 48):
        many = text.repeat(2, 1)[:count]
        outputs = Outputs(model, extract_g(model, many[:, :-1], "mean").g_lm, many, seed=0)
        observe.observe(model, make_kinds(many, tiny.config, seed=0), [outputs])
        held = {**vars(outputs), "_model": None, "_text_NT": None, "_others_NS": None}  # ids, which grow
        sizes.append(sum(v.numel() for v in held.values() if isinstance(v, torch.Tensor)))
        sizes.append(len(outputs._totals.sums) + len(outputs._totals.largest))
    assert sizes[:2] == sizes[2:]


@pytest.mark.parametrize("batch_logits", [1, 1 << 22])
def test_outputs_of_the_first_prompts_only(
    tiny: SimpleNamespace, text: torch.Tensor, monkeypatch: pytest.MonkeyPatch, batch_logits: int
) -> None:
    model = tiny.make_model(gain=1.0)
    g_lm = extract_g(model, text[:, :-1], "mean").g_lm
    monkeypatch.setattr(observe, "BATCH_LOGITS", batch_logits)
    of_two = Outputs(model, g_lm, text, seed=0, first=2)
    observe.observe(model, make_kinds(text, tiny.config, seed=0), [of_two])
    losses = of_two.merge_ranks()["losses"]
    assert losses["cached"] == pytest.approx(measured(model, text[:2], g_lm=g_lm)["losses"]["cached"], abs=1e-9)


def test_a_prompt_costs_one_live_pass_beside_those_of_its_changed_end(
    tiny: SimpleNamespace, text: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, live = tiny.make_model(), []
    monkeypatch.setattr(observe, "BATCH_LOGITS", 1)
    forward = PLDRModel.forward
    monkeypatch.setattr(
        PLDRModel,
        "forward",
        lambda self, ids, g_lm=None, **rest: live.append(g_lm is None) or forward(self, ids, g_lm=g_lm, **rest),
    )
    g_lm = extract_g(model, text[:, :-1], "mean").g_lm
    for count in (LEAK_PROMPTS - 8, LEAK_PROMPTS + 8):
        many = text.repeat(count // len(text) + 1, 1)[:count]
        live.clear()
        outputs = Outputs(model, g_lm, many, seed=0)
        observe.observe(model, [PromptKind("text", many[:, :-1])], [outputs])
        assert sum(live) == count + 2 * min(count, LEAK_PROMPTS)
        assert len(live) - sum(live) == count + 2 * CAUSAL_PROMPTS


def test_greedy_choices_are_those_of_the_live_model_at_the_prefixes(
    tiny: SimpleNamespace, text: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.make_model(gain=1.0)
    g_lm = extract_g(model, text[:, :-1], "mean").g_lm
    sizes = {"num_tokens": 12, "num_prompts": 4, "seed": 3}
    found = greedy_agreement(model, g_lm, text, **sizes)
    assert found["decisions"] == found["live_checks"] == 4 * 12 and found["num_tokens"] == 12
    prompts = text[:4, : found["prompt_length"]].tolist()
    wrong = []
    for prompt, new in zip(prompts, generate(model, prompts, max_new_tokens=12, g_lm=g_lm), strict=True):
        live = [int(model(torch.tensor([prompt + new[:i]]))[0, -1].argmax()) for i in range(12)]
        wrong.append(sum(a != b for a, b in zip(live, new, strict=True)))
    assert sum(wrong) > 0
    assert found["per_decision"] == pytest.approx(1 - sum(wrong) / 48)
    assert found["identical"] == sum(w == 0 for w in wrong) / 4
    monkeypatch.setattr("pipeline.post.measure.generation.LIVE_CHECKS", 3)
    assert greedy_agreement(model, g_lm, text, **sizes)["decisions"] == 12


@pytest.mark.parametrize("length", [19, 25])
def test_a_live_G_that_differs_at_some_prefixes_is_found(
    tiny: SimpleNamespace, text: torch.Tensor, length: int
) -> None:
    """A gate on the length of the sequence that no prompt has."""
    model = tiny.make_model(gain=0.0)
    g_lm = extract_g(model, text[:, :-1], "mean").g_lm
    plga = model.layers[1].attention.plga
    original = plga.forward

    def gated(q_BHSK: torch.Tensor) -> Any:
        outputs = original(q_BHSK)
        return outputs._replace(G_LM=outputs.G_LM * (-3.0 if q_BHSK.shape[2] == length else 1.0))

    plga.forward = gated
    found = greedy_agreement(model, g_lm, text, num_tokens=16, num_prompts=8, seed=0)
    assert found["prompt_length"] < length and found["identical"] < 1 and found["per_decision"] < 0.999


def test_checked_prefixes_are_one_from_each_part_and_follow_the_seed() -> None:
    for count in (1, 5, 16, 17, 40, 256):
        indices = _one_in_each_part(count, 7)
        assert indices == sorted(set(indices)) and len(indices) == min(16, count) and indices[0] >= 0
        edges = [count * i // len(indices) for i in range(len(indices) + 1)]
        assert all(a <= index < b for index, a, b in zip(indices, edges, edges[1:], strict=False))
    assert _one_in_each_part(256, 7) == _one_in_each_part(256, 7) != _one_in_each_part(256, 8)
