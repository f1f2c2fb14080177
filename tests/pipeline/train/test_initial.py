"""A run that begins with another model's weights: which ones fit, and what is said of those that do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.bundle.weights import save_weights
from pipeline.config.load import parse_config
from pipeline.config.run import RunConfig
from pipeline.errors import UserError
from pipeline.train.initial import initial_weights, require_fitting
from pldr_model.model import PLDRModel
from tests.helpers.models import CONFIG

SOURCE = {"tokenizer_sha256": "a" * 64, "checkpoint": "step-000007"}
LONGER = {"context_length": 64, "rope_scaling": {"type": "linear", "factor": 2}}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with consolidated weights."""
    run = tmp_path_factory.mktemp("earlier")
    save_weights(PLDRModel(CONFIG).state_dict(), CONFIG, run / "weights", source=SOURCE)
    return run


def longer(init_from: Path, **changes: Any) -> RunConfig:
    model = {**CONFIG.to_dict(), **LONGER, **changes}
    tree = {"name": "t", "run_dir": "r", "data": {"sources": [{"url": "x"}]}, "model": model}
    return parse_config({**tree, "train": {"init_from": str(init_from)}}, where="t.yaml")


def test_weights_fit_a_longer_context(earlier: Path) -> None:
    for folder in (earlier, earlier / "weights"):
        assert require_fitting(longer(folder), tokenizer_sha256="a" * 64) == SOURCE
        weights = initial_weights(str(folder))
    model = PLDRModel(longer(earlier).model)
    model.load_state_dict(weights)
    same = PLDRModel(CONFIG)
    same.load_state_dict(weights)
    ids = torch.randint(4, CONFIG.vocab_size, (1, 20))
    assert not torch.allclose(model(ids), same(ids))  # other positions


@pytest.mark.parametrize(
    ("changes", "sha256", "message"),
    [
        ({"num_layers": 3}, "a", "its num_layers is 2, model.num_layers is 3; only context_length, rope_base"),
        ({"rope_style": "half"}, "a", "its rope_style is interleaved, model.rope_style is half"),
        ({"g_source": "identity"}, "a", "its g_source is learned, model.g_source is identity"),
        ({}, "b", "trained with another tokenizer; set tokenizer.model"),
    ],
)
def test_other_weights_are_refused(earlier: Path, changes: dict[str, Any], sha256: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        require_fitting(longer(earlier, **changes), tokenizer_sha256=sha256 * 64)
    assert message in str(caught.value) and str(earlier) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no consolidated weights"):
        require_fitting(longer(tmp_path), tokenizer_sha256="a" * 64)


def test_a_constant_g_is_the_configurations(tmp_path: Path) -> None:
    config = replace(CONFIG, g_source="random", g_seed=1)
    model = PLDRModel(config)
    save_weights(model.state_dict(), config, tmp_path / "weights", source={})
    other = PLDRModel(replace(config, g_seed=2))
    missing = other.load_state_dict(initial_weights(str(tmp_path)), strict=False).missing_keys
    assert missing == ["g_lm"] and not torch.equal(other.constant_g(), model.constant_g())
