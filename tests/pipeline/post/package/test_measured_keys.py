"""Low-rank keys in a bundle: what they save and cost is measured, written, judged, and what the bundle then decodes with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pipeline.bundle.read import verify_bundle
from pipeline.errors import UserError
from pipeline.inference.source import open_model
from pipeline.post.extract import extract_g
from pldr_model.decode.low_rank import truncate_g
from pldr_model.generation import generate
from pldr_model.model import PLDRModel, to_constant_g
from tests.helpers.bundles import measured, measured_keys

Make = Callable[..., Path]
RANKS = [[6, 7], [8, 6]]


@torch.inference_mode()
def test_a_bundle_with_low_rank_keys(make_bundle: Make, invariant: PLDRModel, text: torch.Tensor) -> None:
    section = measured_keys(invariant, text, RANKS)
    bundle = make_bundle(key_rank_section=section)
    result = verify_bundle(bundle)
    assert result["certified"] is True and result["numbers_per_key"] == 6.75
    assert json.loads((bundle / "config.json").read_text())["key_ranks"] == RANKS
    written = json.loads((bundle / "certificate.json").read_text())
    assert written["key_rank"] == section and section["by"] == "ranks"
    assert "Keys hold 6.75 of 8 numbers on average" in written["statement"]
    assert "Keys hold 6.75 of 8 numbers" in (bundle / "README.md").read_text()

    g_LHKK = extract_g(invariant, text[:, :-1], "mean").g_lm
    low = to_constant_g(invariant, truncate_g(g_LHKK, torch.tensor(RANKS))).eval()
    losses = [
        F.cross_entropy(model(text[:16, :-1]).double().flatten(0, 1), text[:16, 1:].flatten()).item()
        for model in (low, to_constant_g(invariant, g_LHKK).eval())
    ]
    assert section["loss"] == pytest.approx(losses[0], rel=1e-6)
    assert section["loss_full"] == pytest.approx(losses[1], rel=1e-6)
    assert section["loss_difference"] == pytest.approx(losses[0] - losses[1], abs=1e-6) and section["kl"] > 1e-6
    prompts = text[:4, :15].tolist()
    full, few = (generate(model, prompts, max_new_tokens=12) for model in (to_constant_g(invariant, g_LHKK), low))
    assert section["greedy_identical"] == sum(a == b for a, b in zip(full, few, strict=True)) / 4
    assert section["greedy_tokens"] == 48

    opened = open_model(bundle)
    assert opened.g_lm.equal(g_LHKK)
    ids_BS = text[:3, :-1]
    cache = opened.decoder.new_cache(batch_size=3, capacity=ids_BS.shape[1])
    logits_BSV = opened.decoder.logits(opened.decoder.read(ids_BS, cache))
    assert (logits_BSV - low(ids_BS)).abs().max() < 2e-4
    assert (opened.model(ids_BS) - low(ids_BS)).abs().max() < 2e-4
    assert cache.nbytes == section["bytes_per_token"] * 3 * ids_BS.shape[1] < section["bytes_per_token_full"] * 3 * 31


def test_they_are_measured_with_the_weights_that_are_stored(
    make_bundle: Make, invariant: PLDRModel, text: torch.Tensor
) -> None:
    packed = measured(invariant, text, "int8")
    with pytest.raises(UserError, match="no measurement of these key ranks and weights"):
        make_bundle(packed=packed, key_rank_section=measured_keys(invariant, text, RANKS))
    section = {**measured_keys(invariant, text, RANKS), "sha256": packed.section["sha256"]}
    bundle = make_bundle(packed=packed, key_rank_section=section)
    assert verify_bundle(bundle)["certified"] is True
    opened = open_model(bundle)
    assert opened.decoder.new_cache(batch_size=1, capacity=1).nbytes == section["bytes_per_token"]


def test_ranks_that_cost_too_much_are_not_certified(
    make_bundle: Make, invariant: PLDRModel, text: torch.Tensor
) -> None:
    section = measured_keys(invariant, text, [[1, 1], [1, 1]], allowed=1e-3)
    assert section["passed"] is False
    with pytest.raises(UserError, match=r"Keys hold 1 of 8 numbers .* too much; give post.key_rank more") as caught:
        make_bundle(key_rank_section=section)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    bundle = make_bundle(key_rank_section=section, uncertified=True)
    assert verify_bundle(bundle)["certified"] is False
