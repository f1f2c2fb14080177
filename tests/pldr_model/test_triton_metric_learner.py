"""The Triton kernels in Triton's interpreter, on a CPU, against the modules in fp64. Says nothing of a GPU's compiler or speed.

Triton decides at its import whether it interprets, so the comparison is a process of its own. Half precision is fp16: the
interpreter holds bf16 as integers, and multiplies those.
"""

import os
import subprocess
import sys

import pytest

WORKER = """
import torch
from pldr_model import triton_metric_learner as ours
from tests.pldr_model.test_metric_learner import gradients, learner

ours.ROWS = ours.HIDDEN = 16
for units, glus, rows in ((2, 2, 20), (1, 3, 5)):
    module = learner(units, glus)
    x = torch.randn(rows, 6, dtype=torch.float64)
    out, *expected = gradients(module, x, fused=False)
    loss_weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 0.02)):
        weights = [weight.detach().to(dtype) for weight in module.weights()]
        split = 4 * units * glus
        kept = ours.learn(x.to(dtype), weights[:split], weights[split:], module.eps)
        got = ours.learn_backward(loss_weights.to(dtype), kept[1:], weights[:split], weights[split:], module.eps, True)
        by_weight = dict(zip(map(id, module.weights()), got[1:], strict=True))
        pairs = [(kept[0], out), (got[0], expected[0])]
        pairs += [(by_weight[id(p)], e) for p, e in zip(module.parameters(), expected[1:], strict=True)]
        assert all(one.dtype == dtype and one.shape == other.shape for one, other in pairs)
        worst = max(float((one.double() - other).abs().max() / other.abs().max()) for one, other in pairs)
        print("WORST", dtype, worst, flush=True)
        assert worst <= tolerance
    assert ours.learn_backward(loss_weights.to(dtype), kept[1:], weights[:split], weights[split:], module.eps, False)[1] is None
"""


def test_results_and_gradients_in_the_interpreter_are_those_of_the_modules_in_fp64() -> None:
    pytest.importorskip("triton", reason="the kernels are Triton's; torch's CPU build comes without it")
    pytest.importorskip("numpy", reason="Triton's interpreter computes with NumPy")
    done = subprocess.run(
        [sys.executable, "-c", WORKER],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("WORST") == 4
