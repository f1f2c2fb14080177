"""The data half of RunConfig: sources, cleaning, splits, engines, tokenizer, tokens. See docs/data.md.

A cleaning step is off unless it is set: `near_duplicates: true` takes its defaults, `near_duplicates: {similarity: 0.8}`
changes one. The order of the steps is fixed (docs/data.md), whatever the order in the YAML.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import model_validator

from pipeline.config.section import Kind, Section, Switch, Url

corpus = Kind("needs force", ("shard",), result=True)  # which documents there are
pieces = Kind("needs force", ("tokenizer",), result=True)
packed = Kind("needs force", ("tokenize",), result=True)
documents = Kind("needs force", ("shard", "tokenizer", "tokenize"), result=("shard",))  # where they are
tokens = Kind("needs force", ("tokenize", "train", "extract", "validate", "bundle"), result=("tokenize",))
engine = Kind("may change", ("shard", "tokenize"), result=False)  # who does the work: the same files come of it
shard_work = replace(engine, stages=("shard",))
tokenize_work = replace(engine, stages=("tokenize",))
reading = Kind("may change", ("train", "extract", "validate", "bundle"), result=False)  # of token shards


class Source(Section):
    """One corpus. `url`: a path, folder, glob or fsspec URL, or `package://NAME/GLOB` for files inside an installed package
    (found without importing it). Formats by ending: .txt .md .html .htm (one document a file), .jsonl .ndjson (a document a
    line) and .parquet (a document a row) with the text in `text_key`; each plain or .gz/.xz/.bz2/.zst."""

    url: Url = corpus()
    name: str | None = corpus(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # in document ids; null: from the url
    text_key: str = corpus("text")
    weight: float = corpus(1.0, gt=0, le=1000)  # 2.5: every training document twice, and a hash-chosen half once more
    license: str | None = corpus(None)


class LanguageFilter(Section):
    """Keep documents of these languages (ISO 639-1) only."""

    keep: list[str] = corpus(["en"], min_length=1)
    min_score: float = corpus(0.65, ge=0, le=1)


class QualityFilter(Section):
    """Rae et al. 2021 (Gopher), section A1.1: the quality and the repetition filter, with the paper's thresholds."""

    quality: bool = corpus(True)
    repetition: bool = corpus(True)
    min_words: int = corpus(50, ge=1)
    max_words: int = corpus(100_000, ge=1)


class NearDuplicates(Section):
    """MinHash-LSH over word n-grams: of documents this similar (Jaccard) the first is kept."""

    similarity: float = corpus(0.75, gt=0, lt=1)
    ngram: int = corpus(5, ge=1, le=32)
    hashes: int = corpus(112, ge=8, le=1024)


class ParagraphDuplicates(Section):
    """A paragraph seen before, anywhere in the corpus, is cut; the first is kept."""

    min_characters: int = corpus(80, ge=1)  # shorter paragraphs (headings, dialogue) may repeat


class SplitLong(Section):
    """Documents longer than this are split at paragraph ends; the parts stay in one split."""

    max_characters: int = corpus(200_000, ge=100)


class Decontaminate(Section):
    """Text shared with evaluation files: n words in a row."""

    files: list[Url] = corpus(min_length=1)  # paths, globs or URLs, in any format of data.sources; all texts count
    ngram: int = corpus(13, ge=2, le=64)
    action: Literal["remove", "cut"] = corpus("remove")  # the document, or the passage


class Clean(Section):
    """Cleaning steps, each off unless set. The order is fixed: see docs/data.md."""

    unicode: Literal["nfc", "nfkc"] | None = corpus(None)  # repair (mojibake, control characters), then normalize
    language: Annotated[LanguageFilter | None, Switch] = corpus(None)
    quality: Annotated[QualityFilter | None, Switch] = corpus(None)
    decontaminate: Decontaminate | None = corpus(None)
    exact_duplicates: bool = corpus(False)  # by a hash of the normalized text
    near_duplicates: Annotated[NearDuplicates | None, Switch] = corpus(None)
    paragraph_duplicates: Annotated[ParagraphDuplicates | None, Switch] = corpus(None)
    split_long: Annotated[SplitLong | None, Switch] = corpus(None)


class Slurm(Section):
    """How `data.executor: slurm` submits its job arrays. `run_dir` must be on a file system that all nodes share."""

    partition: str = engine("cpu")
    time: str = engine("24:00:00")
    cpus_per_task: int = engine(1, ge=1)
    mem_per_cpu_gb: int = engine(4, ge=1)
    qos: str | None = engine(None)
    max_array_size: int = engine(1001, ge=1)
    sbatch_args: dict[str, str] = engine({})  # further options of sbatch, without the dashes


class DataConfig(Section):
    """Corpora to document tars (stage `shard`)."""

    sources: list[Source] = corpus(min_length=1)
    clean: Clean = Clean()
    val_fraction: float = corpus(0.01, ge=0, lt=1)  # of documents, chosen by a hash of their normalized text
    test_fraction: float = corpus(0.01, ge=0, lt=1)
    min_characters: int = corpus(1, ge=1)  # shorter documents are dropped and counted
    max_characters: int | None = corpus(None, ge=1)  # longer ones too
    max_document_megabytes: int = corpus(64, ge=1)  # a longer line, file or cell is bad input, and is never in memory
    on_bad_input: Literal["error", "skip"] = corpus("error")
    output: Url | None = documents(None)  # folder or fsspec URL of the document tars; null: run_dir/documents
    executor: Literal["local", "slurm", "ray"] = engine("local")
    slurm: Slurm = Slurm()
    ray_address: str = engine("auto")  # of the cluster, for executor ray
    tasks: int | None = corpus(None, ge=1)  # shards per split, at most one per piece of a file; null: one per 256 MB
    workers: int = shard_work(2, ge=1)  # tasks at once; never changes the result
    on_bad_shard: Literal["error", "skip"] = reading("error")  # in training: a token shard that is missing or damaged
    cache_gigabytes: float = reading(50.0, gt=0)  # of a node's disk, for token shards that are read from a URL

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction leave nothing to train on; lower them")
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(f"max_characters {self.max_characters} is below min_characters {self.min_characters}")
        return self


class TokenizerConfig(Section):
    """SentencePiece: train one with `model.vocab_size` pieces on the train split, or take an existing `.model`."""

    model: str | None = pieces(None)
    max_megabytes: int = pieces(200, ge=1)  # text the trainer looks at
    character_coverage: float = pieces(0.9995, gt=0, le=1)


class TokensConfig(Section):
    """Documents to token tars (stage `tokenize`). The context length is `model.context_length`."""

    packing: Literal["concat", "best-fit", "pad"] = packed("concat")
    boundaries: bool = packed(False)  # also store which document each token belongs to, for masks
    block_sequences: int = packed(256, ge=1)  # sequences in one tar member: the unit of reading
    remainder: Literal["drop", "pad"] = packed("drop")  # concat: a shard's last, incomplete sequence; always counted
    output: Url | None = tokens(None)  # folder or fsspec URL of the token tars; null: run_dir/tokens
    workers: int = tokenize_work(2, ge=1)
