"""`python -m pipeline.bench.gpu OUT`: runs the parts one after the other and gathers what they measured in OUT/result.json.

Every part is a process of its own with a limit, so that one that fails or hangs costs the others nothing, and what it measured
until then stays. Decoding needs torch, and for two parts transformers and sentencepiece; training what the trainer needs
(pack.py packs it for a machine without a network). On a machine without a GPU, `--device cpu --tiny` goes the same way with a
small model; nothing is captured there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

from pipeline.bench.gpu.parts import PARTS, What, parts_of, run_part
from pipeline.bench.gpu.training.summary import judge, table

TOTAL_S = 460.0


def main(words: list[str] | None = None) -> int:
    """Exit code 0 if every part ended as it should."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench.gpu", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for result.json and the parts' logs")
    parser.add_argument(
        "--what", choices=get_args(What), default="decode", help="%(default)s; all: the main parts of both"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try everything")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="for all parts together (%(default)s)")
    parser.add_argument(
        "--patience", type=float, default=1.0, help="times every limit, on a slow machine (%(default)s)"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), metavar="PART", help="which parts, instead of --what"
    )
    parser.add_argument("--reference", type=Path, help="a clone of PLDR-LLM-with-KVG-cache, to time its loop too")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        run_part(
            arguments.part,
            arguments.out / f"{arguments.part}.jsonl",
            device=arguments.device,
            tiny=arguments.tiny,
            reference=arguments.reference,
        )
        return 0
    result = run_parts(arguments)
    return 0 if all("error" not in part for part in result["parts"].values()) else 1


def run_parts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every part in its own process, within its limit and what is left of the whole."""
    deadline = time.monotonic() + arguments.seconds * arguments.patience
    result: dict[str, Any] = {"command": sys.argv, "device": arguments.device, "tiny": arguments.tiny, "parts": {}}
    for name in arguments.parts or parts_of(arguments.what):
        limit = min(PARTS[name].seconds * arguments.patience, deadline - time.monotonic())
        found = result["parts"][name] = _run_process(name, arguments, limit)
        print(f"{name}: {found['seconds']:.0f} s, {len(found['found'])} results {found.get('error', '')}", flush=True)
        wanted = judge([row for part in result["parts"].values() for row in part["found"]])
        result["wanted"] = [each._asdict() for each in wanted]
        (arguments.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    if any(PARTS[name].trains for name in result["parts"]):
        if arguments.tiny or arguments.device != "cuda":
            print("A rehearsal: its numbers say nothing of a GPU.")
        print(table(wanted), flush=True)
    return result


def _run_process(name: str, arguments: argparse.Namespace, limit: float) -> dict[str, Any]:
    found, log = arguments.out / f"{name}.jsonl", arguments.out / f"{name}.log"
    found.unlink(missing_ok=True)
    if limit <= 0:
        return {"seconds": 0.0, "found": [], "error": "no time left"}
    words = [
        sys.executable,
        "-m",
        "pipeline.bench.gpu",
        str(arguments.out),
        "--part",
        name,
        "--device",
        arguments.device,
    ]
    words += ["--tiny"] if arguments.tiny else []
    words += ["--reference", str(arguments.reference)] if arguments.reference else []
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    lines = found.read_text().splitlines() if found.is_file() else []
    one: dict[str, Any] = {"seconds": time.monotonic() - started, "found": [json.loads(line) for line in lines]}
    if code is None:
        one["error"] = f"stopped after {limit:.0f} s"
    elif code != 0:
        one["error"] = (log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"])[-1]
    return one


if __name__ == "__main__":
    sys.exit(main())
