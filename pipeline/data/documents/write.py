"""The last job of stage `shard`: cleaned documents to document tars, by split and weight.

A document's split is decided only by the hash of its normalized text (`key`, see spool.py): re-sharding, adding sources or
another order of files never moves a document, equal texts are always in the same split, and so are the parts of a long
document. The val split takes the lowest hashes and test the highest, so changing one fraction does not affect the other.

Weights: a source of weight 2.5 repeats every training document twice, and half of them, chosen by hash, once more. The later
digits of the hash decide this, not the first ones, or weight and split would be correlated. Repeats are written after all
other documents of their task, so copies of a document are far apart. Decision: val and test hold a document at most once (a
repeated document measures nothing new); a weight below 1 thins them like the train split, so the mix stays the same.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import zstandard
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from pipeline.data.documents.read import SPLITS
from pipeline.data.documents.spool import merge_removed, read_lines
from pipeline.data.executor.markers import write_record
from pipeline.data.tar import TarWriter
from pipeline.data.words import count_words
from pipeline.io.storage import path_of, publish, sha256_file
from pipeline.io.urls import join

HISTOGRAM_BINS = 40  # bin i: 2**i <= characters < 2**(i+1)


@dataclass
class _Shard:
    """A tar being written, and its counts for the index."""

    name: str
    split: str
    tar: TarWriter
    documents: int = 0
    text_bytes: int = 0
    characters: int = 0
    words: int = 0
    length_histogram: list[int] = field(default_factory=lambda: [0] * HISTOGRAM_BINS)

    def add(self, document: Document, **more: Any) -> None:
        text = document.text.encode("utf-8")
        known = {key: document.metadata.get(key) for key in ("license", "part")} | more
        meta = {
            "source": document.id,
            "sha256": hashlib.sha256(text).hexdigest(),
            "split": self.split,
            **{key: value for key, value in known.items() if value is not None},
        }
        key = f"{self.name.removesuffix('.tar')}-{self.documents:08d}"
        self.tar.add(f"{key}.txt", text)
        self.tar.add(f"{key}.json", orjson.dumps(meta, option=orjson.OPT_SORT_KEYS))
        self.documents += 1
        self.text_bytes += len(text)
        self.characters += len(document.text)
        self.words += count_words(document.text)
        self.length_histogram[max(0, len(document.text).bit_length() - 1)] += 1

    def facts(self, published: dict[str, Any]) -> dict[str, Any]:
        names = ("name", "split", "documents", "text_bytes", "characters", "words", "length_histogram")
        return {
            **{name: getattr(self, name) for name in names},
            "bytes": published["size"],
            "sha256": published["sha256"],
        }


class WriteDocuments(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """Writes a task's documents to one tar per split, and the list of what was removed; publishes them at the end, together
    with the task's record.

    folder: path or URL. weights: by source number. removed: (folder, step) of the steps' removals, in order.
    """

    type = "WRITER"
    name = "documents"

    def __init__(
        self,
        folder: str,
        work: Path,
        *,
        val_fraction: float,
        test_fraction: float,
        weights: list[float],
        removed: list[tuple[Path, str]],
    ) -> None:
        super().__init__()
        self.folder = folder
        self.work = work
        self.fractions = {"val_fraction": val_fraction, "test_fraction": test_fraction}
        self.weights = weights
        self.removed = removed

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        shards: dict[str, _Shard] = {}
        lowest, kept, thinned = 1.0, 0, 0
        sources: dict[int, list[int]] = {}  # source -> [documents, bytes of text], as written
        with ExitStack() as open_files:

            def put(document: Document, split: str, **more: Any) -> None:
                if split not in shards:
                    name = f"{split}-{rank:06d}.tar"
                    tar = open_files.enter_context(TarWriter(join(self.folder, name)))
                    shards[split] = _Shard(name, split, tar)
                before = shards[split].text_bytes
                shards[split].add(document, **more)
                counts = sources.setdefault(document.metadata["source"], [0, 0])
                counts[0] += 1
                counts[1] += shards[split].text_bytes - before

            repeats = open_files.enter_context(_Repeats())
            for document in data:
                key = document.metadata["key"]
                first = document.metadata.get("part", 0) == 0  # the parts of a document count once
                weight = self.weights[document.metadata["source"]]
                kept += first
                if not copies(key, weight):
                    thinned += first
                    continue
                lowest = min(lowest, hash_position(key))
                split = split_of(key, **self.fractions)
                put(document, split)
                if split == "train" and copies(key, weight) > 1:
                    repeats.add(document)
            for number in range(1, max((copies("f" * 64, weight) for weight in self.weights), default=1) + 1):
                for document in repeats.read():
                    if number < copies(document.metadata["key"], self.weights[document.metadata["source"]]):
                        put(document, "train", repeat=number)
            files = {shard.name: shard.tar.publish() for shard in shards.values()}
        listed = [shards[split].facts(files[shards[split].name]) for split in SPLITS if split in shards]
        removed = self._publish_removed(rank)
        if removed:
            files[removed["name"]] = {"sha256": removed["sha256"], "size": removed["bytes"]}
        record = {
            "shards": listed,
            "lowest_hash": lowest,
            "documents_kept": kept,
            "left_out_by_weight": thinned,
            "sources": {str(source): counts for source, counts in sorted(sources.items())},
            "removed": [removed] if removed else [],
        }
        write_record(self.work, rank, record, files)
        yield from ()

    def _publish_removed(self, rank: int) -> dict[str, Any] | None:
        name = f"removed/{rank:06d}.jsonl.zst"
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            merged = Path(folder) / "removed.jsonl.zst"
            records = merge_removed(merged, [(where, rank, step) for where, step in self.removed])
            if not records:
                return None
            facts = {"name": name, "records": records, "bytes": merged.stat().st_size, "sha256": sha256_file(merged)}
            publish(join(self.folder, name), lambda temporary: _move(merged, temporary))
        return facts


def _move(source: Path, target: Path) -> None:
    shutil.move(source, target)


class _Repeats:
    """Documents that are written more than once, stored on disk until then."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._stream: Any = zstandard.ZstdCompressor(1).stream_writer(self._file, closefd=False)
        self._empty = True

    def add(self, document: Document) -> None:
        self._empty = False
        self._stream.write(orjson.dumps([document.text, document.id, document.metadata]) + b"\n")

    def read(self) -> Iterator[Document]:
        if self._empty:
            return
        self._stream.close()  # a second close does nothing
        self._file.flush()
        for line in read_lines(path_of(self._file)):
            text, name, metadata = orjson.loads(line)
            yield Document(text=text, id=name, metadata=metadata)

    def __enter__(self) -> _Repeats:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def split_of(key: str, *, val_fraction: float, test_fraction: float) -> str:
    """The split of a document by the hex sha256 of its normalized text."""
    position = hash_position(key)
    if position < val_fraction:
        return "val"
    return "test" if position >= 1 - test_fraction else "train"


def copies(key: str, weight: float) -> int:
    """How often a document of a source with this weight is in the train split: floor(weight), or one more, by its hash."""
    always = int(weight)
    return always + (hash_position(key[13:]) < weight - always)


def hash_position(key: str) -> float:
    """The first 13 digits of a hex hash as a number in [0, 1)."""
    return int(key[:13], 16) / 2**52  # 52 bits: exact in a double, never rounded up to 1
