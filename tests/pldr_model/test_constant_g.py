"""A trained constant G that is kept to a part of all matrices: what it can be, where it starts, what decay does to it."""

from dataclasses import replace

import pytest
import torch

from pldr_model.config import ModelConfig
from pldr_model.constant_g import ConstantG
from pldr_model.model import PLDRModel, to_constant_g
from pldr_model.rotary_part import rotary_part

SIZES = ModelConfig(vocab_size=23, num_layers=2, num_heads=2, head_dim=8, context_length=16, g_source="constant")
CONSTRAINTS = [
    {},
    {"g_constraint": "low_rank", "g_rank": 3},
    {"g_constraint": "rotary"},
    {"g_constraint": "nonrotary"},
]
EYE = torch.eye(8, dtype=torch.float64)


def name_of(change: dict) -> str:
    return change.get("g_constraint", "none")


@pytest.fixture(params=CONSTRAINTS, ids=name_of)
def config(request) -> ModelConfig:
    return replace(SIZES, **request.param)


def moved(config: ModelConfig) -> PLDRModel:
    """In fp64, with every parameter of G somewhere else than at its start."""
    torch.manual_seed(3)
    model = PLDRModel(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".plga." in name:
                parameter += 0.5 * torch.randn_like(parameter)
    return model


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 23, (3, 16), generator=torch.Generator().manual_seed(seed))


def test_it_starts_as_the_sdpa_twin_does(config):
    torch.manual_seed(7)
    model = PLDRModel(config)
    after = torch.rand(())
    torch.manual_seed(7)
    twin = PLDRModel(config.sdpa_twin())
    assert torch.equal(after, torch.rand(()))  # nothing more was drawn
    theirs = twin.state_dict()
    assert all(torch.equal(w, theirs[name]) for name, w in model.state_dict().items() if ".plga." not in name)
    assert torch.equal(model.constant_g(), torch.eye(8).expand(2, 2, 8, 8))
    assert torch.equal(model(ids()), twin(ids()))


@pytest.mark.parametrize("style", ["interleaved", "half"])
def test_every_g_is_of_the_kind_that_was_asked_for(config, style):
    model = moved(replace(config, rope_style=style))
    g = model.constant_g()
    rest = g - EYE
    if config.g_constraint == "low_rank":
        assert (torch.linalg.svdvals(rest)[..., 3:] < 1e-12).all() and (torch.linalg.svdvals(rest)[..., 2] > 0.1).all()
    elif config.g_constraint == "rotary":
        assert torch.allclose(rotary_part(g, model.config), g, rtol=0, atol=1e-14)
    elif config.g_constraint == "nonrotary":
        assert rotary_part(rest, model.config).abs().max() < 1e-14
    assert rest.abs().max() > 0.1


