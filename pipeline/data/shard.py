"""Stage `shard`: corpora to document tars, in parallel, restartable, byte-identical whoever runs it.

    files --(datatrove tasks: read | filter | write)--> documents/{train,val,test}-{shard:06d}.tar +
    index.json

Files are dealt to `data.tasks` tasks by size; task i writes shard i of each split. `data.workers` tasks run
at once and change nothing in the result. A document's split is decided by the sha256 of its text alone:
re-sharding, adding sources or another order of files never moves a document between splits, and equal texts
are always in the same one. The val split is cut from the low end of the hashes and test from the high end,
so that changing one fraction leaves the other.

Restart: see tasks.py. The index is written last; a folder without it is unfinished.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from pipeline.data.documents import SCHEMA_VERSION, SPLITS, fingerprint_of
from pipeline.data.read import Rejected, bad_input_error, read_unit
from pipeline.data.sources import InputFile, find_files
from pipeline.data.tar import TarWriter
from pipeline.data.tasks import DROPPED, run_tasks, stat_totals, write_record
from pipeline.data.units import plan_units
from pipeline.errors import UserError
from pipeline.storage import publish_json, require_free_space, sha256_json

if TYPE_CHECKING:  # workers import this module; torch is behind the configuration
    from pipeline.config import RunConfig, RunPaths
    from pipeline.data_config import DataConfig

READ = "documents_read"
GROWTH = {None: 1.1, "gzip": 4.5, "bz2": 5.5, "xz": 6.0, "zstd": 5.5}  # about, bytes of tar per byte read


def shard_documents(config: RunConfig, paths: RunPaths) -> dict[str, Any]:
    """Run the stage. Returns {"fingerprint", "documents", "dropped", "splits", "shards", "files"}.

    Raises UserError for a source, file or line that cannot be read (unless data.on_bad_input is skip), a
    corpus that ends up empty, a split without documents, or a full disk.
    """
    data = config.data
    files, ignored = find_files(data.sources)
    needed = sum(file.size * GROWTH[file.compression] for file in files)
    require_free_space(paths.documents, int(needed), "writing the documents")

    tasks = min(data.tasks or 2, len(files))
    settings: dict[str, float] = {
        "val_fraction": data.val_fraction,
        "test_fraction": data.test_fraction,
        "min_characters": data.min_characters,
        "tasks": tasks,
    }
    plan = deal(files, tasks)
    inputs = [asdict(file) for file in files]
    key = sha256_json([SCHEMA_VERSION, settings, data.on_bad_input, inputs])
    work = paths.logs / f"shard-{key[:16]}"
    for rank, share in enumerate(plan):
        publish_json(work / "plan" / f"{rank:05d}.json", [asdict(file) for file in share])

    steps = [
        ReadFiles(work / "plan", stop=data.on_bad_input == "error"),
        LengthFilter(data.min_characters),
        WriteDocuments(paths.documents, work, val_fraction=data.val_fraction, test_fraction=data.test_fraction),
    ]
    records = run_tasks(
        steps, tasks=tasks, workers=data.workers, workers_key="data.workers", work=work, output=paths.documents
    )
    counts = stat_totals(work, tasks)
    index = _index(records, counts, settings, ignored=ignored, files=len(files), sources=data)
    _check_splits(index, data, records)
    _remove_strays(paths.documents, {shard["name"] for shard in index["shards"]})
    publish_json(paths.documents / "index.json", index)
    return {
        "fingerprint": index["fingerprint"],
        "documents": index["counts"]["documents_kept"],
        "dropped": index["counts"]["dropped"],
        "splits": index["splits"],
        "shards": len(index["shards"]),
        "files": len(files),
    }


def deal(files: list[InputFile], tasks: int) -> list[list[InputFile]]:
    """Files to tasks, the largest first to the least loaded: even work, and the same deal on every
    machine."""
    plan: list[list[tuple[int, InputFile]]] = [[] for _ in range(tasks)]
    load = [(0, rank) for rank in range(tasks)]
    for position, file in sorted(enumerate(files), key=lambda entry: (-entry[1].size, entry[0])):
        size, rank = heapq.heappop(load)
        plan[rank].append((position, file))
        heapq.heappush(load, (size + file.size + 1, rank))
    return [[file for _, file in sorted(share, key=lambda entry: entry[0])] for share in plan]


def split_of(sha256: str, *, val_fraction: float, test_fraction: float) -> str:
    """The split of a document by the hex sha256 of its text."""
    position = hash_position(sha256)
    if position < val_fraction:
        return "val"
    return "test" if position >= 1 - test_fraction else "train"


def hash_position(sha256: str) -> float:
    """A hex sha256 as a number in [0, 1)."""
    return int(sha256[:13], 16) / 2**52  # 52 bits: exact in a double, never rounded up to 1


class ReadFiles(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """The documents of a task's files. Bad input stops the task, or is counted by its reason."""

    type = "READER"
    name = "files"

    def __init__(self, plan: Path, *, stop: bool) -> None:
        super().__init__()
        self.plan = plan
        self.stop = stop

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for entry in json.loads((self.plan / f"{rank:05d}.json").read_text(encoding="utf-8")):
            for unit in plan_units([InputFile(**entry)]):
                for item in read_unit(unit, max_document_bytes=64_000_000):
                    if not isinstance(item, Rejected):
                        self.stat_update(READ)
                        name = unit.document_id(item.record)
                        yield Document(text=item.text, id=name, metadata={"license": unit.file.license})
                    elif self.stop:
                        raise bad_input_error(unit, item)
                    else:
                        self.stat_update(DROPPED + item.reason)


