"""The certificate's schema: documented, kept, and not deceived by an edit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.bundle.certificate.schema import Certificate, read_certificate
from pipeline.errors import UserError


def schema_text() -> str:
    return json.dumps(Certificate.model_json_schema(by_alias=True), indent=1, sort_keys=True) + "\n"


def test_the_written_schema_is_the_one_in_force(repository: Path) -> None:
    """After a change: `python tests/pipeline/bundle/certificate/test_schema.py` writes it again; raise SCHEMA_VERSION."""
    assert (repository / "docs" / "certificate.schema.json").read_text() == schema_text()


def read(certificate: dict[str, Any], folder: Path) -> dict[str, Any]:
    (folder / "certificate.json").write_text(json.dumps(certificate))
    return read_certificate(folder / "certificate.json")


def test_a_certificate_is_read_back(certificate: dict[str, Any], tmp_path: Path) -> None:
    assert read(certificate, tmp_path) == certificate
    assert read({**certificate, "packaged": "certified"}, tmp_path)["packaged"] == "certified"


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


def edited(certificate: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(certificate)
    node: Any = changed
    *parents, last = path.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 2, "schema_version 2, this program reads 3 and 4"),
        ("schema_version", 3, "checks.0.fix: Field required"),
        ("schema_version", 5, "schema_version 5, this program reads 3 and 4"),
        ("schema_version", None, "schema_version None"),
        ("verdict", "failed", "does not follow from the checks"),
        ("verdict", "excellent", "verdict"),
        ("checks.2.value", 0.5, "relative_deviation_g: value 0.5 does not follow from the measures"),
        ("checks.2.value", None, "relative_deviation_g"),
        ("checks.2.passed", False, "relative_deviation_g"),
        ("checks", [], "checks"),
        ("failed", [{"measure": "kl", "value": 1.0, "threshold": 0.0, "fix": ""}], "`failed` does not name"),
        ("files", {"model.safetensors": "0" * 64}, "files.g_lm.safetensors"),
        ("surprise", 1, "surprise: Extra inputs"),
        ("measures.losses.block", "4.2", "measures.losses"),
        ("checks.1.measure", "nonsense", "not all of them, each once, in order (not_finite)"),
        ("checks.2.threshold", 1.0, "threshold 1.0 does not follow"),
        ("checks.2.bound", ">=", "bound '>=' does not follow"),
        ("checks.2.skipped", "because", "skipped 'because' does not follow"),
        ("tier", "variant", "tier 'variant' does not follow"),
        ("tier", "constant by construction", "tier 'constant by construction' does not follow"),
        ("precision.fp32", {"relative_deviation_g": 0.9, "tier": "variant"}, "precision"),
        ("precision", {}, "precision {} does not follow"),
        ("statement", "perfect", "statement 'perfect' does not follow"),
        ("constant_by_construction", True, "constant_by_construction True does not follow"),
        ("measures.relative_deviation_g", 0.8, "not the larger of fp32 and fp64"),
        ("measures.relative_deviation_g", 1e-9, "not the larger of fp32 and fp64"),
        ("measures.not_finite", ["A, layer 0, head 0, prompts text"], "measured although something was not finite"),
        ("measures.deviations", {}, "not exactly fp32 and fp64"),
        ("measures.deviations.fp32.G_LM.per_head", [[0.0, 0.5], [0.0, 0.0]], "not the largest of its kinds and heads"),
        ("measures.deviations.fp32.A.by_kind.text", 0.5, "fp32.A.max is not the largest"),
        ("measures.losses", {}, "measures.losses: missing"),
        ("measures.prefix", {}, "measures.prefix: missing"),
        ("measures.agreement", {}, "measures.agreement: missing"),
        ("measures.leak", {}, "measures.leak: missing"),
        ("measures.leak.last_token.live_rms", 0.5, "not the largest of the four"),
        ("measures.greedy", {}, "measures.greedy: missing"),
        ("measures.fp64", {}, "measures.fp64: missing"),
        ("measures.order_parameter", {}, "measures.order_parameter: missing"),
        ("measures.losses.other", 99.0, "leak_gap: value"),
        ("controls.untrained", None, "controls.untrained: missing"),
        ("controls.untrained.relative_deviation_g", 0.9, "does not match its G_LM"),
        ("thresholds", {}, "thresholds: not the keys of a certificate"),
        ("thresholds.max_kl", 0.01, "kl: threshold 0.0001 does not follow"),
        ("thresholds.max_kl", 1e9, "post.max_kl: Input should be less than or equal to 0.1"),
        ("thresholds.surprise", 1.0, "thresholds: not the keys of a certificate (surprise)"),
        ("settings", {}, "settings: not the keys of a certificate"),
        ("settings.fp64_prompts", 2, "statement"),
        ("model.g_source", "identity", "a constant G_LM has no other deduced tensors"),
        ("model.g_source", ["learned"], "model.g_source is not a string"),
        ("lineage.invariance_budget", "9", "lineage.invariance_budget not a number"),
        ("lineage.invariance_budget", 10**400, "too large"),
        ("lineage", {}, "lineage.invariance_budget not a number"),
        ("prompts.distinct", 10**400, "too large"),
        ("thresholds.min_prompts", 10**400, "thresholds.min_prompts"),
        ("prompts.distinct", 3, "held_out_prompts: value 16.0 does not follow"),
        ("prompts.distinct", 400, "400 different ones do not match"),
        ("prompts.kinds", {}, "prompts"),
    ],
)
def test_what_does_not_follow_or_is_unknown_is_refused_in_one_line(
    certificate: dict[str, Any], tmp_path: Path, path: str, value: Any, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        read(edited(certificate, path, value), tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "certificate.json" in str(caught.value)


def test_a_failed_certificate_whose_failing_checks_were_taken_out_is_refused(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    model = tiny.make_model(gain=1.0)
    failed = tiny.certify(model, tiny.sample_text(model))
    assert read(failed, tmp_path) == failed
    passing = [check for check in failed["checks"] if check["passed"]]
    certified = {"verdict": "certified", "failed": []}
    for changes in (
        {**certified, "checks": passing},
        {**certified, "checks": passing[:1]},
        {**certified, "checks": passing * 2},
        {**certified, "checks": [{**check, "skipped": "because", "passed": True} for check in failed["checks"]]},
        {**certified, "checks": [{**check, "threshold": check["value"], "passed": True} for check in failed["checks"]]},
        {**certified, "checks": []},
    ):
        with pytest.raises(UserError, match="checks: "):
            read({**failed, **changes}, tmp_path)


def test_a_certificate_of_a_constant_G_cannot_be_made_of_a_learned_one(
    tiny: SimpleNamespace, certificate: dict[str, Any], tmp_path: Path
) -> None:
    """Every part that `constant by construction` needs, edited at once, but not the measures."""
    changed = copy.deepcopy(certificate)
    changed["model"]["g_source"] = "identity"
    del changed["controls"]["untrained"]
    changed |= {"tier": "constant by construction", "constant_by_construction": True}
    with pytest.raises(UserError, match="deduced tensors"):
        read(changed, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "[]",
            "{",
            "null",
            '{"schema_version": 4}',
            '{"schema_version": 4, "verdict": NaN}',
            '{"schema_version": 3}',
        ),
        *('{"schema_version": 3, "checks": 1, "failed": [1]}', '{"schema_version": [3]}'),
    ],
)
def test_what_is_no_certificate_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "certificate.json").write_text(text)
    with pytest.raises(UserError, match=r"certificate\.json"):
        read_certificate(tmp_path / "certificate.json")
    with pytest.raises(UserError, match="no such file"):
        read_certificate(tmp_path / "none.json")


if __name__ == "__main__":
    (Path(__file__).resolve().parents[4] / "docs" / "certificate.schema.json").write_text(schema_text())
