"""What validation makes of its sums and of G; the sums themselves: test_mean.py."""

import math

import pytest
import torch

from pipeline.train.evaluate import order_parameters
from pipeline.train.g_structure import g_structure
from pldr_model.config import ModelConfig


def test_an_order_parameter_has_its_logarithm_beside_it_but_for_zero():
    found = order_parameters([[4e-10, 4.0], [0.0, 1.0], [0.0, 0.0], [9.0, 1.0]])
    assert math.isnan(found.pop("invariance/order_parameter_A_P"))
    assert found == {
        "invariance/order_parameter_A": pytest.approx(1e-5),
        "invariance/log10_order_parameter_A": pytest.approx(-5),
        "invariance/order_parameter_A_LM": 0.0,
        "invariance/order_parameter_G": 3.0,
        "invariance/log10_order_parameter_G": pytest.approx(math.log10(3)),
    }


def test_of_each_layers_g_its_share_of_plain_attention_and_its_rank_are_logged_but_for_zero_and_nan():
    config = ModelConfig(vocab_size=9, num_layers=5, num_heads=2, head_dim=4, context_length=8)
    eye = torch.eye(4)
    turned = torch.tensor([[0.6, -0.8, 0, 0], [0.8, 0.6, 0, 0], [0, 0, 2, 0], [0, 0, 0, 2]])  # commutes
    g = torch.zeros(5, 2, 4, 4)
    g[0] = torch.stack((eye, turned))
    g[1] = torch.stack((eye, torch.diag(torch.tensor([1.0, -1.0, 0, 0]))))  # the second is orthogonal to what commutes
    g[2, 0] = eye  # and a head that is zero
    g[3], g[3, 0, 0, 0] = eye, math.inf
    g[4] = torch.diag(torch.tensor([1.0, 0.1, 0.02, 0.0]))  # 0.02 squared is below 1e-3 of the energy
    found = g_structure(g.bfloat16().float(), config)
    assert found == {
        "invariance/rotary_share/layer-0": pytest.approx(1.0, abs=1e-4),
        "invariance/rank_G/layer-0": 4.0,
        "invariance/rotary_share/layer-1": 0.5,
        "invariance/rank_G/layer-1": 3.0,
        "invariance/rotary_share/layer-4": pytest.approx((1.1**2 + 0.02**2) / 2 / (1 + 0.1**2 + 0.02**2), rel=1e-2),
        "invariance/rank_G/layer-4": 2.0,
    }
