"""The data half of RunConfig: sources, cleaning, splits, engines, tokenizer, tokens. See docs/data.md.

A cleaning step is off unless it is set: `near_duplicates: true` takes its defaults, `near_duplicates: {similarity: 0.8}`
changes one. The order of the steps is fixed (docs/data.md), whatever the order in the YAML.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from pipeline.config.section import Kind, Section, Switch, Url
from pipeline.config.source_names import unknown_source

corpus = Kind("needs force", ("shard",), result=True)  # which documents there are
pieces = Kind("needs force", ("tokenizer",), result=True)
packed = Kind("needs force", ("tokenize",), result=True)
packed_since = replace(packed, added=True)
documents = Kind("needs force", ("shard", "tokenizer", "tokenize"), result=("shard",))  # where they are
tokens = Kind("needs force", ("tokenize", "train", "extract", "validate", "bundle"), result=("tokenize",))
borrowed = Kind(  # whose they are
    "may change", ("shard", "tokenizer", "tokenize", "train", "extract", "validate", "bundle"), result=False, added=True
)
engine = Kind("may change", ("shard", "tokenize"), result=False)  # who does the work: the same files come of it
shard_work = replace(engine, stages=("shard",))
tokenize_work = replace(engine, stages=("tokenize",))
mixture = Kind("needs force", ("train",), result=True, added=True)
MIXTURE_BLOCK = 1024  # sequences in a row in which data.phases holds its shares (pipeline/data/loading/mixture.py)
reading = Kind("may change", ("train", "extract", "validate", "bundle"), result=False)  # of token shards


class Source(Section):
    """One corpus. `url`: a path, folder, glob or fsspec URL, or `package://NAME/GLOB` for files inside an installed package
    (found without importing it). Formats by ending: .txt .md .html .htm (one document a file), .jsonl .ndjson (a document a
    line) and .parquet (a document a row) with the text in `text_key`; each plain or .gz/.xz/.bz2/.zst."""

    url: Url = corpus(..., "path, folder, glob, fsspec URL, or package://NAME/GLOB")
    name: str | None = corpus(
        None, "of the source in document ids; null: from the url", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
    )
    text_key: str = corpus("text", "field or column with the text")
    split_at: str | None = corpus(
        None,
        "regular expression: a txt or md file is cut before each match, and each part is a document; null: not cut",
    )
    weight: float = corpus(1.0, "2.5: every training document twice, and a hash-chosen half once more", gt=0, le=1000)
    license: str | None = corpus(None, "recorded with the documents")

    @field_validator("split_at")
    @classmethod
    def _is_a_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                found = re.compile(pattern, re.MULTILINE)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}; fix it") from None
            if found.match(""):
                raise ValueError(f"{pattern!r} matches nothing at all, so everywhere; name what a document begins with")
        return pattern

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `split_at` where it is not set: the recorded sources of runs from before it compare equal."""
        tree: dict[str, Any] = handler(self)
        return {key: value for key, value in tree.items() if key != "split_at" or value is not None}


def _as_sources(value: object) -> object:
    """A string stands for a source with this url."""
    entries = [value] if isinstance(value, str) else value
    return (
        [{"url": entry} if isinstance(entry, str) else entry for entry in entries]
        if isinstance(entries, list)
        else entries
    )


Sources = Annotated[list[Source], BeforeValidator(_as_sources, json_schema_input_type=list[Source | str] | str)]


class LanguageFilter(Section):
    """Keep documents of these languages (ISO 639-1) only."""

    keep: list[str] = corpus(["en"], "languages to keep, ISO 639-1", min_length=1)
    min_score: float = corpus(0.65, "least confidence of the language model", ge=0, le=1)


class QualityFilter(Section):
    """Rae et al. 2021 (Gopher), section A1.1: the quality and the repetition filter, with the paper's thresholds."""

    quality: bool = corpus(True, "the quality rules")
    repetition: bool = corpus(True, "the repetition rules")
    min_words: int = corpus(50, "shorter documents are dropped", ge=1)
    max_words: int = corpus(100_000, "longer documents are dropped", ge=1)


