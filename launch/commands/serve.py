"""`pldr serve MODEL`: an OpenAI-compatible server of a bundle or an export."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from launch.backends.stop import stop_signals
from launch.commands.verbs import Report, Result, Verbs
from pipeline.errors import ConfigError

KEY_VARIABLE = "PLDR_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")


def add_serve_verb(verbs: Verbs) -> None:
    """The verb `serve`."""
    sub = verbs.add("serve", _serve, "an OpenAI-compatible server of a bundle", is_work=True)
    sub.add_argument(
        "model", metavar="BUNDLE", help="a bundle folder; also an export of `pldr export hf`, or a run's YAML"
    )
    sub.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine only)")
    sub.add_argument("--port", type=int, default=8000, help="0: a free one")
    sub.add_argument("--engine", choices=("auto", "vllm", "transformers"), default="auto")
    sub.add_argument("--vllm-python", type=Path, metavar="PATH", help="the Python of an environment that has vLLM")
    sub.add_argument("--name", help="the model's id for clients (default: the run's name)")
    sub.add_argument(
        "--max-concurrency",
        type=int,
        default=256,
        metavar="N",
        help="sequences at once (prompts times n); more get 429",
    )
    sub.add_argument("--max-body-mib", type=float, default=4, metavar="MIB", help="the largest request")
    sub.add_argument("--timeout", type=float, default=600, metavar="S", help="for one request, its answer included")
    sub.add_argument("--drain", type=float, default=30, metavar="S", help="for requests that run when SIGTERM comes")
    sub.add_argument(
        "--watch",
        type=float,
        metavar="SHARE",
        help="of the prompts, whose G_LM is deduced and compared with the cached one (0.01; needs the metric learner)",
    )
    sub.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"a file with the token that clients must send; or the environment variable {KEY_VARIABLE}",
    )


def _serve(arguments: Any, report: Report) -> Result:
    from pipeline.inference.extras import require

    require("fastapi", "uvicorn", "prometheus_client", extra="serve")
    from pipeline.inference.serve.app import Server
    from pipeline.inference.serve.connection import bind
    from pipeline.inference.serve.engine import Engine
    from pipeline.inference.serve.engines import make_engine
    from pipeline.inference.serve.live import LIVE, LiveEngine
    from pipeline.inference.serve.run import run
    from pipeline.inference.serve.sentinel import watch
    from pipeline.inference.source import open_model

    limits, api_key = _limits(arguments), _api_key(arguments.api_key_file)
    bound = bind(arguments.host, arguments.port)
    opened = open_model(arguments.model, live=None)  # with the metric learner, where it is there
    name = arguments.name or opened.name
    sentinel = None if arguments.watch is None else watch(opened, arguments.watch)
    engine = make_engine(arguments.engine, opened, limits, vllm_python=arguments.vllm_python, report=report)
    if opened.caution is not None:
        report(opened.caution)
    if arguments.host not in LOCAL and api_key is None:
        report(f"WARNING: --host {arguments.host} without a token: whoever reaches it can use it; see --api-key-file")
    engines: dict[str, Engine] = {name: engine}
    if opened.live is not None:
        engines[name + LIVE] = LiveEngine(opened.live, eos_id=opened.generation["eos_id"])
    only_local = arguments.host in LOCAL and api_key is None
    server = Server(engines, opened, limits, api_key=api_key, only_local=only_local, sentinel=sentinel)
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    url = f"http://{host}:{bound.getsockname()[1]}"
    report(f"{name} at {url}/v1, engine {engine.name}; the page is {url}/")
    with stop_signals.handed_to(lambda *_: None):  # `run` has its own
        return {"url": url, "model": name, "engine": engine.name, **run(server, bound, report=report)}


def _limits(arguments: Any) -> Any:
    from pipeline.inference.serve.limits import Limits

    if arguments.max_concurrency < 1:
        raise ConfigError(f"--max-concurrency {arguments.max_concurrency}: at least 1")
    for option in ("max_body_mib", "timeout", "drain"):
        if not 0 < getattr(arguments, option) < 1e9:
            raise ConfigError(
                f"--{option.replace('_', '-')} {getattr(arguments, option):g}: a positive number is needed"
            )
    if arguments.max_body_mib * 2**20 < 1:
        raise ConfigError(f"--max-body-mib {arguments.max_body_mib:g}: less than a byte; 4 is the default")
    return Limits(
        max_sequences=arguments.max_concurrency,
        max_body=int(arguments.max_body_mib * 2**20),
        timeout_s=arguments.timeout,
        drain_s=arguments.drain,
    )


def _api_key(file: Path | None) -> str | None:
    """The token, from the file or the environment: a command line can be read by everybody on the machine."""
    where, text = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
    if file is not None:
        where = f"--api-key-file {file}"
        try:
            text = file.read_text(encoding="latin-1")  # what is no ASCII is refused below
        except OSError as error:
            raise ConfigError(f"{where}: {error.strerror}") from None
    if text is None:
        return None
    key = text.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{where}: holds no token; one line of printable ASCII without spaces is needed")
    return key
