"""Whoever has `pldr` installed needs no remote code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import warnings
from importlib import import_module
from pathlib import Path

import pytest

from pipeline.errors import Caution
from pipeline.inference.hf.plugin import FIRST, LAST, register, warn_untested
from pipeline.inference.hf.sizes import hf_config
from pldr_model.config import ModelConfig

pytest.importorskip("transformers")

PROGRAM = """
import json, sys, transformers
from pipeline.errors import Caution
from pipeline.inference.hf.plugin import register
register()
register()
model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(sys.argv[1]))
base = transformers.AutoModel.from_config(model.config)
print(json.dumps([type(model).__module__, type(base).__name__, transformers.PldrForCausalLM is type(model)]))
"""


@pytest.mark.slow
def test_registered_classes_are_used_and_are_on_the_module(tmp_path: Path) -> None:
    """In a process of its own: registries are global."""
    config = ModelConfig(vocab_size=8, num_layers=1, num_heads=1, head_dim=4, context_length=4).with_constant_g()
    hf_config(config, uncertified=None, dtype="fp32").save_pretrained(tmp_path)
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    ).stdout  # fmt: skip
    assert json.loads(out) == ["pipeline.inference.hf.modeling_pldr", "PldrModel", True]


def test_the_entry_point_names_it(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["pldr"].partition(":")
    assert getattr(import_module(module), name) is register


def test_an_untested_release_of_transformers_is_one_line() -> None:
    tested = [".".join(map(str, (*version, 3))) for version in (FIRST, LAST)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in tested:
            warn_untested(version)
    for version in ("4.57.1", f"{LAST[0]}.{LAST[1] + 1}.0.dev0", "6.0.0"):
        with pytest.warns(Caution, match=f"transformers {version}.*tested with 5.19 to 5.24") as caught:
            warn_untested(version)
        assert "\n" not in str(caught[0].message)
