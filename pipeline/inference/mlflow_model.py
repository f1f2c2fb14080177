"""A bundle as an MLflow pyfunc, by MLflow's "models from code": MLflow runs this file, nothing is pickled.

The bundle is the model's artifact `bundle`, verified when it is loaded. Input of `predict`: a list of texts, a list
of `{"prompt": text}`, or a DataFrame with a column `prompt` (or with one column only). Output: a list of completions.
Parameters are those of `Bundle.generate`, with `stop` a list of strings, and `max_tokens` for `max_new_tokens`, as MLflow's
gateway and OpenAI's API call it. `predict_stream` gives the completion of one prompt in pieces.

What is wrong with a request is MLflow's INVALID_PARAMETER_VALUE: its server answers 400 with one line, not with a traceback.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import mlflow
import pandas  # type: ignore[import-untyped]
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel

from pipeline.errors import UserError
from pipeline.inference.parameters import read_settings, refuse_unknown
from pipeline.inference.runtime import Bundle, NotFiniteRows

logging.getLogger("mlflow").setLevel(logging.WARNING)


class BundleModel(PythonModel):  # type: ignore[misc]  # MLflow has no types
    """The wrapper that MLflow loads and calls."""

    def load_context(self, context: Any) -> None:
        """Verify and load the bundle."""
        self.bundle = Bundle.load(context.artifacts["bundle"])
        refuse_unknown()

    def predict(self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """Completions of the prompts, in their order. Raises MlflowException for a request that cannot be answered.

        From this type hint on `model_input` MLflow infers no schema and raises no warning; every form that `read_prompts`
        accepts gets through.
        """
        with _refusals():
            return self.bundle.generate(read_prompts(model_input), **read_settings(params))

    def predict_stream(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> Iterator[str]:
        """The completion of one prompt, in pieces; MLflow allows no more than one here."""
        with _refusals():
            prompts = read_prompts(model_input)
            if len(prompts) != 1:
                raise UserError(f"input: {len(prompts)} texts; a stream continues one, `predict` several")
            yield from self.bundle.stream(prompts[0], **read_settings(params))


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """A user's mistake, or a prompt that this model has no next token for, as MLflow's."""
    try:
        yield
    except NotFiniteRows as error:
        raise MlflowException.invalid_parameter_value(f"{error.problem}; leave it out") from None
    except UserError as error:
        raise MlflowException.invalid_parameter_value(str(error)) from None


def read_prompts(model_input: Any) -> list[str]:
    """The texts in the forms that MLflow passes on: a DataFrame, a list or array of texts, or of `{"prompt": text}`."""
    if hasattr(model_input, "columns"):
        columns = list(model_input.columns)
        column = "prompt" if "prompt" in columns or len(columns) != 1 else columns[0]
        if column not in columns:
            raise UserError(f"input: no column 'prompt' among {', '.join(map(str, columns))}; name one so")
        model_input = model_input[column]
    model_input = _plain(_prompt_of(model_input))
    items = model_input if isinstance(model_input, list) else [model_input]
    prompts = [_plain(_prompt_of(item)) for item in items]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError('input: no texts; pass them as ["The "] or [{"prompt": "The "}]')
    return [str(prompt) for prompt in prompts]


def _prompt_of(item: Any) -> Any:
    """What a mapping has under `prompt`; anything else as it is. Raises UserError for other keys: nobody would read them."""
    if not isinstance(item, dict):
        return item
    if others := item.keys() - {"prompt"}:
        raise UserError(
            f"input: there is no {', '.join(sorted(map(str, others)))} beside 'prompt'; settings go into `params`"
        )
    return item.get("prompt")


def _plain(value: Any) -> Any:
    """Series and arrays as lists; the 0-dim arrays that MLflow's server makes of single texts as texts."""
    return value.tolist() if hasattr(value, "tolist") else value


mlflow.models.set_model(BundleModel())
