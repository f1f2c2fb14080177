"""The run on a GPU, on a CPU with a small model: the same way but for CUDA graphs and the compiler. Says nothing of speed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.bench.gpu import __main__ as run
from pipeline.bench.gpu import correct, parts
from pipeline.bench.gpu.setting import Form
from pldr_model.decode.decoder import Decoder

FORMS = {"fp32", "bf16", "int8"}


def lines_of(name: str, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    parts.run_part(name, folder / "found.jsonl", device="cpu", tiny=True, reference=changes.get("reference"))
    return [json.loads(line) for line in (folder / "found.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _same_precision() -> Any:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_the_floor_is_bytes_over_bandwidth(tmp_path: Path) -> None:
    machine, bandwidth, *rows = lines_of("floor", tmp_path)
    assert machine["what"] == "machine" and {row["form"] for row in rows} == FORMS | {"bf16_low_rank"}
    for row in rows:
        expected = row["batch"] * bandwidth["copy_gb_per_second"] * 1e9 / row["bytes"]
        assert row["tokens_per_second"] == pytest.approx(expected)
    by_form = {row["form"]: row["bytes"] for row in rows if (row["batch"], row["cached"]) == (1, 8)}
    assert by_form["fp32"] == 2 * by_form["bf16"] > 2 * by_form["int8"]


def test_every_form_agrees_with_fp64(tmp_path: Path) -> None:
    rows = lines_of("correct", tmp_path)[1:]
    assert {row["form"] for row in rows} == set(correct.TOLERANCE)
    assert all(row["passed"] and row["captured_is_eager"] for row in rows), rows


def test_a_wrong_decoder_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(Decoder):
        def step(self, ids_B: torch.Tensor, cache: Any) -> torch.Tensor:
            cache.length_B.sub_(1)  # writes over the last key, and rotates by the last position
            logits_BV = super().step(ids_B, cache)
            cache.length_B.add_(1)
            return logits_BV

    made = Form.contender

    def contender(form: Form) -> Any:
        found = made(form)
        found.decoder.__class__ = Late
        return found

    monkeypatch.setattr(Form, "contender", contender)
    assert not any(row["passed"] for row in lines_of("correct", tmp_path)[1:])


@pytest.mark.parametrize(("part", "forms"), [("eager", FORMS | {"bf16_sdpa"}), ("captured", FORMS | {"bf16_sdpa"})])
def test_steps_of_every_form_and_batch(part: str, forms: set[str], tmp_path: Path) -> None:
    rows = lines_of(part, tmp_path)[1:]
    assert {(row["form"], row["batch"]) for row in rows} == {(form, batch) for form in forms for batch in (1, 2)}
    assert all(row["mode"] == part and row["share"] > 0 and row["step_ms"] > 0 for row in rows)


def test_long_caches_compare_low_rank_with_full_keys(tmp_path: Path) -> None:
    rows = lines_of("long", tmp_path)[1:]
    assert {(row["form"], row["cached"]) for row in rows} == {("bf16", 40), ("bf16_low_rank", 40)}
    assert all("ratio_to_bf16" in row for row in rows)


def test_products_and_generation(tmp_path: Path) -> None:
    rows = lines_of("products", tmp_path)[1:]
    assert {row["way"] for row in rows} == {"fp32", "bf16", "int8 unpacked", "int8 aten"}
    assert all("error" in row or row["gb_per_second"] > 0 for row in rows)
    rows = lines_of("generation", tmp_path)[1:]
    assert [(row["batch"], row["sampled"]) for row in rows] == [(1, False), (1, True), (2, False), (2, True)]


def test_without_its_code_the_reference_is_left_out(tmp_path: Path) -> None:
    assert "left_out" in lines_of("reference", tmp_path)[1]


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole run, each part a process: `reference` finds a folder without code, `transformers` has no time."""
    monkeypatch.setitem(parts.PARTS, "transformers", parts.PARTS["transformers"]._replace(seconds=0.2))
    names = ["floor", "reference", "transformers", "correct"]
    words = [str(tmp_path), "--device", "cpu", "--tiny", "--reference", str(tmp_path), "--parts", *names]
    assert run.main(words) == 1
    found = json.loads((tmp_path / "result.json").read_text())["parts"]
    assert "error" not in found["floor"] and "error" not in found["correct"]
    assert "ModuleNotFoundError" in found["reference"]["error"] and found["reference"]["found"][0]["what"] == "machine"
    assert found["transformers"]["error"] == "stopped after 0 s"


def test_when_the_time_is_over_the_rest_is_named(tmp_path: Path) -> None:
    assert run.main([str(tmp_path), "--device", "cpu", "--tiny", "--seconds", "0", "--parts", "floor"]) == 1
    assert json.loads((tmp_path / "result.json").read_text())["parts"]["floor"]["error"] == "no time left"


def test_no_heavy_package_is_imported(tmp_path: Path) -> None:
    """A bare machine has torch, transformers and what they need."""
    import subprocess

    code = "import sys, pipeline.bench.gpu.parts; print([m for m in sys.argv[1:] if m in sys.modules])"
    names = ["mlflow", "deepspeed", "pydantic", "datatrove", "transformers", "sentencepiece", "pipeline.config"]
    out = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
