"""The trainer on a GPU: it trains like plain PyTorch on a CPU, in fp32 and bf16, and a resumed run is bit-equal."""

import json
import os
import subprocess
import sys

import pytest

from pipeline.network import free_port
from tests.helpers.ranks import ROOT
from tests.pipeline.train.test_zero import losses, plain_pytorch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1000)]

TOLERANCE = {"fp32": 2e-5, "bf16": 3e-2}  # of the SDPA twin's loss, in nats; PLGA's fp32 gradients are ill-conditioned


@pytest.fixture(scope="module")
def trained(gpu, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    one = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipeline.train.gpu_worker", str(folder)],
        env={**os.environ, **one, "DS_ACCELERATOR": gpu.type, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "result.json").read_text())
    assert found["device"] == gpu.type
    return found


@pytest.mark.parametrize("precision", list(TOLERANCE))
def test_it_trains_like_plain_pytorch_on_a_cpu(trained, precision):
    twin = losses(trained[f"{precision}-identity"]["straight"])
    assert twin == pytest.approx(plain_pytorch("norm", "identity"), abs=TOLERANCE[precision]) and twin[-1] != twin[1]
    learned = losses(trained[f"{precision}-learned"]["straight"])
    assert learned[:3] == pytest.approx(plain_pytorch("norm", "learned")[:3], abs=max(5e-3, TOLERANCE[precision]))


def test_compiled_layers_train_alike(trained):
    compiled, plain = (losses(trained[name]["straight"]) for name in ("compiled", "bf16-identity"))
    assert compiled == pytest.approx(plain, abs=TOLERANCE["bf16"])


@pytest.mark.parametrize("variant", ["learned", "identity"])
@pytest.mark.parametrize("precision", list(TOLERANCE))
def test_a_resumed_run_is_bit_equal(trained, precision, variant):
    found = trained[f"{precision}-{variant}"]
    assert list(found["resumed"]) == ["4", "5", "6"]
    for step, values in found["resumed"].items():
        assert values["train/loss"] == found["straight"][step]["train/loss"], step
