"""What is refused of a request, before anything is decoded: one line in OpenAI's form, naming the field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inference.serve.errors import ApiError
from pipeline.inference.serve.protocol import CompletionRequest, DetokenizeRequest, TokenizeRequest, read_request

NOT_JSON = [
    b"", b" ", b"{", b"}", b"nul", b'{"prompt": "a"', b'{"prompt": "a"}}', b"{'prompt': 'a'}", b'{"prompt": NaN}',
    b'{"prompt": "a", "temperature": Infinity}', b'{"prompt": "a", "temperature": 1e999}', b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}', b'{"prompt": "a\x00"}', b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000,
    b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", b'{"prompt": "a", }', b"\x00" * 10,
]  # fmt: skip


def refused(body: bytes, kind: Any = CompletionRequest) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read_request(kind, body)
    error = caught.value
    assert error.status == 400 and "\n" not in error.message and len(error.message) < 400
    assert error.body()["error"]["type"] == "invalid_request_error"
    return error


def read(**data: Any) -> CompletionRequest:
    return read_request(CompletionRequest, json.dumps({"prompt": "a", **data}).encode())


@pytest.mark.parametrize("body", NOT_JSON, ids=range(len(NOT_JSON)))
def test_what_is_no_json(body: bytes) -> None:
    assert refused(body).message.startswith("body: no valid JSON")


@pytest.mark.parametrize("body", [b"[]", b"1", b'"a"', b"true", b"null", b"1.5", b"[{}]"])
def test_json_that_is_no_object(body: bytes) -> None:
    assert "a JSON object is needed" in refused(body).message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("max_tokens", value) for value in (-1, 8.0, "8", True, [8], {}, 1e30, 10**30)),
        *(("temperature", value) for value in (-0.1, "1", True, [1])),
        *(("top_p", value) for value in (0, 1.01, -1, "1")),
        *(("top_k", value) for value in (-2, 1.5, "all")),
        *(("min_p", value) for value in (-0.1, 1.01, "0", True)),
        *(("repetition_penalty", value) for value in (0, -1, "1", True)),
        *(("n", value) for value in (0, -1, 1.0, True, "2")),
        *(("seed", value) for value in (2**63, -(2**63) - 1, 1.5, "1", True)),
        *(("logprobs", value) for value in (-1, 21, True, 1.5)),
        *(("stream", value) for value in (1, "true", "yes", [])),
        *(("echo", value) for value in (0, "false")),
        *(("model", value) for value in (1, ["a"], {})),
        *(("stream_options", value) for value in (True, [], {"include_usage": 1}, {"other": True})),
        *(("best_of", value) for value in (2, "1", True)),
        *(("frequency_penalty", value) for value in (0.1, "0")),
        *(("logit_bias", value) for value in ({"5": 1}, [])),
        *(("ignore_eos", value) for value in (True, 0)),
        ("suffix", "b"),
        ("user", 5),
    ],
)  # fmt: skip
def test_wrong_types_and_values_are_refused_by_name(key: str, value: Any) -> None:
    error = refused(json.dumps({"prompt": "a", key: value}).encode())
    assert error.message.startswith(f"{key}") and error.param is not None and error.param.startswith(key)


def test_an_unknown_parameter_is_refused_with_the_nearest_name() -> None:
    assert "did you mean temperature?" in refused(b'{"prompt": "a", "temprature": 1}').message
    assert "did you mean max_tokens?" in refused(b'{"prompt": "a", "max_new_tokens": 1}').message
    error = refused(json.dumps({"prompt": "a", "x" * 10_000: 1}).encode())
    assert len(error.message) < 200 and error.code == "unknown_parameter"
    assert "missing" in refused(b"{}").message
    assert "missing" in refused(b'{"prompt": null}').message


def test_what_asks_for_nothing_is_taken() -> None:
    request = read(
        best_of=1, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, suffix="", user="somebody", stop=None, seed=None,
        logprobs=None, stream=None, repetition_penalty=1.0, ignore_eos=False, min_p=0, add_special_tokens=True,
        stream_options=None, max_tokens=None, temperature=None, n=None, skip_special_tokens=True,
    )  # fmt: skip
    assert request == read(user="somebody")
    assert (request.max_tokens, request.temperature, request.n, request.top_k) == (16, 1.0, 1, 0)  # OpenAI's
    assert read(best_of=3, n=3).n == 3


def test_other_endpoints_are_as_strict() -> None:
    assert read_request(TokenizeRequest, b'{"prompt": "a"}').prompt == "a"
    assert "prompt" in refused(b'{"prompt": ["a"]}', TokenizeRequest).message
    assert "tokens" in refused(b'{"tokens": [1, "a"]}', DetokenizeRequest).message
    assert "tokens" in refused(b'{"tokens": [1.0]}', DetokenizeRequest).message


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from([*CompletionRequest.model_fields, "best_of", "other"]), ANY, max_size=6))
def test_any_json_is_read_or_refused_in_one_line(data: dict[str, Any]) -> None:
    body = json.dumps(data, ensure_ascii=True).encode()
    try:
        read_request(CompletionRequest, body)
    except ApiError as error:
        assert error.status == 400 and "\n" not in error.message and len(error.message) < 400
        json.dumps(error.body())


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(body: bytes) -> None:
    with pytest.raises(ApiError):
        read_request(CompletionRequest, body)
