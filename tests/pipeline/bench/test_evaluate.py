"""`pldr bench evaluate` compares what it says it does, at any size. No timing is checked here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from pipeline.bench.evaluate import SHAPES, Shape, make_requests, row


@pytest.mark.parametrize("has_weights", [False, True])
def test_both_score_the_same_requests_of_any_model(
    make_finished: Callable[..., Path], capsys: pytest.CaptureFixture[str], has_weights: bool, tmp_path: Path
) -> None:
    config = make_finished()
    run_dir = [] if has_weights else [f"run_dir={tmp_path / 'none'}"]
    words = ["bench", "evaluate", str(config), *run_dir, "--questions", "2", "--repeats", "1", "--batch", "3", "--json"]
    assert main(words) == 0
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    assert result["random_weights"] is not has_weights and result["batch"] == 3
    assert result["tasks"].keys() == SHAPES.keys() and len(out) == len(SHAPES) + 1
    for found in result["tasks"].values():
        assert found["difference"] < 1e-4 and found["ours"] > 0 and found["hf"] > 0


def test_requests_have_the_shape_and_are_the_same_each_time() -> None:
    shape = Shape(4, (30.0, 10.0), (5.0, 3.0))
    found = make_requests(shape, 200, vocab_size=32000, context_length=1024)
    assert found == make_requests(shape, 200, vocab_size=32000, context_length=1024) and len(found) == 800
    contexts, answers = ([len(one[part]) for one in found] for part in (0, 1))
    assert sum(contexts) / 800 == pytest.approx(30, rel=0.1) and sum(answers) / 800 == pytest.approx(5, rel=0.1)
    assert all(found[i][0] == found[i + 3][0] for i in range(0, 800, 4))
    small = make_requests(shape, 20, vocab_size=8, context_length=12)
    assert all(len(context) <= 6 and len(answer) <= 6 and max(context) < 8 for context, answer in small)


def test_a_line_says_whether_the_target_is_met() -> None:
    found: dict[str, Any] = {"tokens": 10, "ours": 8.0, "hf": 10.0, "ratio": 0.8, "difference": 1e-6}
    assert "ratio 0.80 (at least 0.8: met)" in row("x", found)
    assert "NOT met" in row("x", {**found, "ratio": 0.79})


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["evaluate"], "name one model"),
        (["evaluate", "a", "b"], "name one model"),
        (["evaluate", "a", "--questions", "0"], "--questions 0: at least 1"),
        (["evaluate", "a", "--steps", "3"], "takes no steps"),
        (["evaluate", "/nowhere"], "/nowhere: no such file or folder"),
    ],
)
def test_wrong_use_is_one_line(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) in (1, 2)
    errors = capsys.readouterr().err
    assert part in errors and errors.count("\n") == 1
