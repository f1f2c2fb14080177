"""Links from one page of a run to the others, and to its MLflow run.

Links are relative, so that they hold wherever the run directory is moved. A page that does not exist yet is linked too, with
the command that makes it: pages are written at different times, and none is written again for the sake of its links.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pipeline.io.urls import is_http, without_secrets

TRAINING, CERTIFICATE, DATA = "report/training.html", "certificate/certificate.html", "report/data.html"
EVALUATION = "evaluation/evaluation.html"
SWEEP = "report/sweep.html"  # of a sweep's directory, two above its children's
PAGES = (  # below the run directory
    ("Run report", TRAINING, "pldr report CONFIG"),
    ("Certificate", CERTIFICATE, "pldr validate CONFIG"),
    ("Evaluation", EVALUATION, "pldr evaluate CONFIG"),
    ("Data report", DATA, "pldr data report CONFIG"),
)


@dataclass(frozen=True)
class Link:
    """Where to look. href: None where there is no address, only a command. note: of a page that is not there yet, or in
    place of the address; `command` makes it, or opens it."""

    label: str
    href: str | None
    note: str = ""
    command: str = ""


def links(page: Path, root: Path, *, mlflow: Link | None = None, in_sweep: bool = False) -> list[Link]:
    """The other pages of the run in `root`, as seen from the file `page`, and its MLflow run."""
    places = [(label, root / place, command) for label, place, command in PAGES]
    if in_sweep:
        places.append(("Sweep", root.parent.parent / SWEEP, "pldr sweep SWEEP"))
    found = [link(label, page, place, command) for label, place, command in places if place != page]
    return [*found, *([mlflow] if mlflow is not None else [])]


def link(label: str, page: Path, target: Path, command: str) -> Link:
    """One page as seen from another."""
    href = quote(Path(os.path.relpath(target, page.parent)).as_posix())
    return Link(label, href) if target.exists() else Link(label, href, "not made yet:", command)


def mlflow_link(uri: str, run_id: str | None) -> Link:
    """A run in MLflow: its address at a server, or the command that shows a store of files or a database. run_id: None where
    MLflow has not made the run yet."""
    if run_id is None:
        return Link("MLflow", None, "does not have this run yet:", "pldr track replay CONFIG")
    shown = without_secrets(uri)
    if is_http(shown):
        return Link("MLflow", f"{shown.rstrip('/')}/#/runs/{quote(run_id)}")
    return Link("MLflow", None, f"run {run_id}:", f"mlflow ui --backend-store-uri {shlex.quote(shown)}")
