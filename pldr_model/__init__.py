"""PLDR-LLM, the mathematics: configuration, model, caches, generation, reference checkpoints, parity, benchmark.

In: torch and safetensors, nothing of `pipeline`. Out: the names below, each imported when it is first used, so that
reading a configuration (`pldr_model.config`) does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pldr_model.cache import KVCache
    from pldr_model.config import ModelConfig
    from pldr_model.generation import generate
    from pldr_model.loss import Losses, cross_entropy, dag_regulariser, total_loss
    from pldr_model.model import PLDRModel, g_shape, is_metric_parameter, load_g_file, to_constant_g
    from pldr_model.plga import DeductiveOutputs

_MODULES = {
    "DeductiveOutputs": "plga",
    "KVCache": "cache",
    "Losses": "loss",
    "ModelConfig": "config",
    "PLDRModel": "model",
    "cross_entropy": "loss",
    "dag_regulariser": "loss",
    "g_shape": "model",
    "generate": "generation",
    "is_metric_parameter": "model",
    "load_g_file": "model",
    "to_constant_g": "model",
    "total_loss": "loss",
}
__all__ = [
    "DeductiveOutputs",
    "KVCache",
    "Losses",
    "ModelConfig",
    "PLDRModel",
    "cross_entropy",
    "dag_regulariser",
    "g_shape",
    "generate",
    "is_metric_parameter",
    "load_g_file",
    "to_constant_g",
    "total_loss",
]


def __getattr__(name: str) -> Any:
    """A public name, imported from its module (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
