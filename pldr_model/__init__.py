"""PLDR-LLM, the mathematics: configuration, model, caches, generation, checkpoints, parity, bench."""

from pldr_model.cache import KVCache
from pldr_model.config import ModelConfig
from pldr_model.generate import generate
from pldr_model.loss import Losses, cross_entropy, dag_regulariser, total_loss
from pldr_model.model import PLDRModel, g_shape, is_metric_parameter, load_g_file, to_constant_g
from pldr_model.plga import DeductiveOutputs

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
