"""Building the index of document shards: the counts of tasks and steps, added up, and checks that they make a usable corpus.

Counts must agree: the documents read are those kept plus those removed, or the stage fails. The index does not contain where
the corpus is stored, which engine ran, or how many workers: equal corpora have equal fingerprints.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from pipeline.data.documents.read import SCHEMA_VERSION, SPLITS, fingerprint_of
from pipeline.data.documents.write import HISTOGRAM_BINS
from pipeline.data.executor.jobs import DROPPED
from pipeline.data.readers.sources import InputFile
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.data import DataConfig

READ = "documents_read"
IN_INDEX = ("clean", "val_fraction", "test_fraction", "min_characters", "max_characters", "max_document_megabytes")
SHARD_FACTS = ("name", "split", "documents", "text_bytes", "words", "bytes", "sha256", "source")


def build_index(
    data: DataConfig,
    *,
    files: list[InputFile],
    ignored: int,
    hidden: int,
    evaluation: list[InputFile],
    tasks: int,
    steps: list[dict[str, Any]],
    records: list[dict[str, Any]],
) -> dict[str, Any]:
    """The index of document shards, with its fingerprint. steps: `step_stats` of the first and the last job; records: those of
    the last job's tasks, by rank. ignored, hidden: files with an unknown extension, and hidden entries, in folders.
    evaluation: the files of data.clean.decontaminate."""
    shards = [shard for split in SPLITS for record in records for shard in record["shards"] if shard["split"] == split]
    splits = {split: _totals([shard for shard in shards if shard["split"] == split]) for split in SPLITS}
    read = next(step["stats"] for step in steps if step["name"] == "read")
    kept = sum(record["documents_kept"] for record in records)
    settings = data.model_dump(mode="json", include=set(IN_INDEX)) | {"tasks": tasks}
    if (
        data.clean.decontaminate is not None
    ):  # names, not paths: the fingerprint must not depend on where they are stored
        settings["clean"]["decontaminate"]["files"] = [file.name for file in evaluation]
    sources = [_source(number, files, data, records) for number in range(len(data.sources))]
    if data.separate_sources:
        _name_sources(records, [source["name"] for source in sources])
    index: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "settings": settings,
        "sources": sources,
        "counts": {
            "files": len(files),
            "files_of_unknown_ending": ignored,
            **({"hidden_entries": hidden} if hidden else {}),
            "documents_read": read.get(READ, 0),
            "documents_kept": kept,
            "left_out_by_weight": sum(record["left_out_by_weight"] for record in records),
            "documents_written": sum(split["documents"] for split in splits.values()),
        },
        "rejected": _reasons(read),
        "steps": [_step(step) for step in steps if step["name"] not in ("read", "spool", "documents", "exact_keys")],
        "splits": splits,
        "shards": [{k: v for k, v in shard.items() if k in SHARD_FACTS} for shard in shards],
        "removed": [file for record in records for file in record["removed"]],
    }
    gone = sum(n for step in index["steps"] for n in step["removed"].values())
    read_in = index["counts"]["documents_read"]
    assert kept == read_in - gone, f"documents lost: {read_in} read, {gone} removed, {kept} kept"
    return {**index, "fingerprint": fingerprint_of(index)}


def _name_sources(records: list[dict[str, Any]], names: list[str]) -> None:
    """Each task's shards get the name of its only source (`data.separate_sources`)."""
    for record in records:
        for shard in record["shards"]:
            (number,) = record["sources"]
            shard["source"] = names[int(number)]


def _source(number: int, files: list[InputFile], data: DataConfig, records: list[dict[str, Any]]) -> dict[str, Any]:
    own = [file for file in files if file.source == number]
    written = [record["sources"].get(str(number), [0, 0]) for record in records]
    source = data.sources[number]
    return {
        "name": own[0].source_name if own else source.name,
        "weight": source.weight,
        "license": source.license,
        "text_key": source.text_key,
        **({"split_at": source.split_at} if source.split_at is not None else {}),
        "files": len(own),
        "documents": sum(documents for documents, _ in written),
        "text_bytes": sum(size for _, size in written),
    }


def _step(step: dict[str, Any]) -> dict[str, Any]:
    stats = step["stats"]
    return {
        "name": step["name"],
        "documents_in": stats.get("total"),
        "documents_out": stats.get("forwarded"),
        "removed": _reasons(stats),
        "changed": stats.get("changed", 0),
        "characters_cut": stats.get("characters_cut", 0),
        **({"partly_checked": stats["partly_checked"]} if stats.get("partly_checked") else {}),
    }


def _reasons(stats: dict[str, int]) -> dict[str, int]:
    return {label.removeprefix(DROPPED): n for label, n in sorted(stats.items()) if label.startswith(DROPPED)}


def removed_by_reason(index: dict[str, Any]) -> dict[str, int]:
    """Number of documents removed for each reason, over all steps (two of them check the length)."""
    total: Counter[str] = Counter()
    for step in index["steps"]:
        total.update(step["removed"])
    return dict(total)


def _totals(shards: list[dict[str, Any]]) -> dict[str, Any]:
    counted = ("documents", "text_bytes", "characters", "words")
    histogram = [sum(counts) for counts in zip(*(shard["length_histogram"] for shard in shards), strict=True)]
    return {
        **{name: sum(shard[name] for shard in shards) for name in counted},
        "shards": len(shards),
        "length_histogram": histogram or [0] * HISTOGRAM_BINS,
    }


def check_splits(index: dict[str, Any], data: DataConfig, records: list[dict[str, Any]]) -> None:
    """Raise UserError if there is nothing to train or to validate on."""
    counts, splits = index["counts"], index["splits"]
    if not counts["documents_written"]:
        gone = {**index["rejected"], **removed_by_reason(index)}
        why = ", ".join(f"{n} {reason}" for reason, n in gone.items()) or "the files are empty"
        raise UserError(
            f"data.sources: {counts['files']} files, but no document is left ({why}); use other sources, or relax data.clean "
            "or data.min_characters"
        )
    if not splits["val"]["documents"]:
        smallest = math.ceil(min(record["lowest_hash"] for record in records) * 1000 + 1e-9) / 1000
        raise UserError(
            f"the val split is empty: data.val_fraction {data.val_fraction} of {counts['documents_kept']} documents selected "
            f"none; set data.val_fraction to {smallest} or more (a fraction of documents, selected by hash)"
        )
    if not splits["train"]["documents"]:
        raise UserError(
            f"the train split is empty: data.val_fraction {data.val_fraction} and data.test_fraction "
            f"{data.test_fraction} selected all {counts['documents_kept']} documents; lower them or add text"
        )