class NearDuplicates(Section):
    """MinHash-LSH over word n-grams: of documents this similar (Jaccard) the first is kept."""

    similarity: float = corpus(0.75, "Jaccard similarity from which two documents are the same", gt=0, lt=1)
    ngram: int = corpus(5, "words in a row that are compared", ge=1, le=32)
    hashes: int = corpus(112, "MinHash functions", ge=8, le=1024)


class ParagraphDuplicates(Section):
    """A paragraph seen before, anywhere in the corpus, is cut; the first is kept."""

    min_characters: int = corpus(80, "shorter paragraphs (headings, dialogue) may repeat", ge=1)


class SplitLong(Section):
    """Documents longer than this are split at paragraph ends; the parts stay in one split."""

    max_characters: int = corpus(200_000, "longer documents are split", ge=100)


class Decontaminate(Section):
    """Text shared with evaluation files: n words in a row."""

    files: list[Url] = corpus(
        ..., "evaluation files: paths, globs or URLs, in any format of data.sources; all texts count", min_length=1
    )
    ngram: int = corpus(13, "words in a row that are looked for", ge=2, le=64)
    action: Literal["remove", "cut"] = corpus("remove", "what is removed: the document, or the passage")


class Clean(Section):
    """Cleaning steps, each off unless set. The order is fixed: see docs/data.md."""

    unicode: Literal["nfc", "nfkc"] | None = corpus(None, "repair (mojibake, control characters), then normalize")
    language: Annotated[LanguageFilter | None, Switch] = corpus(None, "keep documents of some languages")
    quality: Annotated[QualityFilter | None, Switch] = corpus(None, "Gopher's quality and repetition filters")
    decontaminate: Decontaminate | None = corpus(None, "drop text shared with evaluation files")
    exact_duplicates: bool = corpus(False, "drop documents whose normalized text was seen before")
    near_duplicates: Annotated[NearDuplicates | None, Switch] = corpus(
        None, "drop documents that are nearly one seen before (MinHash-LSH)"
    )
    paragraph_duplicates: Annotated[ParagraphDuplicates | None, Switch] = corpus(None, "cut paragraphs seen before")
    split_long: Annotated[SplitLong | None, Switch] = corpus(None, "split long documents at paragraph ends")


class Slurm(Section):
    """How `data.executor: slurm` submits its job arrays. `run_dir` must be on a file system that all nodes share."""

    partition: str = engine("cpu", "Slurm partition of the data tasks")
    time: str = engine("24:00:00", "limit of one task")
    cpus_per_task: int = engine(1, "CPUs of one task", ge=1)
    mem_per_cpu_gb: int = engine(4, "memory of one CPU in GB", ge=1)
    qos: str | None = engine(None, "Slurm quality of service")
    max_array_size: int = engine(1001, "tasks in one job array; the cluster's MaxArraySize", ge=1)
    sbatch_args: dict[str, str] = engine({}, "further options of sbatch, without the dashes")


class Phase(Section):
    """A part of training in which sources are drawn by these weights. See docs/data.md."""

    until: float = mixture(..., "where it ends, as a share of training; 1 for the last one", gt=0, le=1)
    weights: dict[str, float] = mixture(
        ..., "source name -> its part of the sequences; a source not named: none", min_length=1
    )

    @field_validator("weights")
    @classmethod
    def _are_shares(cls, weights: dict[str, float]) -> dict[str, float]:
        if not all(weight > 0 for weight in weights.values()):
            raise ValueError("every weight must be above 0; leave out a source that is not drawn")
        if min(weights.values()) < 1e-6:
            raise ValueError("a weight below 1e-6: write parts, 3 and 1 say; only their ratios count")
        if min(weights.values()) / sum(weights.values()) < 1 / MIXTURE_BLOCK:
            raise ValueError(f"a source with less than 1/{MIXTURE_BLOCK} of the sequences: leave it out")
        return weights


