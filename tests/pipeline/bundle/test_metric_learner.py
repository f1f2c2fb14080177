"""A bundle with its metric learner: the live model again, bit for bit, and no other one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.bundle.format import FILES, METRIC_LEARNER
from pipeline.bundle.metric_learner import assemble, metric_learner_tensors, model_of, relative_deviation
from pipeline.bundle.read import BundleParts, read_bundle, verify_bundle
from pipeline.config.post import PostConfig
from pipeline.errors import UserError
from pipeline.io.storage import MANIFEST
from pipeline.io.tensors import serialize
from pldr_model.model import PLDRModel
from tests.helpers.bundles import measured, refused, reseal
from tests.helpers.models import make_model

Make = Callable[..., Path]


def live(parts: BundleParts) -> PLDRModel:
    """The live model of a bundle."""
    assert parts.metric_learner is not None
    return assemble(model_of(parts.certificate, where=Path("x")), parts.weights, parts.metric_learner)


def test_the_live_model_comes_back_bit_for_bit(make_bundle: Make, invariant: PLDRModel, text: torch.Tensor) -> None:
    bundle = make_bundle(with_metric_learner=True)
    result = verify_bundle(bundle)
    assert result["certified"] is True and result["metric_learner"] is True and result["files"] == len(FILES) + 2
    parts = read_bundle(bundle)
    model = live(parts)
    state = invariant.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(text[:2, :-1]), invariant(text[:2, :-1]))
    assert model.embedding.weight.data_ptr() == parts.weights["embedding.weight"].data_ptr()  # no second copy in memory
    assert METRIC_LEARNER in (bundle / "README.md").read_text()


def test_without_it_a_bundle_is_what_it_was(make_bundle: Make) -> None:
    """Byte for byte in all files but the card and the manifest, which name the file."""
    without, with_it = make_bundle("one"), make_bundle("two", with_metric_learner=True)
    assert sorted(p.name for p in without.iterdir()) == sorted((*FILES, MANIFEST))
    assert verify_bundle(without)["metric_learner"] is False and read_bundle(without).metric_learner is None
    for name in set(FILES) - {"README.md"}:
        assert (without / name).read_bytes() == (with_it / name).read_bytes(), name
    assert METRIC_LEARNER not in (without / "README.md").read_text() + (without / MANIFEST).read_text()


def test_a_file_that_is_not_listed_or_listed_and_missing_is_refused(make_bundle: Make) -> None:
    bundle = make_bundle(with_metric_learner=True)
    original = (bundle / METRIC_LEARNER).read_bytes()
    (bundle / METRIC_LEARNER).unlink()
    assert METRIC_LEARNER in refused(bundle)
    (bundle / METRIC_LEARNER).write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    assert METRIC_LEARNER in refused(bundle)
    plain = make_bundle("plain")
    (plain / METRIC_LEARNER).write_bytes(original)
    assert f"{METRIC_LEARNER}: not a file of this bundle" in refused(plain)
    reseal(plain)
    assert verify_bundle(plain)["metric_learner"] is True


@pytest.mark.parametrize("change", ["another model", "another shape", "a weight more", "NaN"])
def test_a_metric_learner_of_another_model_is_refused(make_bundle: Make, invariant: PLDRModel, change: str) -> None:
    """However well the manifest is resealed: by it G_LM would be another one than the certified."""
    bundle = make_bundle(with_metric_learner=True)
    tensors = metric_learner_tensors(invariant)
    name = "layers.1.attention.plga.b_a"
    message = f"{name} "
    if change == "another model":
        tensors, message = metric_learner_tensors(make_model(seed=1)), "G_LM by it is another one than the certified"
    elif change == "another shape":
        tensors[name] = tensors[name][:1]
    elif change == "NaN":
        tensors[name] = torch.full_like(tensors[name], float("nan"))
    else:
        tensors["output.weight"], message = invariant.output.weight, "output.weight is not part"
    (bundle / METRIC_LEARNER).write_bytes(serialize(tensors))
    reseal(bundle)
    assert f"{METRIC_LEARNER}: {message}" in refused(bundle)


def test_a_model_that_is_not_invariant_keeps_its_metric_learner_too(
    make_bundle: Make, tiny: SimpleNamespace, text: torch.Tensor
) -> None:
    model = tiny.make_model(gain=1.0)
    certificate = tiny.certify(model, text)
    bundle = make_bundle(model=model, certificate=certificate, uncertified=True, with_metric_learner=True)
    parts = read_bundle(bundle)
    assert torch.equal(live(parts).compute_g(text[:1]), model.compute_g(text[:1]))
    assert float(relative_deviation(live(parts).compute_g(text[:1, :3])[:, 0], parts.g_lm).max()) > 1e-2


def test_only_the_certified_fp32_weights_have_a_live_model(
    make_bundle: Make, invariant: PLDRModel, text: torch.Tensor
) -> None:
    packed = measured(invariant, text, "int8")
    with pytest.raises(
        UserError, match=r"certified weights, which are fp32, and these are int8; use post\.weight_format=fp32"
    ):
        make_bundle(packed=packed, with_metric_learner=True)
    with pytest.raises(ValueError, match="with_metric_learner needs weight_format fp32, not bf16"):
        PostConfig(with_metric_learner=True, weight_format="bf16")
    bundle = make_bundle(packed=packed)
    (bundle / METRIC_LEARNER).write_bytes(serialize(metric_learner_tensors(invariant)))
    reseal(bundle)
    assert f"{METRIC_LEARNER}: the live model has the certified weights, which are fp32, and these are int8" in refused(
        bundle
    )


def test_a_model_of_a_constant_G_has_no_metric_learner(make_bundle: Make, tiny: SimpleNamespace, text: Any) -> None:
    torch.manual_seed(0)
    model = PLDRModel(replace(tiny.config, g_source="constant")).eval()
    with pytest.raises(UserError, match="this model has none .its g_source is constant"):
        make_bundle(model=model, certificate=tiny.certify(model, text), uncertified=True, with_metric_learner=True)
    bundle = make_bundle("plain", model=model, certificate=tiny.certify(model, text), uncertified=True)
    (bundle / METRIC_LEARNER).write_bytes(serialize(metric_learner_tensors(tiny.make_model())))
    reseal(bundle)
    assert "its certificate is of a model without a metric learner" in refused(bundle)
