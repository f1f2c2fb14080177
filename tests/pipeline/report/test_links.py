"""Links between the pages of a run: relative, and honest about what is not there yet."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest

from pipeline.report.links import CERTIFICATE, DATA, EVALUATION, TRAINING, Link, links, mlflow_link


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run directory with a certificate, whose name needs quoting."""
    folder = tmp_path / "runs" / "50% of #1?"
    for place in (CERTIFICATE, TRAINING):
        (folder / place).parent.mkdir(parents=True)
        (folder / place).write_text("page")
    return folder


def test_links_lead_to_the_pages_also_after_the_run_directory_was_moved(root: Path, tmp_path: Path) -> None:
    found = {link.label: link for link in links(root / TRAINING, root)}
    assert list(found) == ["Certificate", "Evaluation", "Data report"] and found["Certificate"].note == ""
    assert found["Data report"].note == "not made yet:" and found["Data report"].command == "pldr data report CONFIG"
    moved = tmp_path / "elsewhere"
    shutil.move(root, moved)
    (moved / DATA).write_text("page")
    (moved / EVALUATION).parent.mkdir()
    (moved / EVALUATION).write_text("page")
    for label in found:
        assert (moved / TRAINING).parent.joinpath(unquote(found[label].href or "")).resolve().is_file()


def test_a_page_outside_of_the_run_directory_and_a_child_of_a_sweep(root: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    found = {link.label: link.href for link in links(page, root, in_sweep=True)}
    assert list(found) == ["Run report", "Certificate", "Evaluation", "Data report", "Sweep"]
    assert found["Certificate"] == "runs/50%25%20of%20%231%3F/certificate/certificate.html"
    assert found["Sweep"] == "report/sweep.html"


def test_mlflow_is_an_address_or_a_command_and_shows_no_secret() -> None:
    assert mlflow_link("https://me:secret@host/base/", "abc") == Link("MLflow", "https://host/base/#/runs/abc")
    assert mlflow_link("sqlite:////runs/a b/mlflow.db", "abc").command == (
        "mlflow ui --backend-store-uri 'sqlite:////runs/a b/mlflow.db'"
    )
    assert mlflow_link("http://host", None).command == "pldr track replay CONFIG"
