"""Which engine decodes: vLLM where it is installed, else transformers."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pipeline.errors import ConfigError
from pipeline.inference.extras import require
from pipeline.inference.opened import OpenModel
from pipeline.inference.serve.engine import Engine
from pipeline.inference.serve.limits import Limits

Name = Literal["auto", "vllm", "transformers"]


def make_engine(
    name: Name, opened: OpenModel, limits: Limits, *, vllm_python: Path | None, report: Callable[[str], None]
) -> Engine:
    """The engine, not started. vllm_python: the Python of an environment with vLLM; None: this one. Raises UserError."""
    has_vllm = vllm_python is not None or importlib.util.find_spec("vllm") is not None
    if vllm_python is not None and name == "transformers":
        raise ConfigError("--vllm-python: only for --engine vllm or auto")
    if vllm_python is not None and shutil.which(vllm_python) is None:
        raise ConfigError(f"--vllm-python {vllm_python}: no such program; name the Python of an environment with vLLM")
    if name == "vllm" and not has_vllm:
        raise ConfigError("--engine vllm: vLLM is not installed here; name the Python that has it with --vllm-python")
    if name == "vllm" or (name == "auto" and has_vllm):
        from pipeline.inference.serve.vllm_server import VllmEngine

        return VllmEngine(opened, python=vllm_python or Path(sys.executable), limits=limits, report=report)
    require("transformers", extra="hf")
    from pipeline.inference.serve.continuous import ContinuousEngine

    return ContinuousEngine(opened, max_sequences=limits.max_sequences)
