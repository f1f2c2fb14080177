"""Worker of test_progress.py: `python -m tests.pipeline.data.executor.show_progress FOLDER` shows the bar of a 3-second job."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pipeline.data.executor.progress import Bar, advance, counting


def main() -> None:
    work = Path(sys.argv[1])
    with Bar(work, "shard: clean", tasks=2, total_bytes=40_000_000), counting(work, 0):
        for _ in range(60):
            advance(10, 500_000)
            time.sleep(0.05)


if __name__ == "__main__":
    main()
