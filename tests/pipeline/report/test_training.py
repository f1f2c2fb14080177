"""The training report: escaped values, nothing loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.report.training import write_run_report

FACTS = {
    "run_id": "abc",
    "name": "<script>alert(1)</script>",
    "status": "RUNNING",
    "started": "2026-11-25",
    "uri": "sqlite:///x",
    "verdict": None,
    "checkpoints": ["step-000100"],
}


@pytest.mark.parametrize("histories", [{}, {"train/loss": [(10, 2.0), (20, 1.5)], "val/loss_cached": [(20, 1.6)]}])
def test_the_page_escapes_and_loads_nothing(tmp_path: Path, histories: dict[str, Any]) -> None:
    params = {"train.steps": "20", "data.sources": "https://host/x?token=SECRET"}
    result = write_run_report(
        FACTS, params, {"resumed.10.train.zero_stage": "1 -> 3"}, histories, tmp_path / "run.html"
    )
    text = (tmp_path / "run.html").read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and "SECRET" not in text and "http-equiv" in text
    assert "1 -&gt; 3" in text and ("<polyline" in text) == bool(histories)
    assert result["step"] == (20 if histories else 0) and ("train/loss" in result) == bool(histories)
