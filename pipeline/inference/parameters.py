"""The parameters of a bundle as an MLflow model: which there are, and what is refused of them."""

from __future__ import annotations

import logging
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.types import ParamSchema, ParamSpec

from pipeline.errors import UserError

SCHEMA = ParamSchema(
    [
        # No default says how long a completion is: `read_settings` must see which of the two names was given.
        ParamSpec("max_new_tokens", "long", None),
        ParamSpec("max_tokens", "long", None),
        ParamSpec("temperature", "double", 0.0),
        ParamSpec("top_k", "long", 0),
        ParamSpec("top_p", "double", 1.0),
        ParamSpec("min_p", "double", 0.0),
        ParamSpec("repetition_penalty", "double", 1.0),
        ParamSpec("stop", "string", [], shape=(-1,)),
        ParamSpec("seed", "long", 0),
    ]
)
PARAMETERS = tuple(spec.name for spec in SCHEMA.params)


def refuse_unknown() -> None:
    """MLflow drops a parameter that a model has not got, with this warning and no other sign; here it becomes a refusal.

    The warning also names the parameters that there are, so that other models of the process are left alone. If a version of
    MLflow words it differently, unknown parameters are dropped again (a test notices).
    """
    logger = logging.getLogger("mlflow.models.utils")
    logger.setLevel(logging.WARNING)  # one that is not made cannot be seen
    if _refuse not in logger.filters:
        logger.addFilter(_refuse)


def _refuse(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if text.startswith("Unrecognized params ") and all(f"'{name}'" in text for name in PARAMETERS):
        unknown = text.removeprefix("Unrecognized params ").partition(" are ignored")[0].strip("[]").replace("'", "")
        raise MlflowException.invalid_parameter_value(
            f"params: there is no {unknown}; there are {', '.join(PARAMETERS)}"
        )
    return True


def read_settings(params: dict[str, Any] | None) -> dict[str, Any]:
    """The settings of `Bundle.generate`: those that were given, under its names."""
    settings = {key: value for key, value in (params or {}).items() if value is not None}
    short = settings.pop("max_tokens", None)
    if short is not None and settings.setdefault("max_new_tokens", short) != short:
        raise UserError(
            f"params: max_tokens {short} and max_new_tokens {settings['max_new_tokens']} are two names of one thing; give one"
        )
    return settings
