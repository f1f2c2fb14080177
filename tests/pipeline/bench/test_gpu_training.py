"""The training parts of the run on a GPU, on a CPU with a small model: all but CUDA graphs. Says nothing of speed."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from pipeline.bench.gpu import __main__ as run
from pipeline.bench.gpu import pack, parts
from pipeline.bench.gpu.training import checks, speed
from pipeline.bench.gpu.training.floor import step_floor
from pipeline.bench.gpu.training.forms import Form, forms_of
from pipeline.bench.gpu.training.setting import PAPER_350M, TrainSetting
from pipeline.bench.gpu.training.steps import Plain
from pipeline.bench.gpu.training.summary import judge, table

CPU = torch.device("cpu")


@pytest.fixture
def setting(tmp_path: Path) -> TrainSetting:
    return TrainSetting.of(device="cpu", tiny=True, folder=tmp_path)


@pytest.fixture
def forms(setting: TrainSetting) -> dict[str, Form]:
    return forms_of(setting.models["110m"])


def write_fill(folder: Path, *tried: tuple[int, float, bool]) -> None:
    rows = [
        {
            "what": "fill",
            "model": "110m",
            "form": "plga",
            "micro_batch": n,
            "tokens_per_second": speed,
            "leaves_room": room,
        }
        for n, speed, room in tried
    ]
    (folder / "fill.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_limits_of_one_run_are_eight_minutes_together() -> None:
    for what in ("train", "all"):
        names = parts.parts_of(what)  # type: ignore[arg-type]
        assert sum(parts.PARTS[name].seconds for name in names) <= 480, what
    assert {name for name in parts.parts_of("train")} == {name for name, part in parts.PARTS.items() if part.trains}


def test_the_larger_model_has_350_million_parameters() -> None:
    assert PAPER_350M.num_parameters()["total"] == pytest.approx(350e6, rel=0.02)


def test_the_floor_is_the_larger_of_flops_and_bytes(setting: TrainSetting) -> None:
    config = setting.models["110m"]
    tokens = 2 * config.context_length
    of_flops = step_floor(config, 2, rate=1.0, bandwidth=1e30)
    assert of_flops["tokens_per_second"] == pytest.approx(tokens / of_flops["seconds_of_flops"])
    assert of_flops["flops"] == tokens * config.flops_per_token(training=True)
    of_bytes = step_floor(config, 2, rate=1e30, bandwidth=1.0)
    assert of_bytes["tokens_per_second"] == pytest.approx(tokens / of_bytes["bytes"])


def test_forms_are_the_same_loss_but_for_the_shared_g(setting: TrainSetting, forms: dict[str, Form]) -> None:
    models = {name: form.model(CPU).double() for name, form in forms.items()}
    ids_BS = torch.randint(4, 512, (3, 65))
    loss = {name: form.loss(models[name], ids_BS).item() for name, form in forms.items()}
    assert loss["plga-logits"] == pytest.approx(loss["plga"], rel=1e-12)
    assert loss["plga-modules"] == pytest.approx(loss["plga"], rel=1e-9)
    assert loss["plga-triton"] == loss["plga"]  # not on a CPU
    assert loss["plga-shared"] != pytest.approx(loss["plga"], rel=1e-6)
    assert forms["plga-shared"].flops_per_token(8) < forms["plga"].flops_per_token(8)


def test_plain_pytorch_is_adamw_on_fp32_copies_of_bf16_weights(forms: dict[str, Form]) -> None:
    step = Plain(forms["twin"], 2, CPU)
    before = [p.detach().clone() for p in step.masters]
    losses = [step() for _ in range(3)]
    assert losses[2] < losses[0]
    for weight, master, old in zip(step.weights, step.masters, before, strict=True):
        assert weight.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert weight.equal(master.bfloat16()) and not master.equal(old) and weight.grad is None


def test_the_fastest_micro_batch_that_fits_is_taken(setting: TrainSetting) -> None:
    assert setting.micro_batch("110m") == setting.usual  # nothing was tried
    write_fill(setting.folder, (8, 100.0, True), (16, 180.0, True), (32, 170.0, True), (64, 400.0, False))
    assert setting.micro_batch("110m") == 16 and setting.micro_batch("350m") == setting.usual


def test_doubling_ends_where_memory_does(setting: TrainSetting, monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(_: TrainSetting, form: Form, micro_batch: int) -> dict[str, Any]:
        if micro_batch == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return {"fits": True, "leaves_room": True, "tokens_per_second": 1.0}

    monkeypatch.setattr(speed, "_tried", tried)
    rows = list(speed.fill(replace(setting, most=64, models={"110m": setting.models["110m"]})))
    assert [(row["micro_batch"], row["fits"]) for row in rows[:3]] == [(2, True), (4, True), (8, False)]
    assert rows[2]["error"] == "CUDA out of memory. Tried to allocate" and len(rows) == 6  # two forms


def test_a_form_that_cannot_run_costs_the_others_nothing(setting: TrainSetting, forms: dict[str, Form]) -> None:
    def fail() -> Any:
        raise RuntimeError("CUDA error: not permitted when stream is capturing\nsecond line")

    chosen = {"plain plga": forms["plga"], "graph plga": forms["plga"], "plain twin": forms["twin"]}
    make = {
        "plain plga": lambda: Plain(forms["plga"], 2, CPU),
        "graph plga": fail,
        "plain twin": lambda: Plain(forms["twin"], 2, CPU),
    }
    rows = list(speed.in_turn(setting, "110m", "captured", 2, chosen, make))
    trained = {row["form"]: row for row in rows if row["what"] == "train"}
    assert trained["graph plga"]["error"] == "RuntimeError: CUDA error: not permitted when stream is capturing"
    plga, twin = trained["plain plga"], trained["plain twin"]
    assert plga["ratios"]["plain twin"] == pytest.approx(1 / twin["ratios"]["plain plga"], rel=0.5)
    assert plga["loss"] > 0 and plga["tokens_per_second"] > 0 and plga["mfu"] is None


def row(form: str, mode: str, **changes: Any) -> dict[str, Any]:
    return {
        "what": "train",
        "model": "110m",
        "form": form,
        "mode": mode,
        "micro_batch": 64,
        "mfu": 0.5,
        "ratios": {},
    } | changes


def test_what_was_wanted_stands_beside_what_was_seen() -> None:
    assert all(each.met is None for each in judge([{"what": "machine"}]))
    rows = [
        row("ours plga", "compiled", mfu=0.44, ratios={"ours twin": 0.95, "plain plga": 0.96}),
        row("ours plga", "eager", mfu=0.3, ratios={"ours twin": 0.8, "plain plga": 0.99}),
        row("ours plga", "captured", error="no"),
        {"what": "loader", "share": 0.002},
        {"what": "checkpoint", "stall": 0.02, "checkpoint_every": 2000},
        {"what": "resume", "bit_equal": True},
        {"what": "tests", "exit_code": 1, "passed": 3, "failed": 1, "skipped": 0},
    ]
    met = {each.what: each.met for each in judge(rows)}
    assert list(met.values()) == [False, True, None, False, True, False, True, False]
    assert "| MFU in bf16, 110M | >= 0.45 | 0.44 | **missed** | compiled, micro batch 64 |" in table(judge(rows))


def test_test_results_are_counted(tmp_path: Path) -> None:
    report = tmp_path / "report-of-pytest.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="good"/>'
        '<testcase classname="a" name="bad"><failure message="assert 1 == 2&#10;more">trace</failure></testcase>'
        '<testcase classname="a" name="left"><skipped message="no CUDA device"/></testcase></testsuite></testsuites>'
    )
    found = checks.read(report)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert found["failures"] == {"a::bad": "assert 1 == 2"} and found["reasons"] == {"a::left": "no CUDA device"}


def test_every_packed_package_has_a_locked_version(repository: Path) -> None:
    versions = pack.locked_versions((repository / "constraints.txt").read_text())
    names = [pack.canonical(name) for name in (*pack.BUILT, *pack.MISSING)]
    assert len(set(names)) == len(names) and not set(names) - set(versions)


def test_what_packed_packages_and_ours_need_is_packed_too_or_there(repository: Path) -> None:
    """`pip install --no-deps` does not look."""
    ours = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["dependencies"]
    packed = [*pack.BUILT, *pack.MISSING]
    asked = [Requirement(text) for text in [*ours, *(text for name in packed for text in requires(name) or [])]]
    names = {pack.canonical(each.name) for each in asked if each.marker is None or each.marker.evaluate({"extra": ""})}
    assert not names - {pack.canonical(name) for name in (*packed, *pack.THERE, *pack.LEFT_OUT)}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_training_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part but the compiled ones, each a process, with DeepSpeed, the data stages and checkpoints."""
    names = [
        name
        for name in parts.parts_of("train")
        if name not in ("train-compiled", "train-graphs", "train-large", "tests")
    ]
    assert run.main([str(tmp_path), "--device", "cpu", "--tiny", "--patience", "20", "--parts", *names]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    found = {name: part["found"][1:] for name, part in result["parts"].items()}
    first = {each["form"]: each["loss"] for each in found["train-eager"] if each["what"] == "train"}
    assert first["ours plga"] == pytest.approx(first["plain plga"], rel=1e-2)  # the same weights and sequences
    assert set(first) == {label for group in speed.GROUPS for label in group}
    loader, checkpoint = found["trainer"]
    assert loader["tokens"] == "data stages" and 0 <= loader["share"] < 1 and checkpoint["bytes"] > 0
    assert found["resume"][0]["bit_equal"] and list(found["resume"][0]["losses"]) == ["3", "4"]
    met = {each["what"]: each["met"] for each in result["wanted"]}
    assert met["a resumed run, train.deterministic, bf16"] and met["MFU in bf16, 110M"] is None
    assert "A rehearsal" in capsys.readouterr().out
