"""Token tars for the trainer, made on this machine: generated text through the stages `shard`, `tokenizer` and `tokenize`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.bench.gpu.training.ours import recipe
from pipeline.bench.gpu.training.setting import TrainSetting

WORKERS = 8
BLOCK = 64


def tokens(setting: TrainSetting) -> Iterator[dict[str, Any]]:
    """Seconds and bytes of each data stage. The tokenizer is small, which costs little: a loader does not look at ids."""
    from pipeline.bench.data_input import generated
    from pipeline.config.paths import RunPaths
    from pipeline.data.documents.shard import shard_documents
    from pipeline.data.tokens.tokenize import tokenize_documents
    from pipeline.data.tokens.train_tokenizer import make_tokenizer

    folder = run_dir(setting)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (folder / "corpus.jsonl").open("w") as lines:
        for text in generated(setting.text_bytes):
            lines.write(json.dumps({"text": text}) + "\n")
    yield {"what": "stage", "stage": "corpus", "seconds": time.perf_counter() - started, "bytes": setting.text_bytes}
    model = replace(next(iter(setting.models.values())), vocab_size=setting.pieces)
    sources = [{"url": str(folder / "corpus.jsonl")}]
    config = recipe(model, folder, sources=sources, workers=WORKERS, tasks=WORKERS, val_fraction=0.2)
    for name, stage in (("shard", shard_documents), ("tokenizer", make_tokenizer), ("tokenize", tokenize_documents)):
        started = time.perf_counter()
        result = stage(config, RunPaths(config.run_dir))
        plain = {key: value for key, value in result.items() if isinstance(value, int | float)}
        yield {"what": "stage", "stage": name, "seconds": time.perf_counter() - started, **plain}


def run_dir(setting: TrainSetting) -> Path:
    """Where the data stages write, and the trainer reads."""
    return setting.work / "run"


def tokens_folder(setting: TrainSetting) -> tuple[Path, str]:
    """The folder of token tars, and where they come from. Random ids in tars of the same format where the stages have not
    ended."""
    from pipeline.bench.data_input import write_tokens
    from pipeline.config.paths import RunPaths

    made = RunPaths(run_dir(setting)).tokens
    if (made / "index.json").is_file():
        return made, "data stages"
    folder, config = setting.work / "random-tokens", next(iter(setting.models.values()))
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"context_length": config.context_length, "vocab_size": config.vocab_size}
    write_tokens(folder, shards=4, sequences=512, block_sequences=BLOCK, **sizes)
    return folder, "random ids"
