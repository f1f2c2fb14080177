"""G_LM of a model: mean or first, its spread, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.bundle.extracted import load_g, save_g
from pipeline.errors import UserError
from pipeline.post.extract import extract_g


def test_mean_first_and_spread_are_those_of_all_prompts_at_once(tiny: SimpleNamespace, text: torch.Tensor) -> None:
    model = tiny.make_model(gain=1.0)
    with torch.inference_mode():
        live = model.compute_g(text[:, :-1]).double()
    mean, first = (extract_g(model, text[:, :-1], how) for how in ("mean", "first"))
    torch.testing.assert_close(mean.g_lm, live.mean(1).float())
    torch.testing.assert_close(first.g_lm, live[:, 0].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean.spread, live.std(1, correction=0).float(), rtol=1e-4, atol=1e-5)
    assert mean.record["num_prompts"] == len(text) and mean.record["max_relative_spread"] > 0.1


def test_an_invariant_model_has_one_G_however_it_is_extracted(tiny: SimpleNamespace, text: torch.Tensor) -> None:
    model = tiny.make_model()
    mean, first = (extract_g(model, text[:, :-1], how) for how in ("mean", "first"))
    torch.testing.assert_close(mean.g_lm, first.g_lm)
    assert mean.record["max_relative_spread"] < 1e-7


def test_saved_and_loaded(tiny: SimpleNamespace, text: torch.Tensor, tmp_path: Path) -> None:
    model = tiny.make_model()
    extracted = extract_g(model, text[:, :-1], "mean")
    record = save_g(extracted, tmp_path / "g_lm")
    save_g(extracted, tmp_path / "again")
    loaded = load_g(tmp_path / "g_lm", model.config)
    assert torch.equal(loaded.g_lm, extracted.g_lm) and torch.equal(loaded.spread, extracted.spread)
    assert loaded.record == record
    for name in ("g_lm.safetensors", "spread.safetensors", "extract.json"):
        assert (tmp_path / "g_lm" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    for name in ("g_lm.safetensors", "spread.safetensors"):
        data = bytearray((tmp_path / "g_lm" / name).read_bytes())
        (tmp_path / "g_lm" / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(UserError, match=rf"{name}: sha256 differs"):
            load_g(tmp_path / "g_lm", model.config)
        (tmp_path / "g_lm" / name).write_bytes(data)


def test_no_prompts_and_a_G_that_is_not_finite_are_errors(tiny: SimpleNamespace, text: torch.Tensor) -> None:
    model = tiny.make_model()
    with pytest.raises(UserError, match="no held-out prompts"):
        extract_g(model, text[:0, :-1], "mean")
    with torch.no_grad():
        model.layers[1].attention.plga.a[1] = math.nan
    with pytest.raises(UserError, match="layer 1, head 1 is not finite"):
        extract_g(model, text[:, :-1], "mean")
