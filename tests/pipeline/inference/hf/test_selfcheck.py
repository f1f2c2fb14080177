"""The self-check finds what differs, and an export that differs gets no name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.inference.hf import export as export_module
from pipeline.inference.hf.expectation import EMBEDDING, EXACT, expect
from pipeline.inference.hf.export import export_hf
from pipeline.inference.hf.selfcheck import _problem, check_export, measure
from pipeline.inference.hf.texts import checked_texts
from pipeline.inference.opened import OpenModel
from tests.helpers.exports import refused

pytest.importorskip("transformers")


def test_the_check_counts_what_differs_and_judges_it(written: Path, opened: OpenModel) -> None:
    expected, logits = expect(opened.model, opened.tokenizer, seed="x", texts=checked_texts(None)[0])
    stored = sum(tensor.nbytes for tensor in load_file(written / "model.safetensors").values())
    values = {**expected.to_dict(), "rounded": False, "stored_bytes": stored}
    right = measure(str(written), values, logits)
    assert _problem(right) is None and right["tokenizer"]["texts"] > 1000

    # Vectors of tokens that are in no prompt.
    assert _problem({**right, "embedding": False}) == "vectors of tokens"
    swapped = {**logits, EMBEDDING: logits[EMBEDDING].roll(1, 0)}
    assert right["embedding"] and not measure(str(written), values, swapped)["embedding"]

    # Weights that were unpacked.
    assert right["held_bytes"] == stored
    assert "bytes in memory" in str(_problem({**right, "held_bytes": 2 * stored}))

    # What decoding does by default, and the other attention.
    assert right["settings"] == [] and right["eager"] <= 1e-5
    assert "attention 'eager' by 0.1" in str(_problem({**right, "eager": 0.1}))
    other = {**values, "settings": {**values["settings"], "eos_token_id": [3, 3, 2], "padding_side": "right"}}
    found = measure(str(written), other, logits)
    assert found["settings"] == ["eos_token_id", "padding_side"] and "eos_token_id, padding_side" in str(
        _problem(found)
    )

    logits = {name: tensor.clone() for name, tensor in logits.items()}
    logits["3"][0, 0] += 1
    logits[EXACT][0, 0] += 1e-5
    values["greedy"][7][-1] ^= 1
    allowed = len(values["texts"]) // 1000
    for ids in values["ids"][: allowed + 1]:
        ids.append(9)
    wrong = measure(str(written), values, logits)
    assert wrong["logits"]["difference"] == pytest.approx(1, abs=1e-3)
    assert (
        wrong["greedy"]["equal"] == 19
        and wrong["tokenizer"]["other_ids"] == right["tokenizer"]["other_ids"] + allowed + 1
    )
    assert right["exact"] < 1e-10 and wrong["exact"] == pytest.approx(1e-5, rel=1e-3)
    for part, message in (
        ("logits", "logits by 1"),
        ("exact", "in fp64 by 1e-05"),
        ("greedy", "1 of 20 prompts"),
        ("tokenizer", "the tokenizer on"),
    ):
        assert message in str(_problem({**right, part: wrong[part]}))
    tie = {**wrong["greedy"], "gap": 1e-5}
    assert wrong["greedy"]["gap"] > 0.01 and _problem({**right, "greedy": tie}) is None
    # A model that fp32 itself changes more may differ by twice that.
    assert _problem({**right, "logits": {**right["logits"], "difference": 0.02}, "rounding": 0.01}) is None
    assert _problem({**right, "logits": {**right["logits"], "difference": 0.02}, "rounding": 0.009}) is not None
    assert _problem({**right, "tokenizer": {**right["tokenizer"], "other_ids": allowed, "other_text": allowed}}) is None

    logits["3"][0, 0] = float("nan")
    assert "not finite" in str(_problem(measure(str(written), values, logits)))


@pytest.mark.slow
def test_an_export_that_differs_is_not_published(
    opened: OpenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bias of what is written is wrong; nothing else is touched, and the fresh process finds it."""
    write_shards = export_module.write_shards

    def wrong(tensors: dict[str, torch.Tensor], *arguments: Any, **keywords: Any) -> None:
        write_shards({**tensors, "lm_head.bias": tensors["lm_head.bias"] + 1e-3}, *arguments, **keywords)

    monkeypatch.setattr(export_module, "write_shards", wrong)
    message = refused(lambda: export_hf(opened, tmp_path / "out" / "wrong"))
    assert "the export differs from the model: logits by 0.001" in message
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_an_export_whose_code_fails_is_not_published(written: Path, opened: OpenModel, export: Path) -> None:
    (export / "modeling_pldr.py").write_text("raise RuntimeError('broken')\n")
    expected, logits = expect(opened.model, opened.tokenizer, seed="x", texts=["a"])
    message = refused(lambda: check_export(export, expected, logits, stored_bytes=1))
    assert "does not work in a fresh process" in message and "broken" in message


@pytest.mark.slow
def test_a_live_export_of_a_model_that_is_not_invariant_is_checked(
    opened: OpenModel, tiny: Any, tmp_path: Path
) -> None:
    learned = replace(opened, live=tiny.make_model(gain=1.0))
    check = export_hf(learned, tmp_path / "out", live=True)["selfcheck"]
    assert check["greedy"]["equal"] == 20 and check["exact"] < 1e-10
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
