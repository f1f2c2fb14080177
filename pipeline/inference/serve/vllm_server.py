"""The engine `vllm`: vLLM's own OpenAI server as a child process, asked for token ids over a Unix socket.

What it serves is an export of the opened model, made once for each bundle hash and kept in the user's cache folder. Decision:
an export that was opened is exported again, so that the code which vLLM runs is ours and not what lies in a user's folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson

from pipeline.errors import UserError
from pipeline.inference.opened import OpenModel
from pipeline.inference.serve import guard
from pipeline.inference.serve.engine import DecodeRequest, EngineError, EngineLoad, Token
from pipeline.inference.serve.limits import Limits

START_S = 1800.0  # compiling kernels for a GPU takes minutes
STOP_S = 20.0
MAX_TEMPERATURE = 2.0  # vLLM's
SPARE_S = 30.0  # after our own time limit
CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
ID = "token_id:"  # how vLLM writes a token with return_tokens_as_token_ids


class VllmEngine:
    """vLLM's server behind ours. python: of the environment that has vLLM."""

    name = "vllm"

    def __init__(self, opened: OpenModel, *, python: Path, limits: Limits, report: Callable[[str], None]) -> None:
        self._opened, self._python, self._limits, self._report = opened, python, limits, report
        self._folder = Path(tempfile.mkdtemp(prefix="pldr-serve-"))  # mode 700
        self._socket, self._log = self._folder / "vllm.sock", self._folder / "vllm.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._session: Any = None
        self._ready, self._running = False, 0

    async def start(self) -> None:
        """Export, start vLLM, and wait until it answers."""
        import aiohttp

        export = await asyncio.to_thread(cached_export, self._opened, report=self._report)
        self._report(f"starting vLLM, its log: {self._log}")
        self._process = self._spawn(export)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(self._socket), limit=0, force_close=False),
            timeout=aiohttp.ClientTimeout(total=self._limits.timeout_s + SPARE_S),
            read_bufsize=2**20,  # a line of a stream may hold many log-probabilities
        )
        async with asyncio.timeout(START_S):
            while not await self._healthy():
                if self._process.poll() is not None:
                    raise UserError(f"vLLM ended with exit code {self._process.returncode}; its log: {self._log}")
                await asyncio.sleep(0.5)
        self._ready = True

    def _spawn(self, export: Path) -> subprocess.Popen[bytes]:
        import torch

        config = self._opened.config
        on_cpu = not torch.cuda.is_available()
        command = [
            *(str(self._python), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(export), "--served-model-name", "pldr", "--uds", str(self._socket)),
            *("--model-impl", "transformers", "--trust-remote-code", "--generation-config", "vllm"),
            *("--dtype", "float32", "--max-model-len", str(config.context_length)),
            *("--max-num-seqs", str(self._limits.max_sequences)),
            *(("--enforce-eager", "--block-size", "32") if on_cpu else ()),
        ]
        environment = QUIET | (CPU if on_cpu else {}) | dict(os.environ)
        environment.pop("PYTHONPATH", None)  # ours is no part of that environment
        environment["VLLM_PLUGINS"] = "lora_filesystem_resolver"  # the folder's own code, whatever is installed there
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, guard.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    async def _healthy(self) -> bool:
        with contextlib.suppress(OSError):
            async with self._session.get("http://vllm/health") as answer:
                return bool(answer.status == 200)
        return False

    async def stop(self) -> None:
        """End vLLM."""
        if self._session is not None:
            await self._session.close()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()  # the guard ends it
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, STOP_S)
        failed = not self._ready or (self._process is not None and self._process.returncode not in (0, 143, 137))
        if not failed:
            shutil.rmtree(self._folder, ignore_errors=True)  # a log that says why stays

    def problem(self) -> str | None:
        """Why nothing can be decoded now."""
        if self._process is not None and (code := self._process.poll()) is not None:
            return f"vLLM ended with exit code {code}; its log: {self._log}"
        return None if self._ready else "vLLM is starting"

    def load(self) -> EngineLoad:
        """What we have asked for; vLLM decides what waits."""
        return EngineLoad(running=self._running)

    async def decode(self, request: DecodeRequest) -> AsyncGenerator[list[Token], None]:
        """The tokens of one sequence, as vLLM streams them."""
        if request.temperature > MAX_TEMPERATURE:
            raise UserError(f"temperature: {request.temperature:g}; this server's engine, vLLM, takes 0 to 2")
        body = {
            "model": "pldr",
            "prompt": request.ids,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_k": request.top_k,
            "top_p": request.top_p,
            "min_p": request.min_p,
            "repetition_penalty": request.repetition_penalty,
            "seed": request.seed,
            "stream": True,
            "logprobs": request.num_top,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
        }
        self._running += 1
        try:
            async with self._ask(body) as answer:
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        event = orjson.loads(line[6:])
                        if "error" in event:
                            raise EngineError("vLLM ended the stream with an error")
                        if event["choices"] and (tokens := _tokens(event["choices"][0])):
                            yield tokens
        finally:
            self._running -= 1

    async def score(self, ids: list[int], num_top: int) -> list[Token]:
        """vLLM's log-probabilities of a prompt."""
        body = {"model": "pldr", "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": num_top}
        async with self._ask(body) as answer:
            found = orjson.loads(await answer.read())["choices"][0]["prompt_logprobs"]
        tokens = [Token(ids[0])]
        for id, here in zip(ids[1:], found[1:], strict=True):
            values = {int(key): float(value["logprob"]) for key, value in here.items()}
            best = sorted(values.items(), key=lambda one: -one[1])[:num_top]
            tokens.append(Token(id, values[id], tuple(best)))
        return tokens

    @contextlib.asynccontextmanager
    async def _ask(self, body: dict[str, Any]) -> AsyncIterator[Any]:
        """vLLM's answer, if it is one. What it says otherwise stays in its log."""
        import aiohttp

        try:
            async with self._session.post("http://vllm/v1/completions", json=body) as answer:
                if answer.status != 200:
                    raise EngineError(f"vLLM answered {answer.status}")
                yield answer
        except (aiohttp.ClientError, OSError) as error:
            raise EngineError(f"vLLM is unreachable ({type(error).__name__})") from None


def _tokens(choice: dict[str, Any]) -> list[Token]:
    ids, named = choice.get("token_ids") or [], choice.get("logprobs")
    if named is None:
        return [Token(id) for id in ids]
    tokens = []
    for id, logprob, top in zip(ids, named["token_logprobs"], named["top_logprobs"], strict=True):
        values = {int(key.removeprefix(ID)): float(value) for key, value in (top or {}).items()}
        tokens.append(Token(id, float(logprob), tuple(sorted(values.items(), key=lambda one: -one[1]))))
    return tokens


def cached_export(opened: OpenModel, *, report: Callable[[str], None]) -> Path:
    """The export of this model in the user's cache folder, made if it is not there or is damaged."""
    from pipeline.inference.hf.export import export_hf
    from pipeline.inference.hf.load import read_export

    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "pldr" / "exports" / opened.sha256
    if folder.is_dir():
        with contextlib.suppress(UserError):
            read_export(folder)
            return folder
        shutil.rmtree(folder, ignore_errors=True)
    report(f"exporting to {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    export_hf(opened, folder)
    return folder
