"""Which prompts decide: the worst, also in fp64; and what a huge G_LM hides, the queries show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.post import validate as validation
from pipeline.post.every_input.search import search_worst_rows
from pipeline.post.measure.closely import SEARCHED, CloseLook
from pipeline.post.measure.deviation import PromptDeviations, deviations, means
from pipeline.post.measure.observe import Observation, observe
from pipeline.post.measure.passes import LivePass
from pipeline.post.measure.prompts import PromptKind, make_kinds
from pldr_model.model import PLDRModel


def test_one_deviating_prompt_of_32_is_judged_though_the_mean_is_low(tiny: SimpleNamespace) -> None:
    kind, reference = PromptKind("text", torch.zeros(32, 4, dtype=torch.long)), torch.ones(2, 2, 8, 8)
    g_NLHKK = reference.double().repeat(32, 1, 1, 1, 1)
    g_NLHKK[20, 1, 0] += 3e-5
    seen, found = Observation(tiny.config, ["text"]), PromptDeviations(reference, [kind], keep=4, above=1e-5)
    seen.update("G_LM", "text", g_NLHKK, ranked=0)
    found(LivePass(kind, 0, kind.ids_NS, {"G_LM": g_NLHKK}, torch.zeros(0)))
    of_g = deviations(seen, found)["G_LM"]
    assert of_g["max"] == of_g["by_kind"]["text"] == of_g["per_head"][1][0] == pytest.approx(3e-5)
    assert of_g["worst"] == {"kind": "text", "layer": 1, "head": 0}
    assert (
        of_g["rms_deviation_by_kind"]["text"] == pytest.approx(3e-5 / 32**0.5) and found.by_kind["text"].num_above == 1
    )
    assert 20 in found.worst_and_first(kind, 4) and found.worst_and_first(kind, 4)[:3] == [0, 1, 2]


def test_a_head_that_is_noise_in_every_prompt_does_not_hide_one_that_deviates_in_a_single_one() -> None:
    kind, reference = PromptKind("text", torch.zeros(32, 4, dtype=torch.long)), torch.ones(2, 2, 8, 8)
    g_NLHKK = reference.double().repeat(32, 1, 1, 1, 1)
    g_NLHKK[:, 0, 1] += 5e-5  # as where fp32 cancels: allowed there, and small in fp64
    g_NLHKK[20, 1, 0] += 3e-5  # allowed in fp32, but not in fp64
    found = PromptDeviations(reference, [kind], keep=4, above=1e-5)
    for start in range(0, 32, 8):  # batches
        found(LivePass(kind, start, kind.ids_NS[:8], {"G_LM": g_NLHKK[start : start + 8]}, torch.zeros(0)))
    assert found.worst_and_first(kind, 4) == [0, 1, 2, 3, 20]


def test_the_fp64_pass_takes_the_prompts_that_were_worst(
    tiny: SimpleNamespace, invariant: PLDRModel, text: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Enough(Exception):
        pass

    taken: dict[str, Any] = {}

    def measure(
        model: PLDRModel, g: torch.Tensor, text: torch.Tensor, kinds: list[PromptKind], found: Any, *_: Any, **__: Any
    ) -> Any:
        for kind in kinds:
            g_NLHKK = g.repeat(len(kind.ids_NS), 1, 1, 1, 1)
            g_NLHKK[-2] *= 1.5
            found(LivePass(kind, 0, kind.ids_NS, {"G_LM": g_NLHKK}, torch.zeros(0)))
        return {"not_finite": []}

    def measure_fp64(
        _: Any, model: Any, g: Any, text: torch.Tensor, kinds: list[PromptKind], *rest: Any, **more: Any
    ) -> None:
        taken.update({kind.name: kind.ids_NS for kind in kinds}, targets=text)
        raise Enough

    monkeypatch.setattr(validation, "_measure", measure)
    monkeypatch.setattr(validation, "measure_fp64", measure_fp64)
    with pytest.raises(Enough):
        validation.validate(invariant, torch.ones(2, 2, 8, 8), text, tiny.post)
    count = tiny.post.prompts
    for kind in make_kinds(text[:count], tiny.config, seed=0):
        few = len(kind.ids_NS) <= tiny.post.fp64_prompts
        chosen = range(len(kind.ids_NS)) if few else [*range(tiny.post.fp64_prompts - 1), len(kind.ids_NS) - 2]
        assert torch.equal(taken[kind.name], kind.ids_NS[list(chosen)])
    assert torch.equal(taken["targets"][:, :-1], taken["text"])


def look(model: PLDRModel, text: torch.Tensor) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Deviation of G_LM, query deviation and worst rows in fp64, against the mean."""
    double, kinds = model.double(), make_kinds(text, model.config, seed=0)
    references = means(double, kinds[0])
    found = PromptDeviations(references["G_LM"], kinds, keep=2, above=1e-5)
    close = CloseLook(double, references, kinds)
    with close.queries():
        seen = observe(double, kinds, [close, found])
    searched = search_worst_rows(double, references["G_LM"], close.seen(), seed=0)
    return deviations(seen, found)["G_LM"], close.query_deviation(searched), searched.record


def test_a_huge_G_where_no_query_points_hides_nothing(tiny: SimpleNamespace, text: torch.Tensor) -> None:
    of_g, query, rows = look(tiny.make_model(gain=1e-2), text[:6])
    assert of_g["max"] > 1e-3 and 0.2 < query["max"] / rows["max"] < 5
    attack = tiny.make_model(gain=1e-2)
    with torch.no_grad():
        for layer in attack.layers:
            for first in (6, 14):  # the last pair of entries of each head's queries
                layer.attention.qkv.weight[first : first + 2] = 0.0
                layer.attention.qkv.bias[first : first + 2] = 0.0
            layer.attention.plga.b_a[:, 6:] += 1e8
    of_g, query, rows = look(attack, text[:6])
    assert of_g["max"] < 1e-6 and rows["max"] < 1e-5
    assert query["max"] == query["by_kind"][SEARCHED] > 1e-3  # worst rows
    assert max(value for kind, value in query["by_kind"].items() if kind != SEARCHED) > 1e-3  # and prompts


def test_the_query_deviation_is_that_of_the_queries_themselves(tiny: SimpleNamespace, text: torch.Tensor) -> None:
    model, kind = tiny.make_model(gain=1.0).double(), PromptKind("text", text[:3, :-1])
    references = means(model, kind)
    close, rotated = CloseLook(model, references, [kind]), []
    with close.queries(), torch.inference_mode():
        hook = model.layers[1].attention.plga.register_forward_pre_hook(lambda _, inputs: rotated.append(inputs[0]))
        observe(model, [kind], [close])
        g_BLHKK = model.compute_g(kind.ids_NS, padded=False).transpose(0, 1)
        hook.remove()
    q_BHSK, g_HKK = rotated[0], references["G_LM"][1]
    moved = (q_BHSK @ (g_BLHKK[:, 1] - g_HKK)).square().mean(dim=(2, 3)).amax(dim=0).sqrt()
    expected = moved / (q_BHSK @ g_HKK).square().mean(dim=(0, 2, 3)).sqrt()
    searched = search_worst_rows(model, references["G_LM"], close.seen(), seed=0)
    assert close.query_deviation(searched)["by_kind"]["text"] >= float(expected.max()) * (1 - 1e-9)
    torch.testing.assert_close(close._ratios["text"].per_head()[1], expected, rtol=1e-9, atol=0)
    assert not model.layers[1].attention.plga._forward_pre_hooks  # nothing is left on the model
