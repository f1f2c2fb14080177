"""The page without a browser: one file that may load nothing, and what it is told of a model. test_page_browser.py has one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from starlette.testclient import TestClient

from pipeline.inference.serve.live import LiveEngine
from pipeline.inference.serve.page import SCRIPTS, STYLE, WEB, add_page, drift_rows, facts, page
from pipeline.inference.serve.sentinel import Bound, Drift, watch
from pipeline.inference.source import open_model
from pldr_model.model import PLDRModel
from tests.helpers.html_page import Page
from tests.pipeline.report.test_style import contrast, palette

Make = Callable[..., Path]
ENGINES: dict[str, Any] = {"name": SimpleNamespace(name="transformers")}
SCRIPT = "".join(file.read_text() for file in SCRIPTS)


def test_it_is_one_file_that_loads_nothing() -> None:
    html, _ = page()
    read = Page(html)
    assert read.faults == [] and read.loaded == [] and read.links == {}
    style = html.partition("</style>")[0]
    assert "://" not in html and "url(" not in style and "@import" not in style
    assert len(html) < 100_000
    for label in re.findall(r'<(?:input|textarea) id="(\w+)"', html):
        assert f'for="{label}"' in html or f'<label><input id="{label}"' in html or f'"{label}-label"' in html, label


def test_every_file_beside_it_is_in_it() -> None:
    assert {*WEB.iterdir()} == {*SCRIPTS, WEB / "page.html"}
    html, _ = page()
    assert all(file.read_text() in html for file in (*SCRIPTS, STYLE)) and html.count('"use strict"') == 1


def test_its_policy_allows_its_own_script_and_style_and_no_other() -> None:
    html, headers = page()
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'" and policy["img-src"] == "data:"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert "style=" not in html and not re.search(r"<[a-z][^>]*\son[a-z]+=", html)  # which the policy would refuse


@pytest.mark.parametrize(
    "word", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage"]
)
def test_no_text_becomes_markup_or_code_and_nothing_is_kept(word: str) -> None:
    assert word not in SCRIPT


@pytest.mark.parametrize("part", [0, 1], ids=["light", "dark"])
def test_buttons_fields_and_unlikely_tokens_have_contrast(part: int) -> None:
    css = STYLE.read_text().split("@media screen and (prefers-color-scheme: dark)")[part].split("* {", 1)[0]
    colors, heat = palette(css), re.findall(r"--heat: (\d+),(\d+),(\d+)", css)[0]
    assert contrast(colors["kept"], colors["page"]) >= 4.5  # the button's text
    assert "--edge: color-mix(in srgb, var(--soft) 75%, var(--card))" in page()[0]
    edge = mixed(rgb(colors["soft"]), rgb(colors["card"]), 0.75)
    assert contrast(edge, colors["card"]) >= 3 and contrast(edge, colors["page"]) >= 3
    assert "Math.min(0.5, (-likely" in SCRIPT  # the full color of an unlikely token
    assert contrast(colors["ink"], mixed([int(x) for x in heat], rgb(colors["card"]), 0.5)) >= 4.5


def rgb(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def mixed(one: list[int], other: list[int], share: float) -> str:
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in zip(one, other, strict=True))


def test_facts_of_a_certified_bundle(make_bundle: Make) -> None:
    told = facts(open_model(make_bundle()), ENGINES)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert (told["verdict"], told["badge"]["kind"], told["caution"], told["live"]) == ("Certified", "yes", None, None)
    assert told["statement"][0].startswith("G_LM may be cached: ") and all(
        one.endswith(".") for one in told["statement"]
    )
    assert [len(layer["heads"]) for layer in told["maps"]] == [2, 2] and told["left_out"] == 0 and told["context"] == 32
    assert all(head["uri"].startswith("data:image/png;base64,") for layer in told["maps"] for head in layer["heads"])
    assert any(tile["label"].startswith("largest deviation measured in fp32; allowed") for tile in told["tiles"])


def test_facts_of_one_that_is_not_certified_and_of_one_without_certificate(
    make_bundle: Make, tiny: SimpleNamespace, text: torch.Tensor
) -> None:
    model = tiny.make_model(gain=1.0)
    bundle = make_bundle(model=model, certificate=tiny.certify(model, text), uncertified=True)
    opened = open_model(bundle)
    told = facts(opened, ENGINES)
    assert (told["verdict"], told["badge"]["kind"]) == ("Not certified", "no") and "other answers" in told["caution"]
    assert "must not be cached" in told["statement"][0] and told["tiles"][0]["value"] == "variant"
    told = facts(replace(opened, certificate=None), ENGINES)
    assert (told["verdict"], told["tiles"]) == ("No certificate", []) and told["caution"] is not None
    broken = opened.g_lm.clone()
    broken[0, 1, 0, 0] = float("nan")
    head = facts(replace(opened, g_lm=broken), ENGINES)["maps"][0]["heads"][1]
    assert head == {"head": 1, "uri": None, "scale": None}


def test_facts_of_an_older_certificate_and_of_a_constant_model(
    old_files: Path, make_bundle: Make, tiny: SimpleNamespace, text: torch.Tensor
) -> None:
    assert facts(open_model(old_files / "bundle"), ENGINES)["verdict"] == "Certified"
    torch.manual_seed(0)
    model = PLDRModel(replace(tiny.config, g_source="constant")).eval()
    bundle = make_bundle(model=model, certificate=tiny.certify(model, text), uncertified=True)
    told = facts(open_model(bundle), ENGINES)
    assert told["constant"] and told["tiles"][0] == {"value": "constant by construction", "label": "no metric learner"}
    assert len(told["tiles"]) == 2  # nothing was measured that could vary


def test_the_routes_and_the_live_model(make_bundle: Make) -> None:
    opened = open_model(make_bundle(with_metric_learner=True), live=True)
    sentinel = watch(opened, 1.0)
    app = FastAPI()
    live = LiveEngine(opened.live, eos_id=3)  # type: ignore[arg-type]
    add_page(app, opened, {**ENGINES, "name:live": live}, sentinel)
    with TestClient(app) as client:
        shown = client.get("/")
        assert shown.status_code == 200 and shown.text == page()[0] and "text/html" in shown.headers["content-type"]
        assert shown.headers["content-security-policy"] == page()[1]["content-security-policy"]
        assert shown.headers["x-content-type-options"] == "nosniff"
        told = client.get("/page/facts").json()
        assert (
            told["live"] == "name:live"
            and told["same_draws"] is True
            and told["drift"][0]
            == {
                "label": "prompts checked",
                "value": "0",
                "bad": False,
            }
        )
        sentinel.offer([5, 6, 7])
        sentinel.wait()
        assert client.get("/page/facts").json()["drift"][0]["value"] == "1"
        assert client.get("/page/drift").json() == client.get("/page/facts").json()["drift"]
    sentinel.stop()
    app = FastAPI()
    add_page(app, opened, ENGINES)
    with TestClient(app) as client:
        told = client.get("/page/facts").json()
        assert told["live"] is None and told["drift"] is client.get("/page/drift").json() is None


def test_an_engine_that_draws_in_its_own_way_is_said_to(make_bundle: Make) -> None:
    opened = open_model(make_bundle(with_metric_learner=True), live=True)
    live: Any = SimpleNamespace(name="live")
    for engine, same in (("transformers", True), ("vllm", False)):
        named: Any = SimpleNamespace(name=engine)
        assert facts(opened, {"name": named, "name:live": live})["same_draws"] is same


def test_drift_is_told_in_rows() -> None:
    calm = drift_rows(Drift(checked=4, per_head=((1e-8, 2e-8),)), Bound(1e-4, 5e-8))
    assert [row["value"] for row in calm] == ["4", "2e-8", "0", "0"] and not any(row["bad"] for row in calm)
    moved = drift_rows(Drift(checked=4, dropped=2, failed=1, exceeded=3, per_head=((0.5,),)), Bound(1e-4))
    assert {row["label"]: row["value"] for row in moved if row["bad"]} == {
        "largest deviation of G_LM": "0.5",
        "above the allowed 1e-4": "3",
        "failed": "1",
    }


def test_watching_needs_the_metric_learner_and_a_certificate(make_bundle: Make) -> None:
    plain: Any = open_model(make_bundle(), live=None)
    with pytest.raises(ValueError, match="holds no metric learner .*; make the bundle with"):
        watch(plain, 0.5)
    live = open_model(make_bundle("live", with_metric_learner=True), live=True)
    with pytest.raises(ValueError, match="has no certificate to compare with; run `pldr validate`"):
        watch(replace(live, certificate=None), 0.5)
