"""What G_LM does: the part of it that is plain attention, losses with another G, and where it matters."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from pipeline.post.extract import extract_g
from pipeline.post.measure import observe
from pipeline.post.measure.effects import compare_losses, effects_by_layer, estimated
from pldr_model.rotary_part import rotary_part

STYLES = ("interleaved", "half")


@pytest.mark.parametrize("style", STYLES)
def test_the_plain_part_is_attention_with_other_weights(tiny: SimpleNamespace, text: torch.Tensor, style: str) -> None:
    """Folded into W_q it gives the logits of the plain part with G = identity: no G_LM is needed."""
    model = tiny.make_model(gain=1.0, config=replace(tiny.config, rope_style=style)).double()
    ids, K = text[:3, :-1], tiny.config.head_dim
    plain = rotary_part(extract_g(model, ids, "mean").g_lm.double(), model.config)
    with torch.no_grad():
        expected = model(ids, g_lm=plain)
        for layer, c_HKK in zip(model.layers, plain, strict=True):
            qkv = layer.attention.qkv
            rows = qkv.num_fused and c_HKK.shape[0] * K
            w_HKD, b_HK = qkv.weight[:rows].view(-1, K, qkv.weight.shape[1]), qkv.bias[:rows].view(-1, K, 1)
            qkv.weight[:rows] = (c_HKK.mT @ w_HKD).flatten(0, 1)
            qkv.bias[:rows] = (c_HKK.mT @ b_HK).flatten()
        found = model(ids, g_lm=torch.eye(K, dtype=torch.float64).expand_as(plain))
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("batch_sequences", [1, 2, 100])
def test_losses_are_those_computed_one_by_one(
    tiny: SimpleNamespace, text: torch.Tensor, monkeypatch: pytest.MonkeyPatch, batch_sequences: int
) -> None:
    model, text = tiny.make_model(gain=1.0), text[:5]
    monkeypatch.setattr(observe, "BATCH_LOGITS", batch_sequences * text.shape[1] * tiny.config.vocab_size)
    g_lm = extract_g(model, text[:, :-1], "mean").g_lm
    found = compare_losses(model, g_lm, text, random_LHKK=g_lm * 0.9)
    losses, prefix = found["losses"], found["prefix"]
    with torch.inference_mode():
        live = [model.compute_g(row[None, :-1])[:, 0] for row in text]
        given = {
            "block": live,
            "cached": [g_lm] * 5,
            "random_tokens": [g_lm * 0.9] * 5,
            "other": live[-1:] + live[:-1],
            "zero": [g_lm * 0] * 5,
            "identity": [torch.eye(8).expand_as(g_lm)] * 5,
            "plain": [rotary_part(g_lm, model.config)] * 5,
        }
        assert set(losses) == set(given)
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
    assert len({round(loss, 4) for loss in losses.values()}) == 7
    assert len({round(loss, 4) for loss in prefix.values()}) == 3


@pytest.mark.parametrize("source", ["learned", "identity", "random"])
def test_effects_by_layer_are_those_computed_one_by_one(tiny: SimpleNamespace, text: torch.Tensor, source: str) -> None:
    model, text = tiny.make_model(gain=1.0, config=replace(tiny.config, g_source=source)), text[:3]
    g_lm = extract_g(model, text[:, :-1], "mean").g_lm
    losses = compare_losses(model, g_lm, text)["losses"]
    found = effects_by_layer(model, g_lm, text, losses, min_effect=0.05)
    replacements = {
        "zero": 0 * g_lm,
        "identity": torch.eye(8).expand_as(g_lm),
        "plain": rotary_part(g_lm, model.config),
    }
    with torch.inference_mode():
        for name, other in replacements.items():
            assert found[name] == pytest.approx(losses[name] - losses["cached"])
            for layer in range(2):
                mixed = torch.stack([other[i] if i == layer else g_lm[i] for i in range(2)])
                logits = model(text[:, :-1], g_lm=mixed)
                cost = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()) - losses["cached"]
                assert found["per_layer"][name][layer] == pytest.approx(float(cost), abs=1e-5), (name, layer)
    assert found["num_prompts"] == 3
    assert not model.layers[0]._forward_pre_hooks


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_layer_is_named(tiny: SimpleNamespace, dead: int) -> None:
    model = tiny.make_model()
    with torch.no_grad():
        model.layers[dead].attention.output.weight.zero_()
    text = tiny.sample_text(model)
    g_lm = extract_g(model, text[:, :-1], "mean").g_lm
    losses = compare_losses(model, g_lm, text)["losses"]
    found = effects_by_layer(model, g_lm, text, losses, min_effect=0.05)
    assert found["alive_layers"] == [1 - dead]
    assert all(found["per_layer"][name][dead] == 0.0 for name in ("zero", "identity", "plain"))
    assert found["zero"] >= 0.05


def test_a_loss_of_all_prompts_is_estimated_from_differences_on_the_same_ones() -> None:
    of_few = {"block": 4.25, "cached": 4.5, "zero": 5.0, "other": 4.75}
    of_all = {"block": 4.0, "cached": 4.125}
    assert estimated(of_all, of_few) == {"block": 4.0, "cached": 4.125, "zero": 4.625, "other": 4.5}


def test_few_prompts_give_the_effects_of_many(tiny: SimpleNamespace) -> None:
    model = tiny.make_model()
    text = tiny.sample_text(model, count=200)
    g_lm = extract_g(model, text[:, :-1], "mean").g_lm
    of_all = compare_losses(model, g_lm, text)["losses"]
    errors, naive = [], []
    for start in range(0, 192, 16):
        of_few = compare_losses(model, g_lm, text[start : start + 16])["losses"]
        errors.append(estimated({k: of_all[k] for k in ("block", "cached")}, of_few)["other"] - of_all["other"])
        naive.append(of_few["other"] - of_all["other"])
    assert max(map(abs, errors)) < 1e-5 < max(map(abs, naive))
