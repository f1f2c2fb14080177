"""The requests of OpenAI's completions API, read strictly: what is unknown, of another type or out of range is refused by name.

Decision: a parameter that OpenAI or vLLM defines and that is not implemented here is taken at the values that ask for nothing
(`NEUTRAL`), because clients send them; any other value is refused, and never ignored.
"""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.inference.serve.errors import wrong

MAX_TOP = 20  # log-probabilities at a position; OpenAI takes 5, vLLM 20
SEED_BITS = 63
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "best_of": (1,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "suffix": ("",),
    # vLLM's
    "add_special_tokens": (True, False),  # this tokenizer adds none
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
}


class Strict(BaseModel):
    """No other keys, no conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False


class CompletionRequest(Strict):
    """`POST /v1/completions`. Texts (`prompt`, `stop`) are read where the tokenizer is; here they are any JSON."""

    model: str | None = None
    prompt: Any
    max_tokens: int = Field(16, ge=0)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    n: int = Field(1, ge=1)
    stop: Any = ()
    seed: int | None = Field(None, ge=-(2**SEED_BITS), lt=2**SEED_BITS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    echo: bool = False
    user: str = ""  # not kept


class TokenizeRequest(Strict):
    """`POST /tokenize`, as vLLM has it."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True  # there are none
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int]


Request = TypeVar("Request", bound=Strict)


def read_request(kind: type[Request], body: bytes) -> Request:
    """A request from the bytes of its body. null is "not given". Raises ApiError 400."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise wrong(None, f"body: no valid JSON ({error})", code="invalid_json") from None
    if not isinstance(data, dict):
        raise wrong(None, f"body: a JSON object is needed, not {_kind(data)}")
    data = {key: value for key, value in data.items() if value is not None}
    if kind is CompletionRequest:
        data = _without_neutral(data)
    if unknown := [key for key in data if key not in kind.model_fields]:
        raise wrong(unknown[0][:100], _unknown(unknown[0], [*kind.model_fields]), code="unknown_parameter")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise wrong(name, f"{name}: missing") from None
        raise wrong(name, f"{name}: {_short(first['input'])} ({first['msg'][:1].lower()}{first['msg'][1:]})") from None


def check_stream_options(request: CompletionRequest) -> None:
    """`stream_options` says something about a stream only. Raises ApiError."""
    if request.stream_options is not None and not request.stream:
        raise wrong("stream_options", "stream_options: only with stream: true")


def _without_neutral(data: dict[str, Any]) -> dict[str, Any]:
    neutral = NEUTRAL | {"best_of": (1, data.get("n", 1))}
    for key, value in data.items():
        if key not in neutral:
            continue
        if not any(_same(value, allowed) for allowed in neutral[key]):
            raise wrong(key, f"{key}: {_short(value)} is not supported here; leave it out", code="unsupported_value")
    return {key: value for key, value in data.items() if key not in neutral}


def _same(value: Any, allowed: Any) -> bool:
    return bool(value == allowed) and isinstance(value, bool) == isinstance(allowed, bool)


def _unknown(name: str, known: list[str]) -> str:
    shown = _short(name)
    near = difflib.get_close_matches(name[:100], [*known, *NEUTRAL], n=1)
    return f"{shown}: there is no such parameter" + (f"; did you mean {near[0]}?" if near else "")


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return _kind(value)
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", bool: "a bool", type(None): "null"}.get(
        type(value), "a number"
    )
