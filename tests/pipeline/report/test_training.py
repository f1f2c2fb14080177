"""The run report: escaped values, thresholds, words explained, and what is missing is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.report.links import links, mlflow_link
from pipeline.report.training import TERMS, write_run_report
from tests.helpers.html_page import Page, browser, too_wide

EVIL = "<script>alert(1)</script>"
FACTS = {
    "run_id": "abc",
    "name": EVIL,
    "status": "RUNNING",
    "started": "2026-11-25",
    "uri": "sqlite:///x",
    "verdict": None,
    "checkpoints": ["step-000100"],
}
ORDERS = {f"invariance/order_parameter_{name}": [(10, 0.5), (20, 1e-7)] for name in ("A", "A_LM", "A_P", "G")}
VALIDATED = {"train/loss": [(10, 2.0), (20, 1.5)], "val/loss_cached": [(20, 1.6)], "val/leak_gap": [(10, 0.1), (20, 0.0)],
             "invariance/budget": [(10, 0.1), (20, 0.2)], **ORDERS}  # fmt: skip


@pytest.mark.parametrize("histories", [{}, VALIDATED])
def test_the_page_escapes_and_loads_nothing(tmp_path: Path, histories: dict[str, Any]) -> None:
    params = {"train.steps": "20", "data.sources": "https://host/x?token=SECRET", EVIL: EVIL}
    tags = {"resumed.10.train.zero_stage": "1 -> 3", f"resumed.12.{EVIL}": EVIL}
    result = write_run_report(FACTS, params, tags, histories, tmp_path / "run.html")
    text = (tmp_path / "run.html").read_text()
    page = Page(text)
    assert not page.faults and "script" not in page.tags and page.text.count(EVIL) == 6
    assert "SECRET" not in text and "default-src 'none'" in text and not page.loaded
    assert "train.zero_stage1 -> 3" in page.text and ("polyline" in page.tags) == bool(histories)
    assert result["step"] == (20 if histories else 0) and ("train/loss" in result) == bool(histories)
    assert ("resumed, changed" in page.text) == bool(histories)


def test_thresholds_are_the_configured_ones_and_words_are_explained(tmp_path: Path) -> None:
    params = {"post.max_relative_deviation_g": "2e-06", "post.max_leak_gap": "no number"}
    write_run_report(FACTS, params, {}, VALIDATED, tmp_path / "run.html")
    page = Page((tmp_path / "run.html").read_text())
    for words in (
        "2e-6: certified below",
        "9: invariance is expected",
        "\u00b11e-3: certified between",
        "training step",
        *TERMS,
    ):
        assert words in page.text, words


def test_what_has_not_happened_is_named(tmp_path: Path) -> None:
    write_run_report(FACTS, {}, {}, {"train/loss": [(10, 2.0), (20, 1.5)]}, tmp_path / "run.html")
    assert "No validation yet" in Page((tmp_path / "run.html").read_text()).text
    frozen = {**VALIDATED, "invariance/frozen": [(10, 0.0), (20, 1.0)]}
    write_run_report(FACTS, {}, {}, frozen, tmp_path / "run.html")
    page = Page((tmp_path / "run.html").read_text())
    assert "G_LM frozen" in page.text and "No validation" not in page.text


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium")
@pytest.mark.parametrize("width", [420, 1280])
def test_nothing_is_wider_than_its_place(tmp_path: Path, width: int) -> None:
    target, long = tmp_path / "report" / "training.html", "a_long_word" * 40
    huge = {metric: [(10, 1.0), (10**9, 1.23456789e300)] for metric in (*VALIDATED, "data/tokens", "train/grad_norm")}
    facts = {**FACTS, "name": long, "uri": f"sqlite:////{long}", "checkpoints": [long] * 9, "verdict": "certified"}
    facts["pages"] = links(target, tmp_path, mlflow=mlflow_link(facts["uri"], long), in_sweep=True)
    write_run_report(facts, {long: long}, {f"resumed.10.{long}": long}, huge, target)
    assert too_wide(target, width, tmp_path) == "none"
