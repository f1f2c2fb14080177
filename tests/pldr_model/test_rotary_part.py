"""The part of G_LM that commutes with RoPE: a projection on all that commutes and nothing else."""

from dataclasses import replace

import pytest
import torch

from pldr_model.config import ModelConfig
from pldr_model.layers import RopeTables, apply_rope, rope_tables
from pldr_model.rope_scaling import RopeScaling
from pldr_model.rotary_part import rotary_part, rotary_share

STYLES = ("interleaved", "half")
CONFIG = ModelConfig(vocab_size=8, num_layers=2, num_heads=3, head_dim=12, context_length=64)
DOUBLE = {"dtype": torch.float64, "device": torch.device("cpu")}


def rotations(config: ModelConfig) -> torch.Tensor:
    """[64,K,K] in fp64: what RoPE does to a query at each position, q -> q R."""
    tables = rope_tables(config, 64, **DOUBLE)
    identity_1SKK = torch.eye(config.head_dim, dtype=torch.float64).expand(1, 64, -1, -1)
    return apply_rope(identity_1SKK, RopeTables(*(t.unsqueeze(1) for t in tables)), style=config.rope_style)[0]


def any_g(config: ModelConfig) -> torch.Tensor:
    shape = (config.num_layers, config.num_heads, config.head_dim, config.head_dim)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("base", [10000.0, 500.0, 1.0])
@pytest.mark.parametrize("style", STYLES)
def test_it_is_the_orthogonal_projection_on_what_commutes_with_rope(style: str, base: float) -> None:
    config = replace(CONFIG, rope_style=style, rope_base=base)
    g, R = any_g(config), rotations(config)[[1, 2, 7, 40, 63]][:, None, None]
    part = rotary_part(g, config)
    assert (R @ part - part @ R).abs().max() < 1e-13
    assert torch.allclose(rotary_part(part, config), part, rtol=0, atol=1e-15)
    assert (R @ g - g @ R).abs().max() > 0.1
    rest, other = g - part, rotary_part(any_g(config).flip(0), config)
    assert (rest * other).sum((-2, -1)).abs().max() < 1e-12  # orthogonal to everything that commutes
    # Nothing that commutes was left out: it projects on as many dimensions as have commutators of zero.
    basis = torch.eye(144, dtype=torch.float64).view(144, 1, 12, 12)
    commutators = torch.cat([(r @ basis - basis @ r).flatten(1) for r in rotations(config)[1:]], dim=1)
    kept = round(float((rotary_part(basis, config) * basis).sum()))
    assert kept == (72 if base == 1.0 else 12) == 144 - int(torch.linalg.matrix_rank(commutators))


@pytest.mark.parametrize("style", STYLES)
def test_queries_at_random_positions_may_be_rotated_before_or_after_it(style: str) -> None:
    config, generator = replace(CONFIG, rope_style=style, context_length=5000), torch.Generator().manual_seed(1)
    positions = torch.randint(5000, (9,), generator=generator)
    cos, sin = rope_tables(config, 5000, **DOUBLE)
    tables = RopeTables(cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2))
    g_HKK = any_g(config)[0]
    q_BSHK = torch.randn(2, 9, 3, 12, dtype=torch.float64, generator=generator)

    def difference(c_HKK: torch.Tensor) -> float:
        after = apply_rope(torch.einsum("bshk,hkj->bshj", q_BSHK, c_HKK), tables, style=config.rope_style)
        before = torch.einsum("bshk,hkj->bshj", apply_rope(q_BSHK, tables, style=config.rope_style), c_HKK)
        return float((after - before).abs().max())

    part = rotary_part(g_HKK, config)
    assert difference(part) < 1e-12
    assert difference(g_HKK - part) > 1


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(type="linear", factor=4.0),
        RopeScaling(type="yarn", factor=4.0, original_context_length=16),
    ],
    ids=lambda scaling: scaling.type,
)
def test_scaled_frequencies_commute_with_as_many(scaling: RopeScaling) -> None:
    config = replace(CONFIG, rope_scaling=scaling)
    part, R = rotary_part(any_g(config), config), rotations(config)[[1, 40]][:, None, None]
    assert (R @ part - part @ R).abs().max() < 1e-13
    basis = torch.eye(144, dtype=torch.float64).view(144, 12, 12)
    assert round(float((rotary_part(basis, config) * basis).sum())) == 12


@pytest.mark.parametrize("style", STYLES)
def test_plain_attention_in_disguise_is_left_as_it_is(style: str) -> None:
    """G = 4 x a rotation per frequency, of which no entry is the identity's."""
    config = replace(CONFIG, rope_style=style)
    turned = rotations(replace(config, rope_base=3.0))[5]  # the same pairs by other angles
    disguise = 4.0 * turned.expand(2, 3, -1, -1)
    assert (disguise - torch.eye(12)).abs().max() > 1
    assert torch.allclose(rotary_part(disguise, config), disguise, rtol=0, atol=1e-14)
    other = replace(config, rope_style=STYLES[1 - STYLES.index(style)])
    assert (rotary_part(disguise, other) - disguise).abs().max() > 1  # the pairs are those of the style


@pytest.mark.parametrize("style", STYLES)
def test_its_share_is_1_for_the_identity_and_by_squares_else(style: str) -> None:
    config = replace(CONFIG, rope_style=style)
    identity, g = torch.eye(12), any_g(config)
    part = rotary_part(g, config)
    assert float(rotary_share(3.0 * identity, config)) == 1.0
    assert rotary_share(g - part, config).max() < 1e-30
    share = rotary_share(part / part.norm() + 2 * (g - part) / (g - part).norm(), config)
    assert share.shape == (2, 3)
    expected = part.square().sum((-2, -1)) / part.norm() ** 2
    rest = 4 * (g - part).square().sum((-2, -1)) / (g - part).norm() ** 2
    assert torch.allclose(share, expected / (expected + rest), rtol=1e-12, atol=0)
    assert rotary_share(0 * identity, config).isnan()
    many = torch.randn(400, 12, 12, generator=torch.Generator().manual_seed(0))
    assert abs(float(rotary_share(many, config).mean()) - 1 / 12) < 0.005


def test_it_passes_gradients_of_what_commutes_and_no_others() -> None:
    g = any_g(CONFIG).requires_grad_()
    weight = any_g(CONFIG).flip(1)
    (rotary_part(g, CONFIG) * weight).sum().backward()
    assert torch.allclose(g.grad, rotary_part(weight, CONFIG), rtol=0, atol=1e-14)
