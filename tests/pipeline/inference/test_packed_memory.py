"""Packed bundles stay packed: what a process holds that only generates and scores."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.bundle.format import bundle_tensors, certified_files
from pipeline.bundle.formats import Packed, pack
from pipeline.inference.runtime import Bundle
from pipeline.io.storage import sha256_file
from pipeline.io.tensors import sha256_tensors
from pipeline.post.package.bundle import build_bundle
from pldr_model.decode import decoder
from pldr_model.model import PLDRModel, g_shape
from tests.helpers.bundles import measured
from tests.helpers.models import CONFIG, LINEAGE

Make = Callable[..., Path]

USE = """
import json, sys, torch
from pldr import load

def memory():
    facts = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {name: int(facts[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}

torch.set_num_threads(1)
import pldr_model.decode.decoder, pipeline.inference.runtime
before = memory()["VmRSS"]
model = load(sys.argv[1])
model.generate(["the quick"], max_new_tokens=4)
model.score("the quick", [" brown fox"])
after = memory()
print(json.dumps({"held": after["VmRSS"] - before, "most": after["VmHWM"] - before}))
"""


def fp32_matrices(least: int) -> list[tuple[int, ...]]:
    """Shapes of the fp32 matrices of at least so many numbers in this process."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    return [tuple(t.shape) for t in tensors if t.dtype == torch.float32 and t.ndim == 2 and t.numel() >= least]


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4"])
def test_generating_and_scoring_makes_no_fp32_matrix(
    make_bundle: Make, invariant: PLDRModel, text: torch.Tensor, weight_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "CACHED", 0)  # else matrices as small as these are unpacked
    bundle = make_bundle(packed=measured(invariant, text, weight_format), uncertified=True)
    least = min(t.numel() for t in bundle_tensors(invariant).values() if t.ndim == 2)
    before = fp32_matrices(least)
    with pytest.warns(Warning, match="UNCERTIFIED"):
        model = Bundle.load(bundle)
    completions = model.generate(["the quick", "brown"], max_new_tokens=5)
    scored = model.score("the quick", [" brown fox"])
    assert sorted(fp32_matrices(least)) == sorted(before)
    unpacked = Bundle(replace(model.opened, held=model.opened.model))  # what was there to be made
    assert len(fp32_matrices(least)) > len(before)
    near = 1e-4 if weight_format == "int8" else 1e-2  # the others' kernels round activations to bf16
    assert unpacked.score("the quick", [" brown fox"])[0].logprob == pytest.approx(scored[0].logprob, rel=near)
    assert weight_format != "int8" or unpacked.generate(["the quick", "brown"], max_new_tokens=5) == completions


def large_bundle(
    out: Path, tokenizer: Path, certificate: dict[str, Any], section: dict[str, Any] | None
) -> tuple[Path, int]:
    """A random model of about 100M parameters, uncertified: its certificate is that of a tiny one with as many layers and
    heads, with this one's sizes and hashes. Returns the bundle, and the bytes of its weights in fp32."""
    config = replace(CONFIG, head_dim=1024 // CONFIG.num_heads, d_ff=50_000_000 // (3 * 1024), A_dff=4)
    torch.manual_seed(0)
    model = PLDRModel(config).eval().requires_grad_(False)
    g_lm = torch.randn(g_shape(config)) / 8
    weights = bundle_tensors(model)
    named = {"model": {**config.to_dict(), "num_parameters": config.num_parameters()["total"]}}
    packed = None
    if section is not None:
        tensors = pack(weights, section["format"])
        packed = Packed(tensors, {**section, "sha256": sha256_tensors(tensors)})
    build_bundle(
        model,
        g_lm,
        certificate={**certificate, **named, "files": certified_files(model, g_lm)},
        tokenizer=tokenizer,
        out=out,
        lineage={**LINEAGE, "tokenizer_sha256": sha256_file(tokenizer)},
        uncertified=True,
        packed=packed,
    )
    return out, sum(tensor.nbytes for tensor in weights.values())


@pytest.mark.slow
def test_a_process_that_generates_takes_a_third_of_the_memory(
    invariant: PLDRModel,
    text: torch.Tensor,
    certificate: dict[str, Any],
    tokenizer_path: Path,
    tmp_path: Path,
    repository: Path,
) -> None:
    """100M, int8 against fp32: the process's memory above what Python, torch and our code take."""
    section = measured(invariant, text, "int8").section
    taken = {}
    for name, own in (("fp32", None), ("int8", section)):
        bundle, fp32_bytes = large_bundle(tmp_path / name, tokenizer_path, certificate, own)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", USE, str(bundle)], capture_output=True, text=True, cwd=repository
        )
        assert done.returncode == 0, done.stderr
        taken[name] = json.loads(done.stdout)
    print(taken, fp32_bytes)
    assert taken["fp32"]["held"] > 0.95 * fp32_bytes
    assert taken["int8"]["held"] <= 0.35 * taken["fp32"]["held"]
    assert taken["int8"]["most"] <= 0.5 * taken["fp32"]["most"]  # one matrix at a time is packed again
