"""Certificates of schema 3 and 4: read as what they were, by their own thresholds, checks and words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.bundle.certificate.earlier import EARLIER
from pipeline.bundle.certificate.earlier_schema import upgraded
from pipeline.bundle.certificate.schema import read_certificate
from pipeline.bundle.certificate.verdict import judged, looser
from pipeline.errors import UserError
from pipeline.inference.logged_model import _certified
from pipeline.post.certificate.build import summary_lines
from pipeline.post.certificate.page import Evidence, certificate_page
from pipeline.post.package.card import model_card
from pldr_model.config import ModelConfig
from tests.helpers.evidence import edited


def read(certificate: dict[str, Any], folder: Path) -> dict[str, Any]:
    (folder / "certificate.json").write_text(json.dumps(certificate))
    return read_certificate(folder / "certificate.json")


@pytest.fixture
def of_schema_4(old_files: Path) -> dict[str, Any]:
    return upgraded(json.loads((old_files / "certificate" / "certificate.json").read_bytes()))


@pytest.mark.parametrize("folder", ["certificate", "failed"])
def test_a_certificate_of_schema_3_is_read_in_the_keys_of_schema_4_and_judged_again(
    old_files: Path, folder: str
) -> None:
    path = old_files / folder / "certificate.json"
    old = json.loads(path.read_bytes())
    found = read_certificate(path)
    assert (old["schema_version"], found["schema_version"]) == (3, 4)
    assert found["verdict"] == old["verdict"] == {"certificate": "certified", "failed": "failed"}[folder]
    for name in ("checks", "failed"):
        assert [entry["mend"] for entry in old[name]] == [entry["fix"] for entry in found[name]]
        assert not any("mend" in entry for entry in found[name])
    assert {k: found[k] for k in old.keys() - {"schema_version", "checks", "failed"}} == {
        k: old[k] for k in old.keys() - {"schema_version", "checks", "failed"}
    }
    assert read(found, old_files) == found  # a certificate of schema 4 now
    for changes in ({"verdict": "certified", "failed": []}, {"tier": "invariant"}, {"statement": "perfect"}):
        if any(old[key] != value for key, value in changes.items()):
            with pytest.raises(UserError, match="certificate.json"):
                read({**old, **changes}, old_files)
    with pytest.raises(UserError, match="fix|mend"):
        read({**found, "schema_version": 3}, old_files)
    with pytest.raises(UserError, match=r"measures\.coverage: Field required"):
        read({**found, "schema_version": 5}, old_files)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("checks.2.value", 0.5, "relative_deviation_g: value 0.5 does not follow"),
        ("checks.2.threshold", 1.0, "threshold 1.0 does not follow"),
        ("measures.relative_deviation_g", 0.8, "not the larger of fp32 and fp64"),
        ("measures.losses.zero", 0.0, "attention_effect_zero: value"),
        ("measures.leak.last_token.live_rms", 0.5, "not the largest of the four"),
        ("measures.order_parameter", {}, "measures.order_parameter: missing"),
        ("measures.worst_row", {}, "measures.worst_row: Extra inputs"),
        ("thresholds.max_worst_row_deviation", 1e-4, "thresholds: not the keys of a certificate"),
        ("thresholds.max_kl", 1e9, "post.max_kl: Input should be less than or equal to 0.1"),
        ("thresholds.min_attention_effect", 0.0, "post.min_attention_effect: Input should be greater than 0"),
        ("tier", "proven", "tier 'proven' does not follow"),
        ("statement", "G_LM may be cached", "statement"),
        ("prompts.documents", 3, "prompts.documents: Extra inputs"),
    ],
)
def test_an_edited_one_is_refused_by_its_own_rules(
    of_schema_4: dict[str, Any], tmp_path: Path, path: str, value: Any, message: str
) -> None:
    assert read(of_schema_4, tmp_path) == of_schema_4
    with pytest.raises(UserError) as caught:
        read(edited(of_schema_4, path, value), tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bounds_that_were_tightened_since_do_not_refuse_it(of_schema_4: dict[str, Any], tmp_path: Path) -> None:
    """min_attention_effect could be any number above 0; max_loss_difference of int8 weights any at all."""
    low = edited(of_schema_4, "thresholds.min_attention_effect", 1e-3)
    low = {**low, **judged(low)}
    found = read(low, tmp_path)
    assert "min_attention_effect 0.001 (default 0.05)" in found["statement"] == low["statement"]
    assert looser(found).count("min_attention_effect") == 1
    with pytest.raises(UserError, match="statement"):
        read({**low, "statement": of_schema_4["statement"]}, tmp_path)


def test_its_thresholds_are_frozen() -> None:
    """What a bound of today may be does not matter to it."""
    assert len(EARLIER.thresholds) == 10 and len(EARLIER.settings) == 5
    assert {name: EARLIER.config.model_fields[name].default for name in EARLIER.thresholds} == {
        **{"variant_above": 1e-2, "approximate_above": 1e-5, "invariant_above": 1e-6, "max_relative_deviation_g": 1e-5},
        **{"max_leak_gap": 1e-3, "max_leak_effect": 1e-4, "max_kl": 1e-4, "min_prompts": 100},
        **{"min_attention_effect": 0.05, "min_top1_agreement": 0.999},
    }


@pytest.mark.parametrize("folder", ["certificate", "failed"])
def test_whatever_shows_a_certificate_shows_it(old_files: Path, folder: str) -> None:
    found = read_certificate(old_files / folder / "certificate.json")
    lines = summary_lines(found)
    assert found["statement"] in lines[0] and not any("worst_row" in line for line in lines)
    size = found["model"]
    g_lm = torch.randn(size["num_layers"], size["num_heads"], size["head_dim"], size["head_dim"])
    page = certificate_page(found, Evidence(name="old", g_lm=g_lm, spread=g_lm * 0.1))
    assert "earlier schema" in page and "schema 4" in page
    config = ModelConfig(**{key: value for key, value in size.items() if key != "num_parameters"})
    card = model_card(found, config, certified=folder == "certificate", lineage={}, notes=())
    assert found["statement"] in card
    assert set(_certified(found)) <= {
        f"certificate/{key}" for key in ("relative_deviation_g", "loss_block", "loss_cached")
    }
