"""The page at `/`: type a prompt, watch the text come, with the certificate beside it. One answer, no build, no network.

`/` is the same for every model: page.html with the scripts beside it and the style of our other pages put in. What it shows of
this model comes from `/page/facts`, which asks for the token where there is one.
Decision: the content security policy names the hashes of that one script and that one style, and allows nothing but requests to
this server and pictures in data URIs: text of the model cannot become code or markup.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from pipeline.bundle.certificate.statement import rounded_up
from pipeline.inference.opened import OpenModel
from pipeline.inference.serve.engine import Engine
from pipeline.inference.serve.live import LIVE
from pipeline.inference.serve.sentinel import Bound, Drift, Sentinel, bound_of
from pipeline.report.head_maps import head_maps
from pipeline.report.numbers import number, short

WEB = Path(__file__).parent / "web"
STYLE = Path(__file__).parents[2] / "report" / "page.css"
SCRIPTS = tuple(WEB / f"{name}.js" for name in ("server", "answer", "compare", "token", "about", "form", "start"))
OWN_DRAWS = ("vllm",)  # engines that draw tokens in their own way: with the same seed the live model draws others
NEVER_KEPT = {"cache-control": "no-store"}
TIERS = {
    "at round-off": "no variation but rounding",
    "invariant": "varies a little above rounding",
    "constant by construction": "no metric learner",
}


def add_page(app: FastAPI, opened: OpenModel, engines: Mapping[str, Engine], sentinel: Sentinel | None = None) -> None:
    """The routes `/`, `/page/facts` and `/page/drift`. engines: by model id, that of the cached model first."""
    html, headers = page()
    unchanging = functools.cache(functools.partial(facts, opened, engines))

    def show(_: Request) -> Response:
        return HTMLResponse(html, headers=headers)

    def about(_: Request) -> Response:  # in a thread: the first time it draws pictures
        return JSONResponse({**unchanging(), "drift": drift()}, headers=NEVER_KEPT)

    def drift() -> list[dict[str, Any]] | None:
        return None if sentinel is None else drift_rows(sentinel.drift(), sentinel.bound)

    def drifted(_: Request) -> Response:
        return JSONResponse(drift(), headers=NEVER_KEPT)

    for path, endpoint in (("/", show), ("/page/facts", about), ("/page/drift", drifted)):
        app.router.routes.append(Route(path, endpoint=endpoint, methods=["GET"]))


def page() -> tuple[str, dict[str, str]]:
    """The page, and the headers that it is sent with."""
    html = (WEB / "page.html").read_text(encoding="utf-8")
    for place, files in (("style", (STYLE,)), ("scripts", SCRIPTS)):
        html = html.replace(f"/* {place} */", "\n".join(file.read_text(encoding="utf-8") for file in files))
    policy = {
        "default-src": "'none'",
        "script-src": _hash_of(html, "script"),
        "style-src": _hash_of(html, "style"),
        "img-src": "data:",
        "connect-src": "'self'",
        **dict.fromkeys(("base-uri", "form-action", "frame-ancestors"), "'none'"),
    }
    return html, {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def _hash_of(html: str, tag: str) -> str:
    """The hash by which a policy allows the one inline element of this name."""
    begin, end = f"<{tag}>", f"</{tag}>"
    assert html.count(begin) == html.count(end) == 1, f"the page has one {tag}"
    content = html.partition(begin)[2].partition(end)[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def facts(opened: OpenModel, engines: Mapping[str, Engine]) -> dict[str, Any]:
    """What the page shows of a model, as plain values and words."""
    name = next(iter(engines))
    live = name + LIVE if name + LIVE in engines else None
    config, certificate = opened.config, opened.certificate
    deviation = None if certificate is None else certificate["measures"]["deviations"].get("fp32", {}).get("G_LM")
    maps = head_maps(opened.g_lm, deviation and deviation["per_head"])
    heads = [head for layer in maps for head in layer["heads"]]
    for head in heads:
        head["scale"] = None if head["scale"] is None else f"{head['scale']:.2g}"
    sizes = (config.num_layers, config.num_heads, config.head_dim)
    return {
        "name": name,
        "live": live,
        "same_draws": live is not None and engines[name].name not in OWN_DRAWS,
        "context": config.context_length,
        "sizes": " · ".join(
            (
                f"{short(config.num_parameters()['total'])} parameters",
                "{} layers \N{MULTIPLICATION SIGN} {} heads \N{MULTIPLICATION SIGN} {}".format(*sizes),
                f"context {config.context_length:,} tokens",
                f"{opened.kind} {opened.sha256[:12]}",
            )
        ),
        "caution": None
        if opened.certified
        else "Not certified: the cached G_LM may give other answers than the model itself.",
        "constant": certificate is not None and certificate["constant_by_construction"],
        **_verdict(opened),
        "tiles": [] if certificate is None else _tiles(certificate),
        "maps": maps,
        "left_out": config.num_layers * config.num_heads - len(heads),
    }


def _verdict(opened: OpenModel) -> dict[str, Any]:
    certificate = opened.certificate
    if certificate is None:
        return {
            "badge": {"text": "no certificate", "kind": "none"},
            "verdict": "No certificate",
            "statement": [
                "Whether its cached G_LM gives the model's own answers was not measured, or not for these weights."
            ],
        }
    verdict = "Certified" if opened.certified else "Not certified"
    return {
        "badge": {"text": verdict.lower(), "kind": "yes" if opened.certified else "no"},
        "verdict": verdict,
        "statement": [f"{sentence}." for sentence in certificate["statement"].split(". ")],
    }


def _tiles(certificate: Mapping[str, Any]) -> list[dict[str, str]]:
    """The numbers most asked for."""
    bound, tier = bound_of(certificate), certificate["tier"]
    meaning = TIERS.get(tier, "G_LM depends on the input")
    if tier == "proven" and bound.proven is not None:
        meaning = f"G_LM deviates by at most {number(rounded_up(bound.proven))}, for every input"
    tiles = [{"value": tier, "label": meaning}]
    if bound.measured is not None and not certificate["constant_by_construction"]:
        tiles.append(
            {
                "value": number(bound.measured),
                "label": f"largest deviation measured in fp32; allowed {number(bound.allowed)}",
            }
        )
    losses, agreement = certificate["measures"]["losses"], certificate["measures"]["agreement"].get("cached", {})
    if losses.get("cached") is not None:
        tiles.append({"value": f"{losses['cached']:.4f}", "label": "held-out loss, cached (nats)"})
    if agreement.get("kl") is not None and not certificate["constant_by_construction"]:
        tiles.append({"value": number(agreement["kl"]), "label": "KL, live from cached (nats a token)"})
    return tiles


def drift_rows(drift: Drift, bound: Bound) -> list[dict[str, Any]]:
    """The sentinel's numbers."""
    measured = (
        [] if bound.measured is None else [("above the certificate's prompts", f"{drift.above_measured:,}", False)]
    )
    rows = [
        ("prompts checked", f"{drift.checked:,}", False),
        ("largest deviation of G_LM", number(drift.largest) if drift.checked else "-", drift.exceeded > 0),
        *measured,
        (f"above the allowed {number(bound.allowed)}", f"{drift.exceeded:,}", drift.exceeded > 0),
        *([("not checked, queue full", f"{drift.dropped:,}", False)] if drift.dropped else []),
        *([("failed", f"{drift.failed:,}", True)] if drift.failed else []),
    ]
    return [{"label": label, "value": value, "bad": bad} for label, value, bad in rows]