class LengthFilter(BaseFilter):  # type: ignore[misc]
    """Drops documents with fewer than `minimum` characters, white space at the ends not counted."""

    name = "length"

    def __init__(self, minimum: int) -> None:
        super().__init__()
        self.minimum = minimum

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return len(doc.text.strip()) >= self.minimum or (False, "too_short")


class WriteDocuments(PipelineStep):  # type: ignore[misc]
    """Writes a task's documents to one tar a split; publishes them together with the task's record at the
    end."""

    type = "WRITER"
    name = "documents"

    def __init__(self, folder: Path, work: Path, *, val_fraction: float, test_fraction: float) -> None:
        super().__init__()
        self.folder = folder
        self.work = work
        self.fractions = {"val_fraction": val_fraction, "test_fraction": test_fraction}

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        tars: dict[str, TarWriter] = {}
        shards: dict[str, dict[str, Any]] = {}
        lowest = 1.0
        with ExitStack() as open_tars:
            for document in data:
                text = document.text.encode("utf-8")
                sha256 = hashlib.sha256(text).hexdigest()
                lowest = min(lowest, hash_position(sha256))
                split = split_of(sha256, **self.fractions)
                if split not in tars:
                    name = f"{split}-{rank:06d}.tar"
                    tars[split] = open_tars.enter_context(TarWriter(self.folder / name))
                    shards[split] = {"name": name, "split": split, "documents": 0, "text_bytes": 0}
                shard = shards[split]
                meta = {"source": document.id, "sha256": sha256, "split": split, **document.metadata}
                known = {key: value for key, value in meta.items() if value is not None}
                key = f"{split}-{rank:06d}-{shard['documents']:08d}"
                tars[split].add(f"{key}.txt", text)
                tars[split].add(f"{key}.json", json.dumps(known, sort_keys=True, ensure_ascii=False).encode())
                shard["documents"] += 1
                shard["text_bytes"] += len(text)
                yield document
            files = {shards[split]["name"]: tar.publish() for split, tar in tars.items()}
        for shard in shards.values():
            shard["bytes"], shard["sha256"] = files[shard["name"]]["size"], files[shard["name"]]["sha256"]
        write_record(self.work, rank, {"shards": list(shards.values()), "lowest_hash": lowest}, files)


def _index(
    records: list[dict[str, Any]],
    counts: dict[str, int],
    settings: dict[str, float],
    *,
    ignored: int,
    files: int,
    sources: DataConfig,
) -> dict[str, Any]:
    by_split = {split: [s for r in records for s in r["shards"] if s["split"] == split] for split in SPLITS}
    splits = {
        split: {
            "documents": sum(s["documents"] for s in shards),
            "text_bytes": sum(s["text_bytes"] for s in shards),
            "shards": len(shards),
        }
        for split, shards in by_split.items()
    }
    kept = sum(split["documents"] for split in splits.values())
    dropped = {k.removeprefix(DROPPED): v for k, v in sorted(counts.items()) if k.startswith(DROPPED)}
    read = counts.get(READ, 0)
    not_read = sum(v for reason, v in dropped.items() if reason != "too_short")  # rejected before it was a document
    assert kept == read - (sum(dropped.values()) - not_read), f"documents lost: {counts}, kept {kept}"
    index: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "settings": settings,
        "sources": [source.model_dump(mode="json") for source in sources.sources],
        "counts": {
            "files": files,
            "files_of_unknown_ending": ignored,
            "documents_read": read,
            "documents_kept": kept,
            "dropped": dropped,
        },
        "splits": splits,
        "shards": [shard for shards in by_split.values() for shard in shards],
    }
    return {**index, "fingerprint": fingerprint_of(index)}


def _check_splits(index: dict[str, Any], data: DataConfig, records: list[dict[str, Any]]) -> None:
    """Raise UserError when there is nothing to train or to validate on."""
    counts = index["counts"]
    kept, dropped = counts["documents_kept"], counts["dropped"]
    if not kept:
        why = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "the files are empty"
        raise UserError(
            f"data.sources: {counts['files']} files and no document left ({why}); "
            "name other sources or lower data.min_characters"
        )
    if not index["splits"]["val"]["documents"]:
        smallest = math.ceil(min(record["lowest_hash"] for record in records) * 1000 + 1e-9) / 1000
        raise UserError(
            f"the val split is empty: data.val_fraction {data.val_fraction} of {kept} documents took none; "
            f"set data.val_fraction to {smallest} or more (it is measured in documents, chosen by hash)"
        )
    if not index["splits"]["train"]["documents"]:
        raise UserError(
            f"the train split is empty: data.val_fraction {data.val_fraction} and data.test_fraction "
            f"{data.test_fraction} took all {kept} documents; lower them or name more text"
        )


def _remove_strays(folder: Path, names: set[str]) -> None:
    """Shards of an earlier corpus with more tasks: a reader that globs would mix them in."""
    for path in folder.glob("*.tar"):
        if path.name not in names and path.name.split("-")[0] in SPLITS:
            path.unlink()
