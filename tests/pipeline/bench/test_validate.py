"""`pldr bench validate`: the parts of a validation, the fit and its error."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.bench import validate as bench
from pipeline.config.post import PostConfig
from pipeline.post.measure.parts import costs, part

POST = PostConfig(prompts=16, min_prompts=16, fp64_prompts=2, effect_prompts=4, generate_tokens=4, generate_prompts=3)


@pytest.fixture
def result(tiny: SimpleNamespace) -> dict:
    return bench.bench(tiny.config, POST, prompts=1, rounds=2)


def test_every_part_of_a_validation_is_timed_at_its_own_number_of_prompts(tiny: SimpleNamespace, result: dict) -> None:
    prompts = {name: found["prompts"] for name, found in result["parts"].items()}
    expected = {"observation, text": 16, "losses, text": 16, "leak, text": 16, "effects": 4, "generation": 3, "fp64": 2}
    expected |= {"search": tiny.config.num_heads, "proof": tiny.config.num_heads}
    assert expected.items() <= prompts.items() and "control" in prompts
    for clock in ("seconds", "cpu_seconds"):
        for found in result["parts"].values():
            assert found[clock]["total"] == pytest.approx(
                found[clock]["fixed"] + found[clock]["each"] * found["prompts"], abs=1e-12
            )
        assert result[clock]["total"] == pytest.approx(sum(f[clock]["total"] for f in result["parts"].values()))
        assert result[clock]["error"] > 0 and result["scatter"][clock] > 0
    assert result["measured"] == 4 and result["measured_prompts"] == 6 and result["tokens"] == 8
    lines = bench.table(result)
    assert lines[-1].startswith("all") and len(lines) == len(prompts) + 2


def test_the_line_and_its_error_are_those_of_least_squares() -> None:
    counts = np.array([1.0, 2.0, 1.0, 2.0])
    line = bench._line(counts, 3.0 + 2.0 * counts)
    assert line == pytest.approx((3.0, 2.0))
    exact = {"a": 3.0 + 2.0 * counts}
    assert bench._scatter(counts, exact, {"a": line}) == pytest.approx(0.0, abs=1e-12)
    rng, scatter = np.random.default_rng(0), 0.1
    totals = []
    for _ in range(4000):
        noisy = bench._line(counts, (3.0 + 2.0 * counts) + 6.0 * scatter * rng.standard_normal(4))
        totals.append(noisy.fixed + noisy.each * 50)
    expected = bench._error(counts, np.full(4, 6.0), scatter, 50)
    assert np.std(totals) == pytest.approx(expected, rel=0.05) and np.mean(totals) == pytest.approx(103.0, rel=0.05)


def test_a_part_counts_without_those_inside_unless_it_is_taken_whole() -> None:
    with part("outside"):
        pass  # nothing counts here
    with costs() as counted:
        with part("outer"), part("inner"):
            time.sleep(0.02)
        with part("whole", whole=True), part("inner"):
            time.sleep(0.04)
    assert counted.wall.keys() == {"outer", "inner", "whole"} == counted.cpu.keys()
    assert (
        counted.wall["inner"] >= 0.02
        and counted.wall["whole"] >= 0.04
        and counted.wall["outer"] < counted.wall["whole"]
    )
