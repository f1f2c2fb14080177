"""A server with its page whose model is slow and never ends: `python -m tests.helpers.page_server BUNDLE NAME [KEY]`.

The tokens are those of the real decoder, one every tenth of a second (StepsEngine). Prints its URL.
"""

from __future__ import annotations

import socket
import sys

import uvicorn

from pipeline.inference.serve.app import Server
from pipeline.inference.serve.limits import Limits
from pipeline.inference.source import open_model
from tests.helpers.serving import StepsEngine


def main(bundle: str, name: str, key: str | None = None) -> None:
    """Serve until it is killed."""
    opened = open_model(bundle)
    engine = StepsEngine(opened.model, eos_id=opened.generation["eos_id"], delay_s=0.1)
    server = Server({name: engine}, opened, Limits(max_sequences=1), api_key=key)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        print(f"http://127.0.0.1:{listening.getsockname()[1]}/", flush=True)
        uvicorn.Server(uvicorn.Config(server.app, log_level="error")).run(sockets=[listening])


if __name__ == "__main__":
    main(*sys.argv[1:])
