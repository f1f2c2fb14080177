"""The certificate's page: one file, nothing loaded, the verdict first, and whatever could not be measured is no crash."""

from __future__ import annotations

import copy
import html
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.post import PostConfig
from pipeline.post.certificate.labels import CHECK_LABELS, FAILED_WHY
from pipeline.post.certificate.page import TERMS, Evidence, Shown, certificate_page, show_sample
from pipeline.post.extract import extract_g
from pipeline.post.validate import validate
from pipeline.report.head_maps import MAX_MAPS
from pipeline.report.links import CERTIFICATE, Link, links, mlflow_link
from tests.helpers.evidence import judged_by_hand, varying
from tests.helpers.html_page import Page, browser, too_wide

REAL_G = Path("/work/shared/reference/PLDRv51-110M-1.G_LM.safetensors")
DIFFERENT = {  # outputs that change with a cache
    **{"measures.agreement.cached.kl": 0.1, "measures.agreement.short.kl": 0.1, "measures.greedy.per_decision": 0.9},
    "measures.leak.worst_rms": 0.02,
}
HISTORIES = {
    "invariance/order_parameter_G": [(0, 0.5), (10, 1e-3), (20, 1e-7)],
    "invariance/budget": [(0, 0.0), (10, 4.0), (20, 8.0)],
}


def page_of(certificate: dict[str, Any], g_lm: torch.Tensor, **more: Any) -> str:
    return certificate_page(certificate, Evidence(name="a run", g_lm=g_lm, spread=g_lm * 0.1, **more))


def verdict_of(page: str) -> str:
    return re.search(r'<div class="verdict (?:yes|no)"><h2>(.*?)</h2>', page)[1]


def test_a_certified_page_has_everything_and_loads_nothing() -> None:
    post = PostConfig(prompts=16, min_prompts=16, order_parameter=True)
    certificate, g_lm = judged_by_hand(post, {"prompts.distinct": 16}), torch.randn(2, 2, 8, 8)
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


def test_a_failed_page_says_so_first_and_shows_every_fix() -> None:
    changes = {**varying(0.3), "lineage.invariance_budget": 0.16, "measures.worst_row.max": 0.4, **DIFFERENT}
    certificate = judged_by_hand(PostConfig(prove=False), changes)
    assert len(certificate["failed"]) == 7
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
        and "100%" not in read.text[: read.text.index("What failed")]
    )
    first = [check["measure"] for check in certificate["checks"] if not check["passed"]]
    assert re.findall(r"<code>(\w+)</code><br>", page)[: len(first)] == first
    assert "train.metric_weight_decay" in page and "The SDPA twin is runs/twin" in page and "4.2000" in page
    assert "MLflow had no metrics" in page


def test_every_check_has_its_words() -> None:
    certificate = judged_by_hand()
    names = [check["measure"] for check in certificate["checks"]]
    assert names == list(CHECK_LABELS) == list(FAILED_WHY)


def cells(page: str) -> str:
    """What a page says, with a bar wherever there is a tag."""
    return html.unescape(re.sub(r"(\s*<[^>]*>\s*)+", "|", page))


def test_every_input_layer_and_kind_is_shown() -> None:
    page = cells(page_of(judged_by_hand(), torch.randn(2, 2, 8, 8)))
    for words in (
        "|proven|for every input: deviation at most 1.2e-8|",
        "|For every input of any length, in exact arithmetic, G_LM stays constant to 1.2e-8 of its size.",
        "400 rows of the prompts among what they were chosen from, 60 steps each (seed 7):|1.1e-8|",
        "Proof: no input of any length changes G_LM by more than|1.2e-8|",
        "|found|proven bound|scores|unit 1|unit 2|unit 3|",
        "|1|1.1e-8|1.2e-8|2e-7|0.27|2e-4|3e-8|",  # layer 1
        "0 of 128 text prompts from 37 documents deviated by more than 1e-05",
        "The prompts hold 47 of the 47 ids of the vocabulary, and up to 128 of 128 tokens.",
        "|0|0.016|0.019|1e-3|no|1|0.17|0.31|0.05|yes|",
        "The same over short prompts: KL 1e-12 nats",
        "G_LM, times the queries, fp64",
    ):
        assert words in page, words
    assert "The papers' order parameter" not in page  # on request


def test_a_proof_that_did_not_close_is_not_called_one() -> None:
    reason = "layer 0: 2 of 8 residual units still give every row <b>"
    changes = {"measures.proof.closed": False, "measures.proof.bound": None, "measures.proof.reason": reason}
    changes |= {"measures.proof.per_head": [[None] * 2] * 2, "measures.proof.by_unit": [[0.3, None], [None, None]]}
    page = cells(page_of(judged_by_hand(changes=changes), torch.randn(2, 2, 8, 8)))
    assert f"The proof did not close: {reason}" in page and "not bounded|" in page
    assert "exact arithmetic, G_LM stays" not in page and "for every input: deviation" not in page
    without = cells(page_of(judged_by_hand(PostConfig(prove=False)), torch.randn(2, 2, 8, 8)))
    assert "No proof was tried" in without and "proven bound" not in without


def test_the_other_pages_of_the_run_are_linked(tmp_path: Path) -> None:
    certificate = judged_by_hand()
    pages = links(tmp_path / CERTIFICATE, tmp_path, mlflow=mlflow_link("http://host:5000", "abc"))
    read = Page(page_of(certificate, torch.eye(8).expand(2, 2, 8, 8), pages=[*pages, Link("<b>", None, "<i>", "<s>")]))
    assert read.links["Run report"] == "../report/training.html" and read.links["Data report"] == "../report/data.html"
    assert read.links["MLflow"] == "http://host:5000/#/runs/abc" and "not made yet: pldr report CONFIG" in read.words()
    assert "<b>" in read.text and "<i>" in read.text and not read.faults


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium")
@pytest.mark.parametrize("width", [420, 1280])
def test_nothing_is_wider_than_its_place(tmp_path: Path, width: int) -> None:
    long = "a_long_word" * 40
    changes = {
        **varying(0.3),
        "lineage.checkpoint": long,
        "measures.proof.closed": False,
        "measures.proof.reason": long,
    }
    units = {"measures.proof.by_unit": [[1e-8] * 24] * 2}  # three times the papers'
    certificate = judged_by_hand(changes={**changes, **units})
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


def test_too_few_prompts_are_named_in_plain_words() -> None:
    certificate = judged_by_hand(changes={"prompts.distinct": 16})
    assert "too few prompts to prove anything" in page_of(certificate, torch.eye(8).expand(2, 2, 8, 8))


def test_a_sample_is_shown_as_what_its_tokens_add() -> None:
    decoded = {(1, 2): "to be", (1, 2, 3, 4): "to be or not", (1, 2, 3, 5): "to be or else"}
    shown = show_sample("greedy", ([1, 2], [3, 4], [3, 5]), lambda ids: decoded[tuple(ids)])
    assert shown == Shown("greedy", "to be", " or not", " or else", 1)


@pytest.mark.skipif(not REAL_G.exists(), reason="the published G_LM is not on this machine")
def test_the_published_G_LM_is_drawn() -> None:
    certificate = judged_by_hand()
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
