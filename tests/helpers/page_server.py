"""A server with its page whose model is slow and never ends: `python -m tests.helpers.page_server BUNDLE NAME [KEY]`.

A real engine decodes, a token every tenth of a second, one sequence at a time. Prints its URL.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncGenerator

import uvicorn

from pipeline.inference.serve.app import Server
from pipeline.inference.serve.engine import DecodeRequest, Token
from pipeline.inference.serve.limits import Limits
from pipeline.inference.serve.live import LiveEngine
from pipeline.inference.source import open_model


class SlowEngine(LiveEngine):
    """Over the model with the cached G: it decodes any model."""

    async def decode(self, request: DecodeRequest) -> AsyncGenerator[list[Token], None]:
        async with contextlib.aclosing(super().decode(request)) as steps:
            async for tokens in steps:
                yield tokens
                await asyncio.sleep(0.1)


def main(bundle: str, name: str, key: str | None = None) -> None:
    """Serve until it is killed."""
    opened = open_model(bundle)
    engine = SlowEngine(opened.model, eos_id=opened.generation["eos_id"])
    server = Server({name: engine}, opened, Limits(max_sequences=1), api_key=key)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        print(f"http://127.0.0.1:{listening.getsockname()[1]}/", flush=True)
        uvicorn.Server(uvicorn.Config(server.app, log_level="error")).run(sockets=[listening])


if __name__ == "__main__":
    main(*sys.argv[1:])
