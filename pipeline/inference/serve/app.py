"""The HTTP endpoints of `pldr serve`, put together. What they do is in the modules that are called."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route

from pipeline.inference.opened import OpenModel
from pipeline.inference.serve.completions import Completions
from pipeline.inference.serve.engine import Engine
from pipeline.inference.serve.errors import ApiError
from pipeline.inference.serve.gate import Gate
from pipeline.inference.serve.limits import Limits, Load, read_body
from pipeline.inference.serve.live import LIVE
from pipeline.inference.serve.metrics import Metrics
from pipeline.inference.serve.models import Models
from pipeline.inference.serve.page import add_page
from pipeline.inference.serve.prompt_input import Prompts
from pipeline.inference.serve.protocol import DetokenizeRequest, Strict, TokenizeRequest, read_request
from pipeline.inference.serve.sentinel import DriftCollector, Sentinel

log = logging.getLogger(__name__)

LIVE_CAUTION = "G_LM is computed from each prompt; a certificate is about the cached one"


class Server:
    """The parts of one server, for its endpoints; `app` is what uvicorn runs."""

    def __init__(
        self,
        engines: dict[str, Engine],
        opened: OpenModel,
        limits: Limits,
        *,
        api_key: str | None = None,
        only_local: bool = False,
        sentinel: Sentinel | None = None,
    ) -> None:
        self.opened, self.models, self.load, self.metrics = opened, Models(engines), Load(limits), Metrics()
        config = opened.config
        self.prompts = Prompts(
            opened.tokenizer,
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            prefix=opened.generation["prompt_prefix_ids"],
            max_stop=limits.max_stop,
        )
        self.completions = Completions(
            self.models,
            self.prompts,
            self.load,
            self.metrics,
            fingerprint=opened.sha256,
            on_prompt=None if sentinel is None else sentinel.offer,
        )
        self._sentinel = sentinel
        if sentinel is not None:
            self.metrics.registry.register(DriftCollector(sentinel))
        self.failed: BaseException | None = None  # why the engines did not start
        self.app = FastAPI(lifespan=self._lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        self._add_endpoints()
        add_page(self.app, opened, engines, sentinel)
        self.app.add_middleware(Gate, api_key=api_key, only_local=only_local, metrics=self.metrics)

    def describe(self) -> dict[str, Any]:
        """What the model is and how far it may be trusted."""
        return {
            "name": self.models.default,
            "certified": self.opened.certified,
            "caution": self.opened.caution,
            "bundle_sha256": self.opened.sha256,
        }

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """The engines start while the server already answers /health."""
        starting = asyncio.ensure_future(self._start())
        try:
            yield
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            for engine in self.models.engines.values():
                await engine.stop()
            if self._sentinel is not None:
                await asyncio.to_thread(self._sentinel.stop)

    async def _start(self) -> None:
        try:
            for engine in self.models.engines.values():
                await engine.start()
        except Exception as error:
            self.failed = error

    def _add_endpoints(self) -> None:
        self.app.router.routes.append(Route("/v1/completions", endpoint=self.completions, methods=["POST"]))
        for path, endpoint, methods in (
            ("/v1/chat/completions", self._chat, ["POST"]),
            ("/v1/models", self._models, ["GET"]),
            ("/v1/models/{name:path}", self._model, ["GET"]),
            ("/tokenize", self._tokenize, ["POST"]),
            ("/detokenize", self._detokenize, ["POST"]),
            ("/health", self._health, ["GET"]),
            ("/metrics", self._metrics, ["GET"]),
            ("/certificate", self._certificate, ["GET"]),
        ):
            self.app.router.routes.append(Route(path, endpoint=endpoint, methods=methods))
        self.app.add_exception_handler(HTTPException, _http_error)

    async def _chat(self, request: Request) -> Response:
        raise ApiError(
            404,
            f"{self.models.default} is no chat model: it continues text, and has no roles and no template; "
            "use /v1/completions (client.completions.create)",
            code="not_a_chat_model",
        )

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card(name) for name in self.models.engines]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self.models.find(name)
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        config, about = self.opened.config, self.describe()
        live = name == self.models.default + LIVE
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "pldr",
            "root": str(self.opened.path),
            "max_model_len": config.context_length,
            "certified": about["certified"] and not live,
            "caution": LIVE_CAUTION if live else about["caution"],
            "bundle_sha256": about["bundle_sha256"],
        }

    async def _tokenize(self, request: Request) -> Response:
        asked = await self._read(request, TokenizeRequest)
        self.models.find(asked.model)
        ids = await self.prompts.ids_of(asked.prompt)
        names = [self.prompts.texts.name(id) for id in ids] if asked.return_token_strs else None
        return JSONResponse(
            {
                "count": len(ids),
                "max_model_len": self.prompts.context_length,
                "tokens": ids,
                "token_strs": names,
            }
        )

    async def _detokenize(self, request: Request) -> Response:
        asked = await self._read(request, DetokenizeRequest)
        self.models.find(asked.model)
        self.prompts.check_ids("tokens", asked.tokens)
        return JSONResponse({"prompt": self.prompts.texts.beginning(asked.tokens)})

    async def _read(self, request: Request, kind: type[Any]) -> Any:
        assert issubclass(kind, Strict)
        body = await read_body(request.receive, dict(request.scope["headers"]), self.load.limits.max_body)
        return read_request(kind, body)

    async def _health(self, request: Request) -> Response:
        problem = self.problem()
        status = "ready" if problem is None else "draining" if self.load.draining else "not ready"
        return JSONResponse(
            {"status": status, "problem": problem, **self.describe()}, status_code=200 if problem is None else 503
        )

    def problem(self) -> str | None:
        """Why no request is answered now; None if they are."""
        if self.load.draining:
            return "the server is shutting down"
        return self.models.problem()

    async def _metrics(self, request: Request) -> Response:
        loads = {name: engine.load() for name, engine in self.models.engines.items()}
        return Response(self.metrics.render(loads), media_type=self.metrics.content_type)

    async def _certificate(self, request: Request) -> Response:
        if self.opened.certificate is None:
            raise ApiError(404, f"{self.models.default} has no certificate", code="no_certificate")
        return JSONResponse(self.opened.certificate)


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    answer = ApiError(error.status_code, f"{request.method} {request.url.path[:100]}: {str(error.detail).lower()}")
    return JSONResponse(answer.body(), status_code=error.status_code, headers=error.headers)
