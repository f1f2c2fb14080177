"""A data stage in a process of its own: `python -m tests.pipeline.data.run_stage STAGE CONFIG`.

STAGE: shard or tokenize. CONFIG: the configuration as JSON. A UserError is printed to stdout, with exit code 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths
from pipeline.data.documents.shard import shard_documents
from pipeline.data.tokens.tokenize import tokenize_documents
from pipeline.errors import UserError

STAGES: dict[str, Callable[..., dict[str, Any]]] = {"shard": shard_documents, "tokenize": tokenize_documents}


def main() -> None:
    config = parse_config(json.loads(sys.argv[2]), where="test")
    try:
        STAGES[sys.argv[1]](config, RunPaths(config.run_dir))
    except UserError as error:
        print(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
