"""A process that evaluates and is killed in the middle: `TOKENIZER DATA OUT CHUNKS`, after so many chunks."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from pipeline.inference.evaluate import adapter, run
from tests.pipeline.inference.evaluate.small import open_tiny

if __name__ == "__main__":
    tokenizer, data, out, chunks = sys.argv[1:]
    adapter.CHUNK_TOKENS = 200
    left = int(chunks)

    def die(_: str) -> None:
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    run.evaluate(
        open_tiny(Path(tokenizer)), ["arc_easy", "winogrande"], out=Path(out), data=Path(data), status=die, every_s=0
    )
