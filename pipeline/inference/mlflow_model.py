"""A bundle as an MLflow pyfunc, by MLflow's "models from code": MLflow runs this file, nothing is pickled.

The bundle is the model's artifact `bundle`, verified when it is loaded. Input of `predict`: a list of texts, a list
of `{"prompt": text}`, or a DataFrame with a column `prompt` (or with one column only). Output: a list of completions.
Parameters are those of `Bundle.generate`, with `stop` a list of strings.
"""

from __future__ import annotations

import logging
from typing import Any

import mlflow
import pandas  # type: ignore[import-untyped]
from mlflow.pyfunc import PythonModel

from pipeline.errors import UserError
from pipeline.inference.runtime import Bundle

logging.getLogger("mlflow").setLevel(logging.WARNING)


class BundleModel(PythonModel):  # type: ignore[misc]  # MLflow has no types
    """The wrapper that MLflow loads and calls."""

    def load_context(self, context: Any) -> None:
        """Verify and load the bundle."""
        self.bundle = Bundle.load(context.artifacts["bundle"])

    def predict(self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """Completions of the prompts, in their order. Raises UserError for input that holds no prompts.

        From this type hint on `model_input` MLflow infers no schema and raises no warning; every form that `read_prompts`
        accepts gets through.
        """
        return self.bundle.generate(read_prompts(model_input), **(params or {}))


def read_prompts(model_input: Any) -> list[str]:
    """The texts in the forms that MLflow passes on: a DataFrame, a list or array of texts, or of `{"prompt": text}`."""
    if hasattr(model_input, "columns"):
        columns = list(model_input.columns)
        column = "prompt" if "prompt" in columns or len(columns) != 1 else columns[0]
        if column not in columns:
            raise UserError(f"input: no column 'prompt' among {', '.join(map(str, columns))}; name one so")
        model_input = model_input[column]
    if isinstance(model_input, dict):
        model_input = model_input.get("prompt")
    model_input = _plain(model_input)
    items = model_input if isinstance(model_input, list) else [model_input]
    prompts = [_plain(item.get("prompt")) if isinstance(item, dict) else item for item in items]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError('input: no texts; pass them as ["The "] or [{"prompt": "The "}]')
    return [str(prompt) for prompt in prompts]


def _plain(value: Any) -> Any:
    """Series and arrays as lists; the 0-dim arrays that MLflow's server makes of single texts as texts."""
    return value.tolist() if hasattr(value, "tolist") else value


mlflow.models.set_model(BundleModel())
