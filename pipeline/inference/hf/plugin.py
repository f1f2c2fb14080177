"""Our classes in transformers' registries: whoever has `pldr` installed loads an export without `trust_remote_code`.

vLLM calls `register` by itself (entry point `vllm.general_plugins`). transformers (up to 5.24) looks for no entry points: there
a program calls it. vLLM takes architectures from the `transformers` module, so the classes are put there, too.
"""

from __future__ import annotations

import warnings

from pipeline.inference.extras import require

FIRST, LAST = (5, 19), (5, 24)  # of transformers: the releases whose tests ran


def register() -> None:
    """Register PldrConfig, PldrModel and PldrForCausalLM. May be called again."""
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from pipeline.inference.hf.configuration_pldr import PldrConfig
    from pipeline.inference.hf.modeling_pldr import PldrForCausalLM, PldrModel

    warn_untested(transformers.__version__)
    AutoConfig.register("pldr", PldrConfig, exist_ok=True)
    AutoModel.register(PldrConfig, PldrModel, exist_ok=True)
    AutoModelForCausalLM.register(PldrConfig, PldrForCausalLM, exist_ok=True)
    for each in (PldrConfig, PldrModel, PldrForCausalLM):
        setattr(transformers, each.__name__, each)


def require_tested() -> None:
    """transformers is there, or UserError; a release that was not tested is one line of warning."""
    require("transformers", "tokenizers", extra="hf")
    import transformers

    warn_untested(transformers.__version__)


def warn_untested(version: str) -> None:
    """One line if this release of transformers is outside the range that was tested."""
    found = tuple(int(part) for part in version.split(".")[:2])
    if not FIRST <= found <= LAST:
        tested = " to ".join(f"{major}.{minor}" for major, minor in (FIRST, LAST))
        warnings.warn(f"transformers {version}: PLDR-LLM's code was tested with {tested}", stacklevel=3)
