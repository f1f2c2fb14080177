"""An export in the transformers that vLLM wants, which is older than ours: the same tokens."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.helpers.expected import Case
from tests.helpers.vllm import PYTHON, environment, needs_vllm

pytestmark = [pytest.mark.slow, needs_vllm, pytest.mark.timeout(1800)]
SCRIPT = """
import json, sys, torch, transformers
folder, prompts, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
found = {"version": transformers.__version__}
for cache in ("dynamic", "static"):
    found[cache] = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                                 cache_implementation=cache)
        found[cache].append(out[0, len(prompt):].tolist())
print(json.dumps(found))
"""


def test_the_same_tokens(export: Path, cases: list[Case], tmp_path: Path) -> None:
    prompts, new = json.dumps([case.prompt for case in cases]), max(len(case.new) for case in cases)
    done = subprocess.run(
        [PYTHON, "-c", SCRIPT, export, prompts, str(new)],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["version"] != pytest.importorskip("transformers").__version__
    assert found["dynamic"] == found["static"] == [case.new for case in cases]
