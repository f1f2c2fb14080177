"""G_LM as a function of rows is the model's own, and no row is farther out than an input can bring it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipeline.post.every_input.rows import RowFunction, learned_layers, normalized, poles, project


def test_G_of_the_rows_is_the_models_own(tiny: SimpleNamespace, text: torch.Tensor) -> None:
    model = tiny.make_model(gain=1.0).double()
    for plga in learned_layers(model):
        torch.nn.init.normal_(plga.density_norm.weight)
        torch.nn.init.normal_(plga.density_norm.bias)
    queries: list[torch.Tensor] = []
    for plga in learned_layers(model):
        plga.register_forward_pre_hook(lambda _, inputs: queries.append(inputs[0]))
    with torch.no_grad():
        g_LBHKK = model.compute_g(text[:3, :-1], padded=False)
        for layer, plga in enumerate(learned_layers(model)):
            rows = normalized(queries[layer].mT @ queries[layer], plga.density_norm)
            torch.testing.assert_close(project(rows), rows, rtol=1e-12, atol=1e-12)  # they lie in the ball
            function = RowFunction(plga)
            torch.testing.assert_close(function.energy_curvature(function.learned(rows)), g_LBHKK[layer])


@pytest.mark.parametrize("size", [2, 8, 64])
def test_rows_are_brought_onto_the_ball_and_stay_there(size: int) -> None:
    rows = torch.randn(50, size, dtype=torch.float64) * torch.logspace(-6, 6, 50, dtype=torch.float64).unsqueeze(1) + 3
    for inside in (project(rows), poles(size)):
        assert inside.mean(dim=-1).abs().max() < 1e-9 and inside.norm(dim=-1).max() <= size**0.5 * (1 + 1e-12)
        torch.testing.assert_close(project(inside), inside)
    assert torch.equal(poles(size).abs().argmax(dim=-1)[:size], torch.arange(size)) or size == 2
