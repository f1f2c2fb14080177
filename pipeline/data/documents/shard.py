"""Stage `shard`: corpora to cleaned document tars, in parallel, restartable, byte-identical on every machine.

    files -> units -> clean -> spool -> find duplicates -> write -> documents/{train,val,test}-{shard:06d}.tar, index.json

The arrows are jobs of datatrove tasks (pipeline/data/executor/jobs.py) on the engine of `data.executor`; docs/data.md has a
diagram. Units (pieces of files) are assigned to `data.tasks` tasks by size; task i writes shard i of each split. `data.workers`
and the engine do not change the result. Duplicates are found between jobs from sorted keys on disk (pipeline/data/dedup), so
memory does not grow with the corpus.

Restart: a finished task is not run again while its files have their recorded sha256; the index is written last, and a folder
without it is unfinished. The spool is deleted at the end, so running the stage again cleans again.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from pipeline.config.source_names import require_sources
from pipeline.data.dedup.exact import DropDuplicates, ExactKeys, FindDuplicates, count_keys, partitions
from pipeline.data.dedup.near import ClusterNear, NearKeys
from pipeline.data.dedup.paragraphs import CutParagraphs, ParagraphKeys
from pipeline.data.documents.index import READ, build_index, check_splits, removed_by_reason
from pipeline.data.documents.read import SCHEMA_VERSION
from pipeline.data.documents.spool import ReadSpool, RemovedWriter, WriteSpool
from pipeline.data.documents.write import WriteDocuments
from pipeline.data.executor.jobs import DROPPED, Engine, engine_of, run_tasks
from pipeline.data.executor.markers import has_stats, is_complete, step_stats
from pipeline.data.executor.progress import advance
from pipeline.data.filters import chain, decontaminate
from pipeline.data.filters.length import LengthFilter, SplitLong
from pipeline.data.readers.sources import InputFile, Listing, list_sources
from pipeline.data.readers.text import bad_input_error, read_unit
from pipeline.data.readers.units import (
    Rejected,
    Unit,
    deal,
    deal_by_source,
    is_copied,
    ordinal,
    plan_units,
    unit_as_dict,
    unit_from_dict,
)
from pipeline.data.tar import remove_strays
from pipeline.io.storage import (
    Need,
    bytes_below,
    publish_json,
    read_json,
    require_space,
    sha256_json,
    temporary_space,
)
from pipeline.io.urls import is_local, join, local_path

if TYPE_CHECKING:  # workers import this module, and the configuration imports torch
    from pipeline.config.paths import RunPaths
    from pipeline.config.run import RunConfig

TASK_BYTES = 256_000_000  # of text, about, for one task unless data.tasks is set
REMOVED = re.compile(r"\d{6}\.jsonl\.zst")
log = logging.getLogger(__name__)
SPOOL = 0.5  # estimated bytes of spool per byte of text
TAR = 1.1  # of documents


def shard_documents(config: RunConfig, paths: RunPaths, *, dry_run: bool = False) -> dict[str, Any]:
    """Run the stage. Returns {"fingerprint", "documents", "removed", "rejected", "splits", "shards", "files"}.

    dry_run: with data.executor slurm, only write and check the script of the first job; raises DryRun.

    Raises UserError for a source, file or line that cannot be read (unless data.on_bad_input is skip), an empty corpus, a split
    without documents, a missing package, or a full disk.
    """
    chain.check_extras(config.data.clean.model_dump())
    jobs = _Jobs(config, paths, engine_of(config.data, dry_run=dry_run))
    _tell_left_out(jobs.listing)
    records = jobs.run()
    index = build_index(
        config.data,
        files=jobs.files,
        ignored=jobs.listing.ignored,
        hidden=len(jobs.listing.hidden),
        evaluation=jobs.evaluation,
        tasks=jobs.tasks,
        steps=jobs.step_stats(),
        records=records,
    )
    check_splits(index, config.data, records)
    jobs.remove_strays({shard["name"] for shard in index["shards"]}, {file["name"] for file in index["removed"]})
    publish_json(join(jobs.folder, "index.json"), index)
    jobs.discard_spool()
    counted = ("documents", "text_bytes", "shards")
    return {
        "fingerprint": index["fingerprint"],
        "documents": index["counts"]["documents_written"],
        "removed": removed_by_reason(index),
        "rejected": index["rejected"],
        "splits": {split: {key: facts[key] for key in counted} for split, facts in index["splits"].items()},
        "shards": len(index["shards"]),
        "files": index["counts"]["files"],
    }


def stage_inputs(config: RunConfig) -> dict[str, Any]:
    """Everything that determines the stage's result: its settings, and its files with size and times."""
    from pipeline.config.keys import of_stage

    data = config.data
    decontamination = data.clean.decontaminate
    return {
        "schema_version": SCHEMA_VERSION,
        "config": of_stage(config, "shard"),
        "sources": _identities(list_sources(data.sources, outputs=_outputs(config)).files),
        "evaluation": _identities(decontaminate.evaluation_files(decontamination.files, _outputs(config)))
        if decontamination
        else [],
    }


