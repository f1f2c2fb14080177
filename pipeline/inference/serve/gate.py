"""What every request passes first: the token, and errors in OpenAI's form.

Plain ASGI, so that streams pass through untouched.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
from typing import Any

import orjson

from pipeline.inference.serve.errors import ApiError, wrong
from pipeline.inference.serve.limits import ClientGone
from pipeline.inference.serve.metrics import Metrics

OPEN = frozenset({"/", "/health", "/favicon.ico"})  # without a token: a probe, and the page, which asks for the token
JSON = b"application/json"
log = logging.getLogger(__name__)


class Gate:
    """An ASGI middleware. api_key: what `Authorization: Bearer …` must name; None for no such thing. only_local: answer to no
    other name than this machine's."""

    def __init__(self, app: Any, *, api_key: str | None, only_local: bool, metrics: Metrics) -> None:
        self._app, self._only_local, self._metrics = app, only_local, metrics
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Let it through, or answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if message["status"] >= 400:
                    self._metrics.refused(message["status"])
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, watched)
        except ClientGone:
            pass
        except ApiError as error:
            await send_error(watched, error)
        except Exception:
            log.exception("%s %s", scope["method"], scope["path"])
            if not started:
                await send_error(watched, ApiError(500, "the server failed; its log says why", code="internal_error"))

    def _check(self, scope: Any) -> None:
        headers = dict(scope["headers"])
        # A foreign page whose name is made to mean 127.0.0.1 (DNS rebinding) is of this origin to a browser; its name shows it.
        if self._only_local and not is_local(host := headers.get(b"host", b"").decode("latin-1")):
            raise ApiError(
                403,
                f"Host: {host[:100]!r} is not this machine; use 127.0.0.1 or localhost, or start the server with a token "
                "(--api-key-file), then it answers to every name",
                code="foreign_host",
            )
        if self._api_key is not None and scope["path"] not in OPEN:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(given.strip(), self._api_key) or kind.lower() != b"bearer":
                raise ApiError(
                    401,
                    "a token is needed: Authorization: Bearer TOKEN (the OpenAI client's api_key)",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
        # A page of another origin can send any text to 127.0.0.1, but JSON only if that is allowed.
        if scope["method"] == "POST" and headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != JSON:
            raise wrong(None, "content-type: application/json is needed", status=415, code="unsupported_media_type")


def is_local(host: str) -> bool:
    """Whether the value of a Host header is localhost or an address, which no name server has a say in. No header is."""
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost" or name.lower().endswith(".localhost") or not host:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def send_error(send: Any, error: ApiError) -> None:
    """An answer in OpenAI's form."""
    headers = {"content-type": JSON.decode(), **error.headers}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": orjson.dumps(error.body()), "more_body": False})
