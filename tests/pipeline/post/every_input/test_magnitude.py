"""What may overflow for some input is named, and nothing of a model whose weights are as training leaves them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipeline.post.every_input.magnitude import may_overflow
from pldr_model.model import PLDRModel


def test_a_model_as_it_is_may_not(tiny: SimpleNamespace) -> None:
    model = tiny.make_model()
    assert may_overflow(model, torch.randn(2, 2, 8, 8)) == []


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("layers.1.attention.qkv.weight", "layer 1, head 0, scores"),
        ("layers.1.attention.qkv.bias", "layer 1, head 1, density matrix"),
        ("layers.0.attention.output.weight", "layer 0, attention"),
        ("layers.0.feed_forward.w12.weight", "layer 0, feed-forward"),
        ("layers.0.feed_forward_norm.weight", "layer 1, head 0, scores"),
        ("layers.1.attention.plga.metric_learner.0.glus.0.w12.weight", "layer 1, unit 0 of the metric learner"),
        ("layers.0.attention.plga.density_norm.weight", "layer 0, unit 0 of the metric learner"),
        ("output.weight", "logits"),
    ],
)
def test_what_large_weights_reach_is_named(tiny: SimpleNamespace, name: str, what: str) -> None:
    model = tiny.make_model()
    with torch.no_grad():
        model.get_parameter(name).add_(1e38)
    found = may_overflow(model, torch.randn(2, 2, 8, 8))
    assert any(line.startswith(f"{what} of some input") for line in found), found


def test_whatever_overflows_in_a_pass_is_named(tiny: SimpleNamespace) -> None:
    chance, overflowed = torch.Generator().manual_seed(0), 0
    ids = torch.randint(4, tiny.config.vocab_size, (16, 32), generator=chance)
    g_lm = torch.randn(2, 2, 8, 8, generator=chance)
    names = [
        name for name, _ in tiny.make_model().named_parameters() if ".plga." not in name and "embedding." not in name
    ]
    for name in names:
        for exponent in (12, 17, 20, 30, 37):
            model: PLDRModel = tiny.make_model()
            parameter = model.get_parameter(name)
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=chance) * 10.0**exponent)
                finite = bool(model(ids, g_lm=g_lm).isfinite().all())
            overflowed += not finite
            assert finite or may_overflow(model, g_lm), (name, exponent)
    assert overflowed > 20


def test_a_metric_learner_that_overflows_for_some_rows_is_named(tiny: SimpleNamespace) -> None:
    chance, overflowed = torch.Generator().manual_seed(0), 0
    rows = torch.nn.functional.layer_norm(torch.randn(64, 8, generator=chance), (8,))
    learner = "layers.0.attention.plga.metric_learner"
    names = [name for name, _ in tiny.make_model().named_parameters() if name.startswith(learner)]
    for name in names:
        for exponent in (8, 12, 17, 20, 30, 37):
            model: PLDRModel = tiny.make_model()
            parameter = model.get_parameter(name)
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=chance) * 10.0**exponent)
                finite = bool(model.get_submodule(learner)(rows).isfinite().all())
            overflowed += not finite
            assert finite or may_overflow(model, torch.randn(2, 2, 8, 8)), (name, exponent)
    assert overflowed > 10


def test_a_certificate_fails_by_it(tiny: SimpleNamespace, text: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "layer 0, head 0, scores of some input (up to 1e+40)"
    monkeypatch.setattr("pipeline.post.validate.may_overflow", lambda model, g_lm: [name])
    certificate = tiny.certify(tiny.make_model(), text)
    assert certificate["verdict"] == "failed" and certificate["measures"]["not_finite"] == [name]
