"""The certificate's page: one file, nothing loaded, the verdict first, and whatever could not be measured is no crash."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.post.certificate.labels import CHECK_LABELS, FAILED_WHY
from pipeline.post.certificate.page import MAX_MAPS, TERMS, Evidence, Shown, certificate_page, show_sample
from pipeline.post.extract import extract_g
from pipeline.post.validate import validate
from pipeline.report.links import CERTIFICATE, Link, links, mlflow_link
from pldr_model.model import PLDRModel
from tests.helpers.html_page import Page, browser, too_wide

REAL_G = Path("/work/shared/reference/PLDRv51-110M-1.G_LM.safetensors")
HISTORIES = {
    "invariance/order_parameter_G": [(0, 0.5), (10, 1e-3), (20, 1e-7)],
    "invariance/budget": [(0, 0.0), (10, 4.0), (20, 8.0)],
}


def page_of(certificate: dict[str, Any], g_lm: torch.Tensor, **more: Any) -> str:
    return certificate_page(certificate, Evidence(name="a run", g_lm=g_lm, spread=g_lm * 0.1, **more))


def verdict_of(page: str) -> str:
    return re.search(r'<div class="verdict (?:yes|no)"><h2>(.*?)</h2>', page)[1]


def test_a_certified_page_has_everything_and_loads_nothing(
    certificate: dict[str, Any], text: torch.Tensor, invariant: PLDRModel
) -> None:
    g_lm = extract_g(invariant, text[:, :-1], "mean").g_lm
    samples = [Shown("greedy", "the ", "cat", "cat", None), Shown("greedy", "<script>x</script>", "a", "b", 0)]
    page = page_of(certificate, g_lm, histories=HISTORIES, samples=samples, notes=["ACCELERATED RECIPE"])
    assert verdict_of(page) == "Certified: G_LM may be cached"
    assert page.index("verdict yes") < page.index(">Checks</h2>")
    assert page.count('<img src="data:image/png;base64,') == 4  # a head each
    read = Page(page)
    assert not read.faults and page.count('role="img"') == 2 + 2  # spectra by layer; order parameters and budget
    for word in ("1e-5: certified below", "9: invariance is expected", "singular value / largest", *TERMS):
        assert word in read.text, word
    for words in (
        "relative_deviation_g",
        "Judged on only 16",
        "the texts differ from token 0",
        "ACCELERATED",
        "spread",
    ):
        assert words in page, words
    assert "<script" not in page and "&lt;script&gt;" in page
    assert all(str(address).startswith("data:image/png") for address in read.loaded)
    assert "url(" not in page and "@import" not in page
    assert "img-src data:" in page and "default-src 'none'" in page
    assert "Thresholds looser than the defaults: min_prompts 16 (default 100)" in page
    assert certificate["prompts"]["sha256"] in page and "No SDPA twin is configured" in page


def test_a_failed_page_says_so_first_and_shows_every_fix(tiny: SimpleNamespace) -> None:
    model = tiny.make_model(gain=1.0)
    certificate = tiny.certify(model, tiny.sample_text(model), budget=0.16)
    page = page_of(certificate, torch.randn(2, 2, 8, 8), twin={"loss": 4.2, "note": "The SDPA twin is runs/twin"})
    assert verdict_of(page) == "Not certified: G_LM must not be cached"
    read = Page(page)
    assert not read.faults
    deviation = certificate["measures"]["relative_deviation_g"]
    top = read.text[: read.text.index("Cost of caching")]  # the links below the numbers
    assert f"by {deviation:.0%} of its size in the worst head" in top and "the invariance budget was 0.16" in top
    for failure in certificate["failed"]:
        assert CHECK_LABELS[failure["measure"]] in top and FAILED_WHY[failure["measure"]] in top
    assert (
        "greedy tokens agree" not in page
        and "tier in" not in page
        and "100" not in read.text[: read.text.index("What failed")]
    )
    first = [check["measure"] for check in certificate["checks"] if not check["passed"]]
    assert re.findall(r"<code>(\w+)</code><br>", page)[: len(first)] == first
    assert "train.metric_weight_decay" in page and "The SDPA twin is runs/twin" in page and "4.2000" in page
    assert "MLflow had no metrics" in page


def test_every_check_has_its_words(certificate: dict[str, Any]) -> None:
    names = [check["measure"] for check in certificate["checks"]]
    assert names == list(CHECK_LABELS) == list(FAILED_WHY)


def test_the_other_pages_of_the_run_are_linked(certificate: dict[str, Any], tmp_path: Path) -> None:
    pages = links(tmp_path / CERTIFICATE, tmp_path, mlflow=mlflow_link("http://host:5000", "abc"))
    read = Page(page_of(certificate, torch.eye(8).expand(2, 2, 8, 8), pages=[*pages, Link("<b>", None, "<i>", "<s>")]))
    assert read.links["Run report"] == "../report/training.html" and read.links["Data report"] == "../report/data.html"
    assert read.links["MLflow"] == "http://host:5000/#/runs/abc" and "not made yet: pldr report CONFIG" in read.words()
    assert "<b>" in read.text and "<i>" in read.text and not read.faults


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium")
@pytest.mark.parametrize("width", [420, 1280])
def test_nothing_is_wider_than_its_place(tiny: SimpleNamespace, tmp_path: Path, width: int) -> None:
    model, long = tiny.make_model(gain=1.0), "a_long_word" * 40
    text = tiny.sample_text(model)
    certificate = tiny.certify(model, text, lineage={**tiny.lineage, "checkpoint": long}, budget=0.16)
    pages = links(tmp_path / "page.html", tmp_path, mlflow=mlflow_link(f"sqlite:////{long}", long), in_sweep=True)
    more = {"pages": pages, "samples": [Shown("greedy", long, long, long, 3)], "notes": [long], "histories": HISTORIES}
    (tmp_path / "page.html").write_text(page_of(certificate, torch.randn(2, 2, 8, 8), **more))
    assert too_wide(tmp_path / "page.html", width, tmp_path) == "none"


def test_a_page_of_what_could_not_be_measured(tiny: SimpleNamespace, text: torch.Tensor) -> None:
    model = tiny.make_model()
    g_lm = extract_g(model, text[:, :-1], "mean").g_lm
    with torch.no_grad():
        model.layers[1].attention.plga.P[0, 2, 3] = math.nan
    bad_g = g_lm.clone()
    bad_g[0, 1, 0, 0] = math.nan
    page = page_of(validate(model, bad_g, text, tiny.post), bad_g)
    assert verdict_of(page).startswith("Not certified") and "not finite" in page
    assert "A_P, layer 1, head 0" in page and "Not measured" in page
    top = Page(page).text.partition("Cost of caching")[0]
    assert FAILED_WHY["not_finite"] in top and "use an earlier checkpoint" in top and top.count("Fix:") == 1
    assert FAILED_WHY["relative_deviation_g"] not in top and CHECK_LABELS["kl"] + ": not measured" in top


def test_too_few_prompts_are_named_in_plain_words(
    tiny: SimpleNamespace, invariant: PLDRModel, text: torch.Tensor
) -> None:
    post = tiny.post.model_copy(update={"prompts": 100, "min_prompts": 100})
    certificate = tiny.certify(invariant, text, post=post)
    assert "too few prompts to prove anything" in page_of(certificate, torch.eye(8).expand(2, 2, 8, 8))


def test_a_sample_is_shown_as_what_its_tokens_add() -> None:
    decoded = {(1, 2): "to be", (1, 2, 3, 4): "to be or not", (1, 2, 3, 5): "to be or else"}
    shown = show_sample("greedy", ([1, 2], [3, 4], [3, 5]), lambda ids: decoded[tuple(ids)])
    assert shown == Shown("greedy", "to be", " or not", " or else", 1)


@pytest.mark.skipif(not REAL_G.exists(), reason="the published G_LM is not on this machine")
def test_the_published_G_LM_is_drawn(certificate: dict[str, Any]) -> None:
    (G,) = load_file(REAL_G).values()
    page = page_of(certificate, G)
    assert page.count("<img") == 70 and len(page) < 1_000_000
    certificate = copy.deepcopy(certificate)
    deviation = certificate["measures"]["deviations"]["fp32"]["G_LM"]
    deviation["per_head"] = [[0.0] * 42 for _ in range(5)]  # 210 heads
    deviation["per_head"][4] = [0.5] * 41 + [None]
    page = page_of(certificate, G.repeat(1, 3, 1, 1))
    assert page.count("<img") == MAX_MAPS and "82 heads that vary least are omitted" in page
    assert page.count('alt="G_LM of layer 4,') == 42
