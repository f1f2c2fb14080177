"""Exports with int8 weights and with low-rank keys in vLLM: the tokens of our model with the same numbers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.inference.hf.export import export_hf
from pipeline.inference.runtime import Bundle
from pipeline.inference.source import open_model
from pldr_model.decode.low_rank import truncate_g
from pldr_model.generation import generate
from pldr_model.model import PLDRModel
from tests.helpers.expected import Case
from tests.helpers.vllm import needs_vllm
from tests.pipeline.inference.vllm.test_in_process import compare, run

pytestmark = [pytest.mark.slow, needs_vllm, pytest.mark.timeout(1800)]


@pytest.fixture
def torchao(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH that holds our torchao and nothing else."""
    spec = importlib.util.find_spec("torchao")
    if spec is None or spec.origin is None:
        pytest.skip("no torchao; pip install 'pldr[hf-int8]'")
    (tmp_path / "site").mkdir()
    package = Path(spec.origin).parent
    for folder in (package, package.with_name(f"torchao-{importlib.metadata.version('torchao')}.dist-info")):
        (tmp_path / "site" / folder.name).symlink_to(folder)
    return tmp_path / "site"


def again(model: PLDRModel, cases: list[Case]) -> list[Case]:
    """What another model says to the same prompts."""
    prompts = [case.prompt for case in cases]
    new = generate(model, prompts, max_new_tokens=max(len(case.new) for case in cases), eos_id=model.config.eos_id)
    return [Case(prompt, ids, _logprobs(model, prompt + ids)) for prompt, ids in zip(prompts, new, strict=True)]


@torch.inference_mode()
def _logprobs(model: PLDRModel, ids: list[int]) -> list[float]:
    scores = model(torch.tensor([ids]), padded=False)[0].log_softmax(-1)
    return [math.nan, *(scores[i, token].item() for i, token in enumerate(ids[1:]))]


def test_int8(bundle: Bundle, bundle_folder: Path, cases: list[Case], torchao: Path, tmp_path: Path) -> None:
    export_hf(open_model(bundle_folder), tmp_path / "export", dtype="int8")
    expected = again(open_model(tmp_path / "export").model, cases)
    compare(run(tmp_path / "export", expected, tmp_path, PYTHONPATH=str(torchao)), expected)


def test_a_packed_output_layer_is_refused(
    bundle_folder: Path, cases: list[Case], torchao: Path, tmp_path: Path
) -> None:
    export_hf(open_model(bundle_folder), tmp_path / "export", dtype="int8", pack_output=True)
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # so that the reason is the last line
    with pytest.raises(AssertionError, match="not for vLLM: its output layer is int8"):
        run(tmp_path / "export", cases[:1], tmp_path, PYTHONPATH=str(torchao), **one_process)


def test_low_rank_keys(bundle_folder: Path, cases: list[Case], tmp_path: Path) -> None:
    opened = open_model(bundle_folder)
    config = opened.config
    ranks = torch.full((config.num_layers, config.num_heads), config.head_dim // 2)
    model = PLDRModel(config, g_lm_LHKK=opened.g_lm).eval()
    model.load_state_dict({**opened.model.state_dict(), "g_lm": truncate_g(opened.g_lm, ranks)})
    export_hf(replace(opened, held=model, key_ranks=ranks), tmp_path / "export")
    expected = again(model, cases)
    compare(run(tmp_path / "export", expected, tmp_path), expected)
