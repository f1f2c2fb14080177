"""evaluation.html says what the numbers say, and what they do not."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from pipeline.inference.evaluate import run
from pipeline.inference.evaluate.page import write_page
from pipeline.inference.evaluate.table import table
from pipeline.report.links import links
from tests.helpers.html_page import Page, browser, too_wide
from tests.pipeline.inference.evaluate.small import open_tiny


@pytest.fixture(scope="module")
def make_results(tokenizer_path: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, dict[str, Any]] = {}

    def make(**settings: Any) -> dict[str, Any]:
        names, key = ["arc_easy", "truthfulqa_mc2", "lambada_openai"], str(settings)
        if key not in made:
            out, model = tmp_path_factory.mktemp("out"), open_tiny(tokenizer_path, **settings)
            made[key] = run.evaluate(model, names, out=out, data=data, report=lambda _: None)
        return deepcopy(made[key])

    return make


def page_of(results: dict[str, Any], root: Path) -> Page:
    target = write_page(results, links(root / "evaluation/evaluation.html", root), root / "evaluation")
    page = Page(target.read_text(encoding="utf-8"))
    assert not page.faults
    return page


def test_an_invariant_model(make_results: Any, tmp_path: Path) -> None:
    page = page_of(make_results(), tmp_path)
    assert "Scores remain unchanged with the cached G_LM" in page.words() and "Of 30 items none changed" in page.words()
    assert "SOC-5" in page.words() and "GPT-Neo-125M" in page.words() and "arXiv 2603.23539" in page.words()
    assert (
        "38.55" in page.words() and "45.58" in page.words() and "30.55" not in page.words()
    )  # hellaswag was not scored
    assert "truthfulqa_mc2 30 of 30" in page.words() and "At chance, within two standard errors" in page.words()
    assert "not made yet" in page.words() and "Certificate" in page.words()
    assert "42.62" not in page.words()  # the mean of tasks of which some are missing


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 380])
def test_nothing_is_wider_than_its_place(make_results: Any, tmp_path: Path, width: int) -> None:
    results = make_results()
    results["source"]["name"], results["source"]["path"] = "a_long_name_" * 12, "/a/long/path" * 20
    results["failed"] = {"piqa": "x" * 300}
    page_of(results, tmp_path)
    assert too_wide(tmp_path / "evaluation/evaluation.html", width, tmp_path) == "none"


def test_a_model_that_leaks(make_results: Any, tmp_path: Path) -> None:
    page = page_of(make_results(gain=1.0, certified=False), tmp_path)
    assert "Not certified: a live score may have seen the answer" in page.words() and "leak gain" in page.words()
    assert "its live G_LM is computed from context and answer together" in page.words()
    assert re.search(r"Live scores are above the cached ones in \d of 3 tasks", page.words())
    assert "remain unchanged" not in page.words()


def test_without_live_scores(make_results: Any, tmp_path: Path) -> None:
    page = page_of(make_results(live=False), tmp_path)
    assert "Scores with the cached G_LM" in page.words() and "no metric learner" in page.words()
    assert "remain unchanged" not in page.words()


def test_a_score_that_is_no_number(make_results: Any, tmp_path: Path) -> None:
    """mc2 of answers whose probabilities all vanish."""
    for settings in ({}, {"gain": 1.0, "certified": False}):
        results = make_results(**settings)
        one = results["tasks"]["truthfulqa_mc2"]
        for values in (one, one["metrics"]["acc"]):
            values |= dict.fromkeys(("cached", "cached_stderr", "live", "live_stderr", "difference", "stderr"))
        one["leak_gain"] = None
        assert "45.58" not in page_of(results, tmp_path).words() and len(table(results)) > 4


def test_hostile_names_are_text(make_results: Any, tmp_path: Path) -> None:
    results = make_results(live=False)
    results["source"]["name"] = "<script>alert(1)</script>"
    results["failed"] = {"x": "<img src=x>"}
    page = page_of(results, tmp_path)
    assert "<script>alert(1)</script>" in page.words() and "script" not in page.tags and "img" not in page.tags
