"""The certificate's schema: documented, kept, and not deceived by an edit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.bundle.certificate.key_rank import wrong_difference
from pipeline.bundle.certificate.schema import Certificate, read_certificate
from pipeline.bundle.certificate.verdict import judged
from pipeline.config.post import PostConfig
from pipeline.errors import UserError
from tests.helpers.evidence import KINDS, edited, judged_by_hand, varying

SMALLER = {
    **{"format": "int8", "sha256": "3" * 64, "bytes": 1, "bytes_fp32": 4, "prompts": 8, "prompts_sha256": "4" * 64},
    **{"loss_fp32": 5.0, "loss": 7.0, "loss_difference": 2.0, "kl": 1.0, "top1_agreement": 0.5},
    **{"max_loss_difference": 1e9, "passed": True},
}
ALLOWED = {"max_loss_difference": 0.1, "loss": 5.01, "loss_difference": 0.01}
KEYS = {
    **{"by": "energy", "ranks": [[8, 3], [2, 1]], "sha256": "3" * 64},
    **{"numbers_per_key": 3.5, "bytes_per_token": 184, "bytes_per_token_full": 256},
    **{"prompts": 8, "prompts_sha256": "4" * 64, "loss_full": 5.0, "loss": 5.0004, "loss_difference": 4e-4, "kl": 3e-4},
    **{
        "top1_agreement": 0.99,
        "greedy_agreement": 1.0,
        "greedy_identical": 1.0,
        "greedy_texts": 4,
        "greedy_tokens": 48,
    },
    **{"max_loss_difference": 1e-3, "passed": True},
}


def schema_text() -> str:
    return json.dumps(Certificate.model_json_schema(by_alias=True), indent=1, sort_keys=True) + "\n"


def test_the_written_schema_is_the_one_in_force(repository: Path) -> None:
    """After a change: `python tests/pipeline/bundle/certificate/test_schema.py` writes it again; raise SCHEMA_VERSION."""
    assert (repository / "docs" / "certificate.schema.json").read_text() == schema_text()


def read(certificate: dict[str, Any], folder: Path) -> dict[str, Any]:
    (folder / "certificate.json").write_text(json.dumps(certificate))
    return read_certificate(folder / "certificate.json")


@pytest.mark.parametrize("post", [{}, {"prove": False}, {"order_parameter": True}, {"max_kl": 1e-3}])
def test_a_certificate_is_read_back(tmp_path: Path, post: dict[str, Any]) -> None:
    certificate = judged_by_hand(PostConfig(**post))
    assert certificate["verdict"] == "certified" and read(certificate, tmp_path) == certificate
    assert read({**certificate, "packaged": "certified"}, tmp_path)["packaged"] == "certified"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 2, "schema_version 2, this program reads 3, 4 and 5"),
        ("schema_version", 6, "schema_version 6, this program reads 3, 4 and 5"),
        ("schema_version", 4, "Extra inputs"),
        ("schema_version", None, "schema_version None"),
        ("verdict", "failed", "does not follow from the checks"),
        ("verdict", "excellent", "verdict"),
        ("checks.3.value", 0.5, "relative_deviation_g: value 0.5 does not follow from the measures"),
        ("checks.3.value", None, "relative_deviation_g"),
        ("checks.3.passed", False, "relative_deviation_g"),
        ("checks", [], "checks"),
        ("failed", [{"measure": "kl", "value": 1.0, "threshold": 0.0, "fix": ""}], "`failed` does not name"),
        ("files", {"model.safetensors": "0" * 64}, "files.g_lm.safetensors"),
        ("surprise", 1, "surprise: Extra inputs"),
        ("measures.losses.block", "4.2", "measures.losses"),
        ("checks.2.measure", "nonsense", "not all of them, each once, in order (not_finite)"),
        ("checks.3.threshold", 1.0, "threshold 1.0 does not follow"),
        ("checks.3.bound", ">=", "bound '>=' does not follow"),
        ("checks.6.skipped", "because", "skipped 'because' does not follow"),
        ("tier", "invariant", "tier 'invariant' does not follow"),
        ("tier", "constant by construction", "tier 'constant by construction' does not follow"),
        ("precision.fp32", {"relative_deviation_g": 0.9, "tier": "variant"}, "precision"),
        ("precision", {}, "precision {} does not follow"),
        ("statement", "perfect", "statement 'perfect' does not follow"),
        ("constant_by_construction", True, "constant_by_construction True does not follow"),
        # summaries and their details
        ("measures.relative_deviation_g", 1e-9, "relative_deviation_g is not that of G_LM in fp64"),
        ("measures.relative_deviation_g_fp32", 1e-9, "relative_deviation_g_fp32 is not that of G_LM in fp32"),
        ("measures.not_finite", ["A, layer 0"], "measured although something was not finite"),
        ("measures.deviations", {}, "not exactly fp32 and fp64"),
        ("measures.deviations.fp32.G_LM.per_head", [[0.0, 0.5], [0.0, 0.0]], "not the largest of its kinds and heads"),
        ("measures.deviations.fp32.A.by_kind.text", 0.5, "fp32.A.max is not the largest"),
        ("measures.query_deviation.by_kind.text", 0.5, "query_deviation.max is not the largest"),
        ("measures.query_deviation.max", 1e-9, "query_deviation.max is not the largest"),
        ("measures.worst_row.max", 1e-9, "worst_row.max is not the largest of its heads"),
        ("measures.worst_row.steps", 0, "a search without starts or steps"),
        ("measures.leak.short.live_rms", 0.5, "not the largest of the six"),
        ("measures.effects.alive_layers", [0, 1], "alive_layers: [0, 1] does not follow from per_layer.zero ([1])"),
        ("measures.effects.per_layer.plain", [0.1], "not of 2 layers"),
        ("measures.effects.zero", 0.3, "effects.zero: 0.3 does not follow from the losses"),
        ("measures.losses.plain", None, "effects.plain: 0.064 does not follow from the losses"),
        ("measures.losses.other", 99.0, "leak_gap: value"),
        # what no outputs can have given
        ("measures.agreement.cached.top1", 1.5, "agreement.cached.top1: 1.5 is no share"),
        ("measures.agreement.short.kl", -1.0, "agreement.short.kl: -1 is less than 0"),
        ("measures.greedy.identical", -1.0, "greedy.identical: -1 is no share"),
        ("measures.greedy.live_checks", 0, "greedy: nothing was generated or checked"),
        # proof and search
        ("measures.proof.bound", 1e-9, "proof.bound is not the largest of its heads"),
        ("measures.proof.per_head.1", [9e-9, 9e-9], "proof.bound is not the largest of its heads"),
        ("measures.proof.per_head.0", [None, 9e-9], "proof.bound is not the largest of its heads"),
        ("measures.proof.closed", False, "tier 'proven' does not follow"),
        (
            "measures.proof.per_head.0",
            [2e-9, 1e-9],
            "worst_row of layer 0, head 1, 2e-09, is above the proven bound 1e-09",
        ),
        ("measures.proof.per_head.0", [2e-9], "proof.per_head: not the heads of the search"),
        # what is missing, or cannot have been measured
        *(
            (f"measures.{name}", {}, f"measures.{name}: missing")
            for name in ("losses", "prefix", "agreement", "leak", "greedy", "fp64", "effects", "worst_row", "proof")
        ),
        ("measures.query_deviation", {}, "measures.query_deviation: missing"),
        ("settings.prove", False, "measures.proof: measured although it does not apply or was not asked for"),
        ("settings.order_parameter", True, "measures.order_parameter: missing"),
        ("controls.untrained", None, "controls.untrained: missing"),
        ("controls.untrained.relative_deviation_g", 0.9, "does not match its G_LM"),
        # thresholds and settings
        ("thresholds", {}, "thresholds: not the keys of a certificate"),
        ("thresholds.max_kl", 0.01, "kl: threshold 0.0001 does not follow"),
        ("thresholds.max_kl", 1e9, "post.max_kl: Input should be less than or equal to 0.1"),
        (
            "thresholds.min_attention_effect",
            1e-12,
            "post.min_attention_effect: Input should be greater than or equal to 0.01",
        ),
        ("thresholds.max_worst_row_deviation", 1.0, "post.max_worst_row_deviation: Input should be less than"),
        ("thresholds.surprise", 1.0, "thresholds: not the keys of a certificate (surprise)"),
        ("settings", {}, "settings: not the keys of a certificate"),
        ("settings.fp64_prompts", 2, "statement"),
        ("model.g_source", "identity", "a constant G_LM has no other deduced tensors"),
        ("model.g_source", ["learned"], "model.g_source is not a string"),
        ("model.vocab_size", "48", "model.vocab_size is not a whole number"),
        ("lineage.invariance_budget", "9", "lineage.invariance_budget not a number"),
        ("lineage.invariance_budget", 10**400, "too large"),
        ("lineage", {}, "lineage.invariance_budget not a number"),
        # prompts
        ("prompts.distinct", 10**400, "different ones do not match"),
        ("thresholds.min_prompts", 10**400, "thresholds.min_prompts"),
        ("prompts.distinct", 3, "held_out_prompts: value 128.0 does not follow"),
        ("prompts.distinct", 400, "400 different ones do not match"),
        ("prompts.kinds", {}, "prompts"),
        ("prompts.kinds.random", [1, 8], "47 ids are more than the random prompts hold"),
        ("prompts.kinds.text_4", [0, 4], "prompts.kinds.text_4: 0 prompts of up to 4 tokens"),
        ("prompts.kinds.lengths", [32, 1024], "up to 1024 tokens; the context has 128"),
        ("prompts.kinds", {kind: KINDS[kind] for kind in KINDS if kind != "lengths"}, "prompts.kinds: no lengths"),
        ("prompts.kinds", {**KINDS, "extra:code": [9, 9]}, "not those that were measured (extra:code)"),
        ("prompts.documents", 0, "prompts.documents: 0"),
        ("prompts.documents", 10**9, "prompts.documents: 1000000000 of 128 prompts"),
        ("prompts.documents", 100, "statement"),
        ("prompts.deviating", 3, "prompts.deviating: 3 does not match the deviations of text"),
        ("prompts.deviating", -1, "prompts.deviating: -1 does not match"),
        ("measures.coverage", {"ids": 1, "seen": 1}, "1 of 1 ids do not match a vocabulary of 48"),
        ("measures.coverage.seen", 60, "60 of 47 ids"),
        ("measures.coverage.seen", 46, "ids_covered: value 47.0 does not follow"),
        ("weight_format", SMALLER, "weight_format.max_loss_difference: 1e+09 nats; at most 0.1 may be allowed"),
        (
            "weight_format",
            SMALLER | {"max_loss_difference": 0.1, "loss_difference": 1e-4},
            "weight_format.loss_difference: 0.0001 is not that of the losses 7.0 and 5.0",
        ),
        ("weight_format", SMALLER | ALLOWED | {"kl": -1.0}, "weight_format.kl: -1.0 is not a divergence"),
        ("weight_format", SMALLER | ALLOWED | {"prompts": 0}, "weight_format.prompts: 0 measure nothing"),
        (
            "weight_format",
            SMALLER | ALLOWED | {"top1_agreement": 1.5},
            "weight_format.top1_agreement: 1.5 is not a share",
        ),
    ],
)
def test_what_does_not_follow_or_is_unknown_is_refused_in_one_line(
    tmp_path: Path, path: str, value: Any, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        read(edited(judged_by_hand(), path, value), tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "certificate.json" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": [[8, 3]]}, "key_rank.ranks: not the ranks of 2 layers of 2 heads"),
        ({"ranks": [[8, 9], [2, 1]]}, "key_rank.ranks: rank 9 is not a whole number from 1 to 8"),
        ({"ranks": [[8, 3], [2, 0]]}, "key_rank.ranks: rank 0 is not"),
        ({"ranks": [[8, 3], [2, 2]]}, "key_rank.numbers_per_key: 3.5 does not follow from the ranks (3.75)"),
        ({"bytes_per_token": 100}, "key_rank.bytes_per_token: 100 does not follow from the ranks (184)"),
        ({"max_loss_difference": 9.0}, "key_rank.max_loss_difference: 9 nats; at most 0.1 may be allowed"),
        ({"loss": 5.1}, "key_rank.loss_difference: 0.0004 is not that of the losses 5.1 and 5.0"),
        ({"loss": None}, "key_rank.loss_difference: 0.0004 is not that of the losses None"),
        ({"loss": 5.1, "loss_difference": 0.1}, "key_rank.passed: True contradicts a loss difference of 0.1"),
        ({"greedy_agreement": 7.0}, "key_rank.greedy_agreement: 7.0 is not a share"),
        ({"passed": False}, "key_rank.passed: False contradicts"),
        ({"kl": 1e-9}, "statement"),
        ({"surprise": 1}, "key_rank.surprise: Extra inputs"),
    ],
)
def test_edited_ranks_or_numbers_of_low_rank_keys_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    certificate = {**judged_by_hand(), "key_rank": KEYS}
    certificate["statement"] = judged(certificate)["statement"]
    assert "Keys hold 3.5 of 8 numbers on average" in read(certificate, tmp_path)["statement"]
    with pytest.raises(UserError) as caught:
        read({**certificate, "key_rank": {**KEYS, **changes}}, tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_losses_of_any_size_are_compared_as_they_are_written() -> None:
    """Nine digits of 1234.5 are four of a difference of 1e-3."""
    for full, difference in ((4.08079453219, 2.44189e-4), (12.3456789499, 1e-3), (1234.567894999, 1e-3)):
        low, full, difference = (float(f"{value:.9g}") for value in (full + difference, full, difference))
        assert wrong_difference(low, full, difference) is None
        assert wrong_difference(low, full, 2 * difference) is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"measures.worst_row.max": 2e-5, "measures.worst_row.per_head.1": [2e-5, 0.0]},
            "is above the proven bound 1.15e-08",
        ),
        (varying(3e-6), "relative_deviation_g 3e-06 is more than the proven bound 1.15e-08 allows"),
        ({"measures.proof.bound": None, "measures.proof.per_head.1": [None, 4e-9]}, "closed without a bound"),
        ({**varying(2e-5, fp64=1e-8), "prompts.deviating": 0}, "prompts.deviating: 0 does not match"),
    ],
)
def test_a_certificate_whose_measures_contradict_one_another_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Judged by its measures, so that only their contradiction is wrong with it."""
    certificate = judged_by_hand(changes=changes)
    with pytest.raises(UserError) as caught:
        read(certificate, tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_round_off_of_the_search_is_no_contradiction(tmp_path: Path) -> None:
    """The search computes in fp64; a bound of exact arithmetic may be smaller than its round-off."""
    tiny = {"measures.proof.bound": 1e-20, "measures.proof.per_head": [[1e-20] * 2] * 2}
    tiny |= {"measures.worst_row.max": 3e-15, "measures.worst_row.per_head": [[0.0] * 2, [3e-15, 0.0]]}
    certificate = judged_by_hand(changes=tiny)
    assert read(certificate, tmp_path)["tier"] == "proven"


def test_a_failed_certificate_whose_failing_checks_were_taken_out_is_refused(tmp_path: Path) -> None:
    failed = judged_by_hand(PostConfig(prove=False), varying(0.3))
    assert failed["verdict"] == "failed" and read(failed, tmp_path) == failed
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
    for changes in (certified, {"tier": "invariant"}, {"statement": judged_by_hand()["statement"]}):
        with pytest.raises(UserError, match="does not follow|does not name"):
            read({**failed, **changes}, tmp_path)


def test_a_certificate_of_a_constant_G_cannot_be_made_of_a_learned_one(tmp_path: Path) -> None:
    """Every part that `constant by construction` needs, edited at once, but not the measures."""
    changed = copy.deepcopy(judged_by_hand())
    changed["model"]["g_source"] = "identity"
    del changed["controls"]["untrained"]
    changed |= {"tier": "constant by construction", "constant_by_construction": True}
    with pytest.raises(UserError, match="deduced tensors"):
        read(changed, tmp_path)


def test_a_proof_cannot_be_made_up_for_another_model(tmp_path: Path) -> None:
    """What was not bounded stays unproven, whatever tier and statement say."""
    open_ = {"measures.proof.closed": False, "measures.proof.bound": None, "measures.proof.per_head": [[None] * 2] * 2}
    honest = judged_by_hand(changes=open_)
    assert honest["tier"] == "at round-off" and "exact arithmetic" not in honest["statement"]
    assert read(honest, tmp_path) == honest
    proven = judged_by_hand()
    for changes in (
        {"tier": "proven"},
        {"statement": proven["statement"]},
        {k: proven[k] for k in ("tier", "statement")},
    ):
        with pytest.raises(UserError, match="does not follow"):
            read({**honest, **changes}, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{", "null", '{"schema_version": 5}', '{"schema_version": 4}', '{"schema_version": 3}'),
        *('{"schema_version": 5, "verdict": NaN}', '{"schema_version": [3]}', '{"schema_version": true}'),
        '{"schema_version": 3, "checks": 1, "failed": [1]}',
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
