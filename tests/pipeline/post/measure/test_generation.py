"""Generated text as evidence."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.post.measure.generation import greedy_agreement, order_parameters, samples
from pldr_model.config import ModelConfig
from pldr_model.model import PLDRModel

CONFIG = ModelConfig(vocab_size=40, num_layers=1, num_heads=2, head_dim=8, context_length=24, A_dff=8, num_reslayerA=1)


@pytest.mark.parametrize("where", ["prompt", "text"])
def test_logits_that_are_not_finite_are_no_agreement(where: str) -> None:
    """Live and cached, NaN chooses the same token: that both do says nothing."""
    torch.manual_seed(0)
    model = PLDRModel(CONFIG)
    text_NT = torch.randint(4, 39, (6, 25))
    g_LHKK = model.compute_g(text_NT[:1, :-1]).mean(dim=1).detach()
    num = {"num_tokens": 8, "num_prompts": 6, "seed": 0}
    assert 0 <= greedy_agreement(model, g_LHKK, text_NT, **num)["per_decision"] <= 1
    with torch.no_grad():
        model.embedding.weight[39] = 3e38
        if where == "text":
            model.output.bias[39] = 1e4
        else:
            text_NT[2, 1] = 39
    found = greedy_agreement(model, g_LHKK, text_NT, **num)
    assert math.isnan(found["per_decision"]) and math.isnan(found["identical"]) and found["num_prompts"] == 6
    order_parameters(model, text_NT, **num)
    shown = samples(model, g_LHKK, [row[:5].tolist() for row in text_NT], num_tokens=4, seed=0)
    assert {len(one.cached) for one in shown} == {len(one.live) for one in shown} == {4}