class DataConfig(Section):
    """Corpora to document tars (stage `shard`)."""

    sources: Sources = corpus(..., "corpora: each a path or URL, or a mapping with url and more keys", min_length=1)
    clean: Clean = Clean()
    val_fraction: float = corpus(0.01, "of documents, chosen by a hash of their normalized text", ge=0, lt=1)
    test_fraction: float = corpus(0.01, "of documents, likewise", ge=0, lt=1)
    min_characters: int = corpus(1, "shorter documents are dropped and counted", ge=1)
    max_characters: int | None = corpus(None, "longer ones too", ge=1)
    max_document_megabytes: int = corpus(64, "a longer line, file or cell is bad input, and is never in memory", ge=1)
    on_bad_input: Literal["error", "skip"] = corpus("error", "what a line, file or cell that cannot be read does")
    separate_sources: bool = replace(corpus, added=True)(
        False, "document and token shards hold one source each, as phases needs; each source has one or more tasks"
    )
    phases: list[Phase] | None = mixture(
        None,
        "in training: the mixture of sources by share of training, drawn by sequence; null: in order of the shards",
        min_length=1,
    )
    output: Url | None = documents(None, "folder or fsspec URL of the document tars; null: run_dir/documents")
    of: str | None = borrowed(
        None, "run directory whose documents, tokenizer and tokens are used in place; null: the run makes its own"
    )
    executor: Literal["local", "slurm", "ray"] = engine("local", "who runs the tasks of `shard` and `tokenize`")
    slurm: Slurm = Slurm()
    ray_address: str = engine("auto", "of the cluster, for executor ray")
    tasks: int | None = corpus(None, "shards per split, at most one per piece of a file; null: one per 256 MB", ge=1)
    workers: int = shard_work(2, "tasks at once; never changes the result", ge=1)
    on_bad_shard: Literal["error", "skip"] = reading(
        "error", "in training: what a token shard that is missing or damaged does"
    )
    cache_gigabytes: float = reading(50.0, "of a node's disk, for token shards that are read from a URL", gt=0)

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction leave nothing to train on; lower them")
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(f"max_characters {self.max_characters} is below min_characters {self.min_characters}")
        ends = [phase.until for phase in self.phases or ()]
        if ends and (ends[-1] != 1 or any(a >= b for a, b in pairwise(ends))):
            raise ValueError(f"phases: until {ends} must grow, and end with 1")
        if ends and self.of is None and not self.separate_sources:
            raise ValueError(
                "phases: sources can only be drawn one by one from shards of their own; set separate_sources=true"
            )
        if self.of is None and (wrong := unknown_source(self.phases or (), self.sources)) is not None:
            raise ValueError(f"{wrong}; correct the name")
        return self


class TokenizerConfig(Section):
    """SentencePiece: train one with `model.vocab_size` pieces on the train split, or take an existing `.model`."""

    model: str | None = pieces(None, "path of an existing SentencePiece .model; null: train one")
    max_megabytes: int = pieces(200, "text that the trainer looks at", ge=1)
    character_coverage: float = pieces(0.9995, "share of characters that get pieces; the rest are bytes", gt=0, le=1)


class TokensConfig(Section):
    """Documents to token tars (stage `tokenize`). The context length is `model.context_length`."""

    packing: Literal["concat", "best-fit", "pad"] = packed("concat", "how documents become sequences (docs/data.md)")
    boundaries: bool = packed(False, "also store which document each token belongs to, for masks")
    sources: bool = packed_since(
        False, "also store which source each token of the val split is from, for val/loss/SOURCE"
    )
    block_sequences: int = packed(256, "sequences in one tar member: the unit of reading", ge=1)
    remainder: Literal["drop", "pad"] = packed("drop", "concat: a shard's last, incomplete sequence; always counted")
    output: Url | None = tokens(None, "folder or fsspec URL of the token tars; null: run_dir/tokens")
    workers: int = tokenize_work(2, "tasks at once; never changes the result", ge=1)
