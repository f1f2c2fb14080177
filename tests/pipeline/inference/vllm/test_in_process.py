"""An export in vLLM's `LLM`: tokens and log-probabilities are our model's, alone, together, and on two ranks."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.inference.runtime import Bundle
from tests.helpers.expected import Case
from tests.helpers.vllm import PYTHON, ROOT, environment, needs_vllm

pytestmark = [pytest.mark.slow, needs_vllm, pytest.mark.timeout(1800)]
TOLERANCE = 1e-5
ROUNDING = 1e-6  # of a log-probability's own size: the tiny, untrained model has some of -30
SCRIPT = Path(__file__).with_name("in_process.py")


def run(
    export: Path, cases: list[Case], folder: Path, *, ranks: int = 1, trust_remote_code: bool = True, **variables: str
) -> dict[str, Any]:
    prompts, new = [case.prompt for case in cases], max(len(case.new) for case in cases)
    request = {"prompts": prompts, "new": new, "ranks": ranks, "trust_remote_code": trust_remote_code}
    (folder / "request.json").write_text(json.dumps(request))
    # apply_model sends a function to the worker, which vLLM allows only where it is told to.
    variables = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", **variables}
    done = subprocess.run(
        [PYTHON, SCRIPT, export, folder / "request.json", folder / "out.json"],
        env=environment(**variables), cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    result: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return result


def worst(got: list[float], expected: list[float]) -> float:
    """The largest difference."""
    assert got == pytest.approx(expected, abs=TOLERANCE, rel=ROUNDING)
    return max(abs(a - b) for a, b in zip(got, expected, strict=True))


def compare(result: dict[str, Any], cases: list[Case]) -> None:
    """All tokens equal, all log-probabilities near; prints the worst (pytest -s)."""
    for way in ("batch", "alone"):
        assert [row["new"] for row in result[way]] == [case.new for case in cases], way
    batch, alone = 0.0, 0.0
    for case, together, single in zip(cases, result["batch"], result["alone"], strict=True):
        assert together["logprobs"][0] is None, "nothing is before the first token"
        batch = max(batch, worst(together["logprobs"][1:], case.logprobs[1:]))
        alone = max(alone, worst(single["logprobs"], case.logprobs[len(case.prompt) :]))
    tokens = sum(len(case.new) for case in cases)
    print(
        f"{len(cases)} prompts, {tokens} tokens equal; log-probabilities within {batch:.1e} together, {alone:.1e} alone"
    )


def test_together_and_alone(export: Path, cases: list[Case], tmp_path: Path) -> None:
    result = run(export, cases, tmp_path)
    compare(result, cases)
    (module,) = result["modules"]
    assert module.startswith("transformers_modules.") and module.endswith(".modeling_pldr"), "the directory's own code"


def test_tensor_parallel_on_two_ranks(export: Path, bundle: Bundle, cases: list[Case], tmp_path: Path) -> None:
    assert bundle.config.num_heads % 2 == 0
    result = run(export, cases, tmp_path, ranks=2)
    assert len(result["modules"]) == 2
    compare(result, cases)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pldr` as `pip install --no-deps` leaves it beside vLLM: a folder for PYTHONPATH, entry points included."""
    source, site = (tmp_path_factory.mktemp("pldr") / name for name in ("source", "site"))
    source.mkdir()
    for name in ("pldr_model", "pipeline", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*"):
        if path.is_file():
            shutil.copy(path, source)
    subprocess.run(
        [PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", site, source],
        env=environment(), check=True,
    )  # fmt: skip
    return site


def test_whoever_has_pldr_installed_needs_no_remote_code(
    export: Path, cases: list[Case], installed: Path, tmp_path: Path
) -> None:
    result = run(export, cases, tmp_path, trust_remote_code=False, PYTHONPATH=str(installed))
    compare(result, cases)
    assert result["modules"] == ["pipeline.inference.hf.modeling_pldr"]


def test_without_the_plugin_the_directorys_code_runs(
    export: Path, cases: list[Case], installed: Path, tmp_path: Path
) -> None:
    result = run(export, cases[:4], tmp_path, PYTHONPATH=str(installed), VLLM_PLUGINS="lora_filesystem_resolver")
    compare(result, cases[:4])
    assert result["modules"][0].startswith("transformers_modules.")
