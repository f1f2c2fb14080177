"""What every section of the configuration is made of: closed, frozen models, URLs, and switches."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict

from pipeline.errors import UserError
from pipeline.io.urls import check_url


class Section(BaseModel):
    """A frozen, closed part of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _switch(value: object) -> object:
    """`true` is a section with its defaults, `false` none."""
    return {} if value is True else None if value is False else value


def _safe_url(url: object) -> object:
    if isinstance(url, str):
        try:
            check_url(url)
        except UserError as error:
            raise ValueError(str(error)) from None
    return url


Switch = BeforeValidator(_switch)
Url = Annotated[str, BeforeValidator(_safe_url)]