def _identities(files: list[InputFile]) -> list[dict[str, Any]]:
    """What identifies files; `state` is for reading, `identity` says the same. `split_at` is among the settings."""
    left_out = {"state", "split_at", "packaged"}
    return [
        {
            key: value
            for key, value in asdict(file).items()
            if key not in left_out and not (key == "url" and file.packaged)
        }
        for file in files
    ]


def _outputs(config: RunConfig) -> list[str]:
    """The folders that the run writes: never input."""
    return [url for url in (config.run_dir, config.data.output, config.tokens.output) if url]


def _tell_left_out(listing: Listing) -> None:
    for what, left in (("hidden entries", listing.hidden), ("outputs of pldr", listing.ours)):
        if left:
            more = f" and {len(left) - 1:,} more" if len(left) > 1 else ""
            log.warning("data.sources: %s in these folders are left out: %s%s", what, left[0], more)


class ReadUnits(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """The documents of a task's units. Bad input stops the task, or is counted by reason and recorded."""

    type = "READER"
    name = "read"

    def __init__(self, plan: Path, removed: RemovedWriter, *, max_document_bytes: int, stop: bool) -> None:
        super().__init__()
        self.plan = plan
        self.removed = removed
        self.max_document_bytes = max_document_bytes
        self.stop = stop

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with self.removed:
            for tree in read_json(self.plan / f"{rank:05d}.json"):
                unit = unit_from_dict(tree)
                for item in read_unit(unit, max_document_bytes=self.max_document_bytes):
                    if isinstance(item, Rejected):
                        if self.stop:
                            raise bad_input_error(unit, item)
                        self.stat_update(DROPPED + item.reason)
                        self.removed.write(_rejected(unit, item), rank)
                        continue
                    self.stat_update(READ)
                    metadata: dict[str, Any] = {
                        "ordinal": ordinal(unit.number, item.record),
                        "source": unit.file.source,
                    }
                    if unit.file.license is not None:
                        metadata["license"] = unit.file.license
                    yield Document(text=item.text, id=unit.document_id(item.record), metadata=metadata)
                    advance(1, len(item.text))


def _rejected(unit: Unit, item: Rejected) -> Document:
    name = unit.file.name if item.record is None else unit.document_id(item.record)
    metadata = {"filter_reason": item.reason, "message": item.message, "source": unit.file.source}
    return Document(text="", id=name, metadata=metadata)


class _Jobs:
    """The stage's jobs in order, and the folders through which they pass data."""

    def __init__(self, config: RunConfig, paths: RunPaths, engine: Engine) -> None:
        self.data = config.data
        self.engine = engine
        self.outputs = _outputs(config)
        self.listing = list_sources(self.data.sources, outputs=self.outputs)
        self.files = self.listing.files
        require_sources(self.data.phases, {file.source_name for file in self.files})
        self.evaluation: list[InputFile] = []
        if decontamination := self.data.clean.decontaminate:
            self.evaluation = decontaminate.evaluation_files(decontamination.files, self.outputs)
        self.units = plan_units(self.files)
        self.text_bytes = sum(unit.size for unit in self.units)
        wanted = self.data.tasks or math.ceil(self.text_bytes / TASK_BYTES)
        deal_units = deal_by_source if self.data.separate_sources else deal
        self.plan = deal_units(self.units, max(1, min(wanted, len(self.units))))
        self.tasks = len(self.plan)
        self.folder = self.data.output or str(paths.documents)
        self.work = paths.logs / f"shard-{sha256_json(stage_inputs(config))[:16]}"
        self.spool = self.work / "clean" / "spool"
        self.found = self.work / "found"

    def run(self) -> list[dict[str, Any]]:
        """Run every incomplete job. Returns the records of the last one's tasks, by rank."""
        self._check_space()
        steps = self.data.clean
        last = self._write_steps()
        written = is_complete(self.work / "write", self.folder, self.tasks)
        if not (written and has_stats(self.work / "clean", self.tasks)):
            self._clean()
            if steps.exact_duplicates:
                self._find(self.work / "clean" / "exact-keys", "exact")
            if near := steps.near_duplicates:
                keys = self.work / "near-keys"
                near_keys = NearKeys(keys, near.similarity, near.ngram, near.hashes, work=keys)
                self._job("near-keys", [*self._survivors(near=False), near_keys])
                self._find(keys, "near-pairs")
                cluster = ClusterNear(self.found / "near-pairs", self.found / "near", work=self.found / "near")
                self._job("found/near", [cluster], tasks=1)
            if paragraphs := steps.paragraph_duplicates:
                keys = self.work / "paragraph-keys"
                paragraph_keys = ParagraphKeys(keys, paragraphs.min_characters, work=keys)
                self._job("paragraph-keys", [*self._survivors(), paragraph_keys])
                self._find(keys, "paragraphs")
        return self._job("write", last, output=self.folder)

    def _check_space(self) -> None:
        """Raise UserError unless every disk that this stage writes to has room for what it will write there, before the work
        begins. Temporary files are asked about where this machine does the work."""
        weights = [source.weight for source in self.data.sources]
        written = int(sum(unit.size * weights[unit.file.source] for unit in self.units) * TAR)
        spool = int(self.text_bytes * SPOOL) - bytes_below(self.spool)
        needs = [Need(self.work, max(0, spool), "the cleaned documents until they are written")]
        at_once = min(self.data.workers, self.tasks)
        temporary = 0
        if is_local(self.folder):
            folder = local_path(self.folder).absolute()
            written = max(0, written - bytes_below(folder, "*.tar"))
            fix = (
                "set data.output to another disk" if self.data.output else "set run_dir or data.output to another disk"
            )
            needs.append(Need(folder, written, "writing the documents", fix))
        else:
            temporary += written * at_once // self.tasks  # each task's shards until they are uploaded
        if any(weight > 1 for weight in weights):  # what is written again
            repeated = sum(unit.size for unit in self.units if weights[unit.file.source] > 1)
            temporary += int(repeated * SPOOL) * at_once // self.tasks
        copied = sorted((unit.size for unit in self.units if is_copied(unit.file)), reverse=True)
        temporary = max(temporary, sum(copied[:at_once]))
        if temporary and self.data.executor == "local":
            needs.append(temporary_space(temporary, "temporary files"))
        require_space(needs)

    def step_stats(self) -> list[dict[str, Any]]:
        """The counts of each step of the first and the last job, in order."""
        return [step for job in ("clean", "write") for step in step_stats(self.work / job, self.tasks)]

    def discard_spool(self) -> None:
        """Delete files that only a restart of an unfinished stage needs."""
        for job in ("clean/spool", "clean/exact-keys", "near-keys", "paragraph-keys", "found"):
            shutil.rmtree(self.work / job, ignore_errors=True)

    def remove_strays(self, shards: set[str], removed: set[str]) -> None:
        """Delete files of an earlier corpus with more tasks, which a reader that globs would mix in."""
        remove_strays(self.folder, shards)
        lists = join(self.folder, "removed")
        if not is_local(lists) or local_path(lists).is_dir():
            remove_strays(lists, {name.removeprefix("removed/") for name in removed}, REMOVED)

    def _job(
        self, name: str, steps: list[PipelineStep], *, tasks: int | None = None, output: str | None = None
    ) -> list[dict[str, Any]]:
        work = self.work / name
        return run_tasks(
            steps,
            tasks=tasks or self.tasks,
            workers=self.data.workers,
            workers_key="data.workers",
            work=work,
            output=output or work,
            engine=self.engine,
            label=f"shard: {name}",
            total_bytes=None if tasks else self.text_bytes,
        )

    def _clean(self) -> None:
        plan = self.work / "plan"
        for rank, share in enumerate(self.plan):
            publish_json(plan / f"{rank:05d}.json", [unit_as_dict(unit) for unit in share])
        publish_json(self.work / "units.json", [unit_as_dict(unit) for unit in self.units])
        data, settings = self.data, self.data.clean.model_dump()
        contamination = None
        if decontamination := data.clean.decontaminate:
            contamination = self.work / "contamination.npz"
            decontaminate.build_index(
                decontamination.files,
                decontamination.ngram,
                contamination,
                data.max_document_megabytes * 10**6,
                self.outputs,
            )
        keys = self.work / "clean" / "exact-keys" if data.clean.exact_duplicates else None
        folder = self.work / "clean" / "removed"
        steps: list[PipelineStep] = [
            ReadUnits(
                plan,
                RemovedWriter(folder, "read"),
                max_document_bytes=data.max_document_megabytes * 10**6,
                stop=data.on_bad_input == "error",
            ),
            *chain.document_blocks(
                settings,
                min_characters=data.min_characters,
                max_characters=data.max_characters,
                contamination=contamination,
                removed=lambda step: RemovedWriter(folder, step),
            ),
        ]
        key_steps = [ExactKeys(keys)] if keys else []
        removed = [step.name for step in steps]
        self._job("clean", [*steps, *key_steps, WriteSpool(self.work / "clean", keys=keys, removed=removed)])

    def _find(self, keys: Path, name: str) -> None:
        """Find duplicates among sorted keys: one task for each range of hashes."""
        found = self.found / name
        self._job(f"found/{name}", [FindDuplicates(keys, found, work=found)], tasks=partitions(count_keys(keys)))

    def _survivors(self, *, near: bool = True) -> list[PipelineStep]:
        """The spool without the duplicates found so far. They are recorded when the documents are written."""
        return [ReadSpool(self.spool), *self._drops(None, near=near)]

    def _drops(self, removed: Path | None, *, near: bool = True) -> list[PipelineStep]:
        steps = self.data.clean
        kinds = [("exact", steps.exact_duplicates), ("near", near and steps.near_duplicates is not None)]
        return [
            DropDuplicates(
                self.found / kind,
                f"{kind}_duplicate",
                exclusion_writer=removed
                and RemovedWriter(removed, f"{kind}_duplicates", units=self.work / "units.json"),
            )
            for kind, on in kinds
            if on
        ]

    def _write_steps(self) -> list[PipelineStep]:
        data, steps = self.data, self.data.clean
        folder = self.work / "write" / "removed"
        blocks = self._drops(folder)
        if steps.paragraph_duplicates:
            writer = RemovedWriter(folder, CutParagraphs.name, units=self.work / "units.json")
            blocks.append(CutParagraphs(self.found / "paragraphs", writer))
        if steps.paragraph_duplicates or (steps.decontaminate and steps.decontaminate.action == "cut"):
            writer = RemovedWriter(folder, "length")
            blocks.append(LengthFilter(data.min_characters, data.max_characters, exclusion_writer=writer))
        if steps.split_long:
            blocks.append(SplitLong(steps.split_long.max_characters))
        cleaned = self.work / "clean" / "removed"
        names = ["read", *chain.block_names(steps.model_dump())]
        sink = WriteDocuments(
            self.folder,
            self.work / "write",
            val_fraction=data.val_fraction,
            test_fraction=data.test_fraction,
            weights=[source.weight for source in data.sources],
            removed=[(cleaned, name) for name in names] + [(folder, block.name) for block in blocks],
        )
        return [ReadSpool(self.spool), *blocks, sink]
