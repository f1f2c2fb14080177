"""Losses, agreement and leak against direct computation, whatever the batches."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pipeline.post.extract import extract_g
from pipeline.post.measure import observe
from pipeline.post.measure.downstream import Agreement, compare, compare_losses, leak_test
from pipeline.post.measure.generation import greedy_agreement


@pytest.mark.parametrize("batch_sequences", [1, 2, 100])
def test_losses_are_those_computed_one_by_one(
    tiny: SimpleNamespace, text: torch.Tensor, monkeypatch: pytest.MonkeyPatch, batch_sequences: int
) -> None:
    model, text = tiny.make_model(gain=1.0), text[:5]
    monkeypatch.setattr(observe, "BATCH_LOGITS", batch_sequences * text.shape[1] * tiny.config.vocab_size)
    g_lm = extract_g(model, text[:, :-1], "mean").g_lm
    found = compare_losses(model, {"cached": g_lm, "mean": g_lm * 0.9}, text)
    losses, prefix = found["losses"], found["prefix"]
    with torch.inference_mode():
        live = [model.compute_g(row[None, :-1])[:, 0] for row in text]
        given = {
            "block": live,
            "cached": [g_lm] * 5,
            "mean": [g_lm * 0.9] * 5,
            "other": live[-1:] + live[:-1],
            "zero": [g_lm * 0] * 5,
            "identity": [torch.eye(8).expand_as(g_lm)] * 5,
        }
        for name, per_row in given.items():
            direct = [
                F.cross_entropy(model(row[None, :-1], g_lm=g)[0], row[1:]) for row, g in zip(text, per_row, strict=True)
            ]
            assert losses[name] == pytest.approx(float(torch.stack(direct).mean()), abs=1e-5), name
        half = (text.shape[1] - 1) // 2
        given = {"block": live, "prefix": [model.compute_g(r[None, :half])[:, 0] for r in text], "cached": [g_lm] * 5}
        for name, per_row in given.items():
            direct = [
                F.cross_entropy(model(row[None, :-1], g_lm=g)[0, half:], row[1 + half :])
                for row, g in zip(text, per_row, strict=True)
            ]
            assert prefix[name] == pytest.approx(float(torch.stack(direct).mean()), abs=1e-5), name
    assert len({round(loss, 4) for loss in losses.values()}) == 6
    assert len({round(loss, 4) for loss in prefix.values()}) == 3


def agreement_of(*pairs: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    agreement = Agreement()
    for live, cached in pairs:
        part = Agreement()
        compare({"x": part}, live, {"x": cached})
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


def test_the_leak_is_seen_where_there_is_one_and_only_there(tiny: SimpleNamespace, text: torch.Tensor) -> None:
    for gain, leaks in ((0.0, False), (1.0, True)):
        model = tiny.make_model(gain=gain)
        leak = leak_test(model, extract_g(model, text[:, :-1], "mean").g_lm, text, seed=0)
        for what in ("last_token", "last_quarter"):
            assert (leak[what]["live_rms"] > 1e-3) == leaks and leak[what]["live_max"] >= leak[what]["live_rms"]
            assert leak[what]["cached_max"] == 0.0 and leak["logit_spread"] > 0.1
        assert leak["worst_rms"] == max(leak[what]["live_rms"] for what in ("last_token", "last_quarter"))


def test_greedy_differences_count_once_a_prompt(
    tiny: SimpleNamespace, text: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [[[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 9, 9, 9], [5, 6, 7, 8]]]  # cached, then live
    monkeypatch.setattr("pipeline.post.measure.generation.generate", lambda *a, **k: answers.pop(0))
    result = greedy_agreement(tiny.make_model(), torch.zeros(2, 2, 8, 8), text, num_tokens=4, num_prompts=2)
    assert result["num_prompts"] == 2
    assert result["decisions"] == 2 + 4 and result["per_decision"] == pytest.approx(1 - 1 / 6)
    assert result["identical"] == 0.5
