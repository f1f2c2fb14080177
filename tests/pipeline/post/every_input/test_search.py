"""The search finds what no prompt shows, gives the same digits again, and is never below where it started."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from pipeline.post.every_input import search
from pipeline.post.every_input.rows import RowFunction, learned_layers, project
from pipeline.post.every_input.search import Seen, search_worst_rows
from pipeline.post.measure.worst import deviation_of_each
from pldr_model.model import PLDRModel


def rows_of(model: PLDRModel, count: int, *, seed: int = 0) -> Seen:
    """Random rows in the place of those of prompts."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    K, L, H = config.head_dim, config.num_layers, config.num_heads
    draw = lambda *shape: project(9 * torch.randn(shape, dtype=torch.float64, generator=generator))  # noqa: E731
    return Seen([draw(count, K) for _ in range(L)], draw(L, H, K, K), torch.eye(K).expand(L, H, K, K))


def g_of(model: PLDRModel, seen: Seen) -> torch.Tensor:
    """G_LM [L,H,K,K] of the sets of rows."""
    functions = [RowFunction(plga) for plga in learned_layers(model)]
    return torch.stack([f.energy_curvature(f.learned(seen.sets_LHKK[i : i + 1]))[0] for i, f in enumerate(functions)])


def with_a_bump(model: PLDRModel, direction_K: torch.Tensor, *, sharpness: float, height: float) -> PLDRModel:
    """A varies by 1e-6, and by `height` where a row of layer 1 points nearly as far as it can in this direction."""
    with torch.no_grad():
        for plga in learned_layers(model):
            for unit in plga.metric_learner:
                for glu in unit.glus:
                    glu.w3.weight.zero_()
                unit.norm.weight.fill_(1e-6)
                unit.norm.bias.normal_()
        first, last = learned_layers(model)[1].metric_learner
        last.norm.weight.fill_(1.0)
        (glu,) = last.glus
        for tensor in (glu.w12.weight, glu.w12.bias):
            tensor.zero_()
        hidden = glu.w12.weight.shape[0] // 2
        glu.w12.weight[0] = direction_K * sharpness * 1e6
        furthest = direction_K.norm() * len(direction_K) ** 0.5
        glu.w12.bias[0] = -(glu.w12.weight[0] @ first.norm.bias) - sharpness * 0.9 * furthest
        glu.w12.bias[hidden] = height / sharpness  # the value that the gate opens for
        glu.w3.weight[0, 0] = 1.0
    return model


def test_a_bump_that_the_starts_miss_is_found(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    direction = project(9 * torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))
    direction = direction / direction.norm()
    model = with_a_bump(tiny.make_model().double(), direction, sharpness=25.0, height=1.0)
    seen = rows_of(model, 40)
    near = (seen.rows[1] @ direction).abs() < 0.7 * 8**0.5
    seen = seen._replace(rows=[seen.rows[0], seen.rows[1][near]])
    g_LHKK = g_of(model, seen)
    function = RowFunction(learned_layers(model)[1])
    starts_MHKK = function.energy_curvature(function.learned(seen.rows[1])[:, None, None].expand(-1, 2, 8, 8))
    assert deviation_of_each(starts_MHKK.unsqueeze(1), g_LHKK[1:]).max() < 1e-4
    found = search_worst_rows(model, g_LHKK, seen, seed=0).record
    assert found["worst"]["layer"] == 1 and found["max"] > 1e-2
    assert max(found["per_head"][0]) < 1e-4
    monkeypatch.setattr(search, "STEPS", 0)  # what all starts show is far from it
    assert search_worst_rows(model, g_LHKK, seen, seed=0).record["max"] < found["max"] / 100


def test_the_same_seed_gives_the_same_digits(tiny: SimpleNamespace) -> None:
    model = tiny.make_model(gain=1.0)
    seen = rows_of(model, 5)
    one, again, other = (search_worst_rows(model, g_of(model, seen), seen, seed=seed) for seed in (3, 3, 4))
    assert one.record == again.record and torch.equal(one.query_LH, again.query_LH)
    assert one.record["per_head"] != other.record["per_head"] and other.record["seed"] == 4
    assert one.record["rows_from_prompts"] == 10 and one.record["starts"] == 9


def test_it_is_never_below_what_it_started_from(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_model(gain=1.0)
    seen, g_LHKK = rows_of(model, 7), g_of(model, rows_of(model, 1, seed=9))
    for steps in (0, 60):
        monkeypatch.setattr(search, "STEPS", steps)
        found = torch.tensor(search_worst_rows(model, g_LHKK, seen, seed=0).record["per_head"], dtype=torch.float64)
        for layer, plga in enumerate(learned_layers(model)):
            function = RowFunction(plga)
            repeated = seen.rows[layer][:, None, None].expand(-1, 2, 8, 8)
            sets = torch.cat([seen.sets_LHKK[layer].unsqueeze(0), repeated])
            starts_MLHKK = function.energy_curvature(function.learned(sets)).unsqueeze(1)
            starts_H = deviation_of_each(starts_MLHKK, g_LHKK[layer].unsqueeze(0)).amax(dim=(0, 1))
            assert (found[layer] >= starts_H * (1 - 1e-12)).all()
    assert (found > starts_H).all()


@pytest.mark.parametrize("gain", [1.0, 1e-9])
def test_ascent_climbs_at_any_size(tiny: SimpleNamespace, gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_model(gain=gain)
    seen = rows_of(model, 1)
    g_LHKK, found = g_of(model, seen), []
    for steps in (0, 60):
        monkeypatch.setattr(search, "STEPS", steps)
        found.append(search_worst_rows(model, g_LHKK, seen, seed=0).record["max"])
    assert found[1] > 1.02 * found[0] > 0


def test_a_constant_G_gives_round_off(tiny: SimpleNamespace) -> None:
    model = tiny.make_model(gain=0.0)
    seen = rows_of(model, 3)
    assert search_worst_rows(model, g_of(model, seen), seen, seed=0).record["max"] < 1e-15


def test_what_is_not_finite_is_infinite(tiny: SimpleNamespace) -> None:
    model = tiny.make_model(gain=1.0)
    seen = rows_of(model, 3)
    g_LHKK = g_of(model, seen)
    with torch.no_grad():
        learned_layers(model)[1].P[0] = 400.0
    found = search_worst_rows(model, g_LHKK, seen, seed=0).record
    assert found["per_head"][1][0] == math.inf == found["max"] and math.isfinite(found["per_head"][1][1])


def test_ranks_share_the_layers_and_find_the_same(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_model(gain=1.0)
    seen = rows_of(model, 3)
    g_LHKK = g_of(model, seen)
    alone, parts = search_worst_rows(model, g_LHKK, seen, seed=0).record["per_head"], []
    monkeypatch.setattr(search, "gathered", lambda mine: [mine])
    for rank in range(2):
        monkeypatch.setattr(search, "bounds", lambda count, rank=rank: (rank, rank + 1))
        parts += search_worst_rows(model, g_LHKK, seen, seed=0).record["per_head"]
    assert parts == alone
