"""The optimizer against torch's own pieces, in fp64: clipping, and who decays how much."""

import pytest
import torch

from pipeline.config.load import parse_config
from pipeline.config.train import TrainConfig
from pipeline.errors import ConfigError
from pipeline.train.optim import ClippedAdamW, Clipping, build_optimizer, gradient_norm, parameter_groups
from pldr_model.config import ModelConfig
from pldr_model.model import PLDRModel

TRAIN = TrainConfig(
    steps=10, warmup_steps=0, global_batch=2, micro_batch=2, weight_decay=0.3, metric_weight_decay=5.0, precision="fp32"
)


def parameters():
    torch.manual_seed(3)
    return [torch.randn(4, 5, dtype=torch.float64), torch.randn(7, dtype=torch.float64)]


@pytest.mark.parametrize("clip", ["value", "norm", "none"])
def test_steps_equal_torch_with_its_own_clipping(clip):
    ours, theirs = [[p.clone().requires_grad_() for p in parameters()] for _ in range(2)]
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.3}
    optimizer = ClippedAdamW(
        ours,
        Clipping(
            value=0.2 if clip == "value" else None,
            norm=0.5 if clip == "norm" else None,
            checks_finite=clip != "norm",
        ),
        **settings,
    )
    reference = torch.optim.AdamW(theirs, **settings)
    for _ in range(4):
        for group in (ours, theirs):
            (group[0].pow(3).sum() + group[1].exp().sum()).backward()
        norm = torch.cat([p.grad.flatten() for p in theirs]).norm().item()
        if clip == "value":
            torch.nn.utils.clip_grad_value_(theirs, 0.2)
        elif clip == "norm":
            torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        optimizer.step()
        reference.step()
        assert gradient_norm(optimizer) == pytest.approx(norm, rel=1e-6)
        for group in (ours, theirs):
            for p in group:
                p.grad = None
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert not torch.equal(ours[0], parameters()[0])


@pytest.mark.parametrize(
    ("stage", "precision", "clip_by", "taken"),
    [
        (0, "fp32", "norm", 1),
        (0, "fp32", "value", 1),
        (0, "bf16", "norm", 0),
        (1, "fp32", "norm", 0),
        (2, "bf16", "value", 0),
    ],
)
def test_the_norm_is_taken_where_deepspeed_takes_none(monkeypatch, stage, precision, clip_by, taken):
    model = PLDRModel(ModelConfig(vocab_size=11, num_layers=1, num_heads=1, head_dim=4, context_length=8, A_dff=6))
    train = TRAIN.model_copy(update={"zero_stage": stage, "precision": precision, "clip_by": clip_by})
    optimizer = build_optimizer(model, train)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    calls, norm = [], torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda tensors: calls.append(tensors) or norm(tensors))
    optimizer.step()
    assert len(calls) == taken


def test_only_the_residual_units_get_the_metric_decay():
    model = PLDRModel(ModelConfig(vocab_size=11, num_layers=2, num_heads=2, head_dim=4, context_length=8, A_dff=6))
    names = {id(p): name for name, p in model.named_parameters()}
    other, metric = parameter_groups(model, TRAIN)
    assert (other["weight_decay"], metric["weight_decay"]) == (0.3, 5.0)
    metric_names = {names[id(p)] for p in metric["params"]}
    assert metric_names and all(".metric_learner." in name for name in metric_names)
    rest = {names[id(p)] for p in other["params"]}
    assert len(metric_names) + len(rest) == len(names) and not metric_names & rest
    for kept in (
        "layers.0.attention.plga.W",
        "layers.1.attention.plga.a",
        "layers.0.attention.plga.density_norm.weight",
    ):
        assert kept in rest


def test_the_decay_of_each_group_is_what_a_step_without_gradient_shows():
    model = PLDRModel(ModelConfig(vocab_size=11, num_layers=1, num_heads=1, head_dim=4, context_length=8, A_dff=6))
    optimizer = build_optimizer(model, TRAIN)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()
    for name, p in model.named_parameters():
        decay = 5.0 if ".metric_learner." in name else 0.3
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.01 * decay))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("decay_on", ["units", "norms", "glus"])
def test_the_metric_decay_is_on_the_part_that_is_named(decay_on, optimizer):
    """What a step without gradient shows, by name; Muon gets no matrix of the metric learner, whatever decays."""
    model = PLDRModel(ModelConfig(vocab_size=11, num_layers=2, num_heads=1, head_dim=4, context_length=8, A_dff=6))
    train = TRAIN.model_copy(update={"metric_decay_on": decay_on, "optimizer": optimizer, "zero_stage": 0})
    built = build_optimizer(model, train)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in built.param_groups:
        group["lr"] = 0.01
    built.step()
    part = {"units": ".metric_learner.", "norms": ".norm.", "glus": ".glus."}[decay_on]
    decayed = {name for name in before if ".metric_learner." in name and part in name}
    assert len(decayed) == {"units": 160, "norms": 32, "glus": 128}[decay_on]
    for name, p in model.named_parameters():
        decay = 5.0 if name in decayed else 0.3
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.01 * decay))
    muon = {id(p) for group in built.param_groups if group.get("use_muon") for p in group["params"]}
    assert not any(id(p) in muon for name, p in model.named_parameters() if ".metric_learner." in name)
    written = [group.get("metric_decay_on") for group in built.param_groups]
    assert written[1] == (None if decay_on == "units" else decay_on) and written.count(None) >= len(written) - 1


def test_without_glus_only_the_norms_decay():
    config = ModelConfig(vocab_size=11, num_layers=1, num_heads=1, head_dim=4, context_length=8, num_denseA=0)
    _, metric = parameter_groups(PLDRModel(config), TRAIN.model_copy(update={"metric_decay_on": "norms"}))
    assert len(metric["params"]) == 16


@pytest.mark.parametrize(
    ("model", "train", "message"),
    [
        ({"num_denseA": 0}, {"metric_weight_decay": 5.0}, "metric_decay_on glus: model.num_denseA 0 has no GLUs"),
        ({}, {}, "metric_decay_on glus is only read with a metric_weight_decay: without one all decay alike"),
    ],
)
def test_a_decay_on_nothing_is_refused(model, train, message):
    sizes = {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8}
    tree = {
        **{"name": "t", "run_dir": "t", "data": {"sources": [{"url": "x.txt"}]}},
        **{"model": {**sizes, **model}, "train": {"metric_decay_on": "glus", **train}},
    }
    with pytest.raises(ConfigError, match=message):
        parse_config(tree, where="test")
    parse_config({**tree, "train": {"metric_weight_decay": 5.0}}, where="test")


def test_without_a_metric_learner_there_is_one_group():
    config = ModelConfig(vocab_size=11, num_layers=1, num_heads=1, head_dim=4, context_length=8, g_source="identity")
    assert len(parameter_groups(PLDRModel(config), TRAIN)) == 1
