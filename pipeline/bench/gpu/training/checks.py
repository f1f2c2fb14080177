"""`pytest -m gpu` as a part: how many tests passed, and what failed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pipeline.bench.gpu.training.setting import TrainSetting

ROOT = Path(__file__).resolve().parents[4]
MARK = "pytest.mark.gpu"  # only files with it are collected: the others import more than a bare machine has


def tests(setting: TrainSetting) -> Iterator[dict[str, Any]]:
    """The tests marked `gpu`, on a CPU as a rehearsal."""
    report = setting.folder / "report-of-pytest.xml"
    report.unlink(missing_ok=True)
    rehearsed = setting.device.type != "cuda"
    device = {"PLDR_GPU_TESTS": "cpu"} if rehearsed else {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "0"}
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report.absolute()}",
    ]
    files = [
        file for file in sorted((ROOT / "tests").rglob("test_*")) if file.suffix == ".py" and MARK in file.read_text()
    ]
    code = subprocess.run([*words, *map(str, files)], cwd=ROOT, env={**os.environ, **device}).returncode
    yield {"what": "tests", "exit_code": code, "rehearsed": rehearsed, **(read(report) if report.is_file() else {})}


def read(report: Path) -> dict[str, Any]:
    """How many tests passed, were skipped and failed, and of those the first line of each message."""
    counts, failures, skipped = {"passed": 0, "skipped": 0, "failed": 0}, {}, {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        bad = [each for kind in ("failure", "error") for each in case.iter(kind)]
        left = case.find("skipped")
        counts["failed" if bad else "passed" if left is None else "skipped"] += 1
        if bad:
            failures[name] = (bad[0].get("message") or "").split("\n")[0]
        if left is not None:
            skipped[name] = left.get("message") or ""
    return {**counts, "failures": failures, "reasons": skipped}