def test_no_g_of_the_kind_is_out_of_reach():
    """Any matrix that commutes, and any that is orthogonal to those, is what some parameter composes."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(2, 8, 8, dtype=torch.float64, generator=generator)
    part = rotary_part(target, SIZES)
    for constraint, name, given, expected in (
        ("rotary", "C", part, part),
        ("nonrotary", "M", target - part, EYE + target - part),
    ):
        module = ConstantG(replace(SIZES, g_constraint=constraint)).double()
        with torch.no_grad():
            getattr(module, name).copy_(given)
        assert torch.allclose(module.composed(), expected, rtol=0, atol=1e-14)


def test_the_model_is_the_one_with_the_composed_g(config):
    model = moved(config)
    g = model.constant_g()
    assert torch.allclose(model(ids()), model(ids(), g_lm=g), rtol=0, atol=1e-12)
    assert torch.equal(model.compute_g(ids())[:, 1], g)
    fixed = to_constant_g(model, g)
    assert fixed.config == config.with_constant_g() and fixed.config.g_constraint == "none"
    assert torch.allclose(model(ids()), fixed(ids()), rtol=0, atol=1e-12)
    assert not torch.allclose(model(ids()), model(ids(), g_lm=EYE.expand_as(g)), rtol=0, atol=1e-3)


def test_a_g_that_commutes_with_rope_is_plain_attention_with_other_weights():
    """Folded into W_q it gives the same logits with G = identity."""
    model = moved(replace(SIZES, g_constraint="rotary"))
    expected = model(ids())
    twin = PLDRModel(model.config.sdpa_twin()).double()
    twin.load_state_dict({name: w for name, w in model.state_dict().items() if ".plga." not in name})
    with torch.no_grad():
        for layer, c_HKK in zip(twin.layers, model.constant_g(), strict=True):
            qkv = layer.attention.qkv
            w_HKD, b_HK1 = qkv.weight[:16].view(2, 8, 16), qkv.bias[:16].view(2, 8, 1)
            qkv.weight[:16], qkv.bias[:16] = (c_HKK.mT @ w_HKD).flatten(0, 1), (c_HKK.mT @ b_HK1).flatten()
    assert torch.allclose(twin(ids()), expected, rtol=0, atol=1e-10)


def test_gradients_reach_its_parameters_from_the_start_and_are_right(config):
    torch.manual_seed(0)
    model = PLDRModel(config).double()
    model(ids(), targets=ids(1)).loss.backward()
    gradients = {name: p.grad.abs().max() for name, p in model.named_parameters() if ".plga." in name}
    for name, largest in gradients.items():
        assert (largest == 0) == name.endswith(".U"), name  # U's are zero as long as V is
    model = moved(config)
    module = model.layers[0].attention.plga
    queries = torch.randn(1, 2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    names = [name for name, _ in module.named_parameters()]

    def forward(*given):
        return torch.func.functional_call(module, dict(zip(names, given, strict=True)), (queries,))

    assert torch.autograd.gradcheck(forward, tuple(p.detach().requires_grad_() for p in module.parameters()))


def test_decay_alone_ends_at_the_identity_or_at_zero(config):
    model = moved(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=5.0)
    for _ in range(60):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    end = EYE if config.g_constraint in ("low_rank", "nonrotary") else 0 * EYE
    assert torch.allclose(model.constant_g(), end.expand(2, 2, 8, 8), rtol=0, atol=1e-12)


def test_layers_and_heads_of_low_rank_start_from_directions_of_their_own():
    def draw(seed):
        torch.manual_seed(seed)
        return torch.stack([layer.attention.plga.U for layer in PLDRModel(replace(SIZES, **CONSTRAINTS[1])).layers])

    U_LHKR = draw(1)
    assert torch.equal(U_LHKR, draw(1)) and not torch.equal(U_LHKR, draw(2))
    directions = U_LHKR.flatten(0, 1)
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(directions) for b in directions[:i])
    assert 0.5 < U_LHKR.square().sum(-2).mean() < 1.5  # columns of norm 1, about


def test_under_bf16_weights_it_is_composed_in_fp32(config):
    module = moved(config).layers[0].attention.plga.bfloat16()
    wide = module.composed()
    assert wide.dtype == (torch.bfloat16 if config.g_constraint == "none" else torch.float32)
    exact = ConstantG(config).double()
    exact.load_state_dict(module.state_dict())
    assert torch.allclose(wide.double(), exact.composed(), rtol=0, atol=1e-6)
    queries = torch.randn(1, 2, 3, 8, dtype=torch.bfloat16)
    assert module(queries).dtype == torch.bfloat16


def test_it_is_read_and_written_as_any_model(config):
    written = config.to_dict()
    assert ModelConfig.from_dict(written) == config
    assert ("g_constraint" in written) is (config.g_constraint != "none")  # files from before have no such key
    assert ("g_rank" in written) is (config.g_rank is not None)
    model = PLDRModel(config)
    counts = config.num_parameters()
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["constant_g"] == sum(p.numel() for name, p in model.named_parameters() if ".plga." in name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g_constraint": "diagonal"}, r"^g_constraint: 'diagonal' is not one of none, low_rank, rotary, nonrotary"),
        ({"g_constraint": "rotary", "g_source": "learned"}, r"^g_constraint: only read with g_source 'constant'"),
        ({"g_constraint": "rotary", "g_source": "identity"}, r"^g_constraint: only read with g_source 'constant'"),
        ({"g_constraint": "low_rank"}, r"^g_rank: None must be an integer >= 1"),
        ({"g_constraint": "low_rank", "g_rank": 0}, r"^g_rank: 0 must be an integer >= 1"),
        ({"g_constraint": "low_rank", "g_rank": 9}, r"^g_rank: 9 is over the head_dim of 8"),
        ({"g_constraint": "rotary", "g_rank": 2}, r"^g_rank: only read with g_constraint 'low_rank', not 'rotary'"),
        ({"g_rank": 2}, r"^g_rank: only read with g_constraint 'low_rank', not 'none'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SIZES, **change)
