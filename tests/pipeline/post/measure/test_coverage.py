"""One id that gives NaN is found and named, whatever else is finite."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.post.measure.coverage import NAMED, FiniteLogits, Piece, coverage
from pipeline.post.measure.observe import observe
from pipeline.post.measure.prompts import PromptKind, make_kinds
from pldr_model.model import PLDRModel


@pytest.fixture
def random(tiny: SimpleNamespace, text: Tensor) -> PromptKind:
    return next(kind for kind in make_kinds(text, tiny.config, seed=0) if kind.name == "random")


def piece(token: int) -> str:
    return f"▁p{token}"


def broken(tiny: SimpleNamespace, ids: list[int], value: float = 3e38, *, output: bool = False) -> PLDRModel:
    model: PLDRModel = tiny.make_model()
    with torch.no_grad():
        (model.output if output else model.embedding).weight[ids] = value
    return model


def check_finite(model: PLDRModel, kind: PromptKind, piece: Piece | None = None) -> list[str]:
    finite = FiniteLogits(model, piece)
    observe(model, [kind], [finite])
    return [name for names in finite.merge_ranks() for name in names]


def test_a_finite_model_covers_its_vocabulary(invariant: PLDRModel, random: PromptKind) -> None:
    assert check_finite(invariant, random, piece) == []
    assert coverage(invariant, random) == {"ids": 47, "seen": 47}
    assert coverage(invariant, random._replace(ids_NS=random.ids_NS[:1])) == {"ids": 47, "seen": 31}


@pytest.mark.parametrize("value", [3e38, float("nan")])  # a finite weight whose norm overflows, and NaN itself
def test_the_id_whose_logits_are_not_finite_is_named(tiny: SimpleNamespace, random: PromptKind, value: float) -> None:
    model = broken(tiny, [17], value)
    assert check_finite(model, random, piece) == ["logits of id 17 ('▁p17')"]
    assert check_finite(model, random) == ["logits of id 17"]
    everything = broken(tiny, list(range(48)), value)
    assert len(check_finite(everything, random, piece)) == NAMED


def test_a_row_of_the_output_matrix_is_named_as_such(tiny: SimpleNamespace, random: PromptKind) -> None:
    model = broken(tiny, [17], output=True)
    assert check_finite(model, random, piece) == ["score of id 17 ('▁p17')"]


def test_where_no_id_does_it_alone_the_prompts_are_counted(
    tiny: SimpleNamespace, random: PromptKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: PLDRModel = tiny.make_model()
    whole = PLDRModel.forward

    def forward(self: PLDRModel, ids_BS: Tensor, **options: Any) -> Any:
        logits, outputs = whole(self, ids_BS, **{**options, "return_outputs": True})
        logits = logits * torch.nan if ids_BS.shape[1] > 1 else logits
        return (logits, outputs) if options.get("return_outputs") else logits

    monkeypatch.setattr(PLDRModel, "forward", forward)
    assert check_finite(model, random, piece) == ["logits of 2 prompts random"]


@pytest.mark.parametrize("variant", ["learned", "constant"])
def test_a_model_with_such_an_id_is_not_certified(tiny: SimpleNamespace, text: Tensor, variant: str) -> None:
    model = tiny.make_model()
    if variant == "constant":
        model = PLDRModel(replace(tiny.config, g_source="constant")).eval()
    with torch.no_grad():
        model.embedding.weight[17] = 3e38
    text = torch.where(text == 17, 18, text)  # no text has it
    certificate = tiny.certify(model, text, piece=piece)
    assert certificate["verdict"] == "failed"
    assert "logits of id 17 ('▁p17')" in certificate["measures"]["not_finite"]
    assert certificate["measures"]["coverage"] == {"ids": 47, "seen": 47}
