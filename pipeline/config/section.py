"""What every section of the configuration is made of: closed, frozen models, keys with a meaning, URLs, and switches.

What a key means to the pipeline stands beside the key: each field is made by a `Kind`, and a section names its few kinds.

    recipe = Kind("fixed", ("train",), result=True)
    work = Kind("may change", ("train",), result=False)

    class TrainConfig(Section):
        steps: int = recipe(250_000, "optimizer steps", ge=1)  # default, meaning, pydantic's constraints
        log_every: int = work(10, "steps between two logged losses", ge=1)

`pipeline/config/keys.py` reads it back for the stages and for resuming. A test fails for a key without a kind.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import core_schema

from pipeline.errors import UserError
from pipeline.io.urls import check_url

OnResume = Literal["fixed", "may change", "needs force"]


@dataclass(frozen=True)
class Kind:
    """What a key means to the pipeline; called, it makes a field of that kind.

    on_resume: whether a run may be resumed with another value. "needs force": only with `--force`.
    stages: the stages it is a setting of. Empty: of none, such as the run's name.
    result: the stages whose output is another one with another value, so that they run again; True: all of `stages`,
        False: none, it only changes how the work is done.
    certificate: which part of a certificate records it. looser: which values of it ask less of a model than the default.
    added: later than stages' records were first written. With its default it is left out of them, so that what was finished
        before stays finished.
    """

    on_resume: OnResume
    stages: tuple[str, ...]
    result: tuple[str, ...] | bool
    certificate: Literal["thresholds", "settings"] | None = None
    looser: Literal["above", "below"] | None = None
    added: bool = False

    def __call__(self, default: Any, meaning: str, **constraints: Any) -> Any:
        """A field with this default (`...`: it must be given), what it is in a few words, and pydantic's constraints."""
        return Field(default, description=meaning, json_schema_extra={"kind": asdict(self)}, **constraints)

    def decides(self, stage: str) -> bool:
        """Whether the stage's output is another one with another value."""
        return stage in (self.stages if self.result is True else self.result or ())


class Section(BaseModel):
    """A frozen, closed part of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def kinds(section: type[BaseModel]) -> dict[str, Kind | None]:
    """The kind of each field of a section, in order; None for a field that was made without one."""
    return {name: kind_of(field) for name, field in section.model_fields.items()}


def kind_of(field: FieldInfo) -> Kind | None:
    """The kind that a field was made by, None when it was made without one."""
    extra = field.json_schema_extra
    return Kind(**cast(Any, extra["kind"])) if isinstance(extra, dict) and "kind" in extra else None


def section_in(annotation: Any, *others: type) -> Any:
    """The section (or one of `others`) in an annotation such as `list[Source]` or `LanguageFilter | None`, if there is one."""
    for inner in get_args(annotation):
        if (found := section_in(inner, *others)) is not None:
            return found
    is_section = isinstance(annotation, type) and issubclass(annotation, (BaseModel, *others))
    return annotation if is_section else None


def _switch(value: object) -> object:
    """`true` is a section with its defaults, `false` is none."""
    return {} if value is True else None if value is False else value


def _safe_url(url: object) -> object:
    if isinstance(url, str):
        try:
            check_url(url)
        except UserError as error:
            raise ValueError(str(error)) from None
    return url


class _Switch:
    """Lets `true` stand for a section with its defaults and `false` for none."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(_switch, handler(source))

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        inner = handler(schema)
        return {"anyOf": [{"type": "boolean"}, *inner.get("anyOf", [inner])]}


Switch = _Switch()
Url = Annotated[str, BeforeValidator(_safe_url)]
