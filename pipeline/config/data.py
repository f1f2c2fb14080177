"""The data half of RunConfig: sources, cleaning, splits, engines, tokenizer, tokens. See docs/data.md.

A cleaning step is off until it is named: `near_duplicates: true` takes its defaults, `near_duplicates: {similarity: 0.8}`
changes one. The order of the steps is fixed (docs/data.md), whatever the order in the YAML.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.section import Section, Switch, Url


class Source(Section):
    """One corpus. `url`: a path, folder, glob or fsspec URL, or `package://NAME/GLOB` for files inside an installed package
    (found without importing it). Formats by ending: .txt .md .html .htm (one document a file), .jsonl .ndjson (a document a
    line) and .parquet (a document a row) with the text in `text_key`; each plain or .gz/.xz/.bz2/.zst."""

    url: Url
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # in document ids; null: from the url
    text_key: str = "text"
    weight: float = Field(1.0, gt=0, le=1000)  # 2.5: every training document twice, and a hash-chosen half once more
    license: str | None = None


class LanguageFilter(Section):
    """Keep documents of these languages (ISO 639-1) only."""

    keep: list[str] = Field(["en"], min_length=1)
    min_score: float = Field(0.65, ge=0, le=1)


class QualityFilter(Section):
    """Rae et al. 2021 (Gopher), section A1.1: the quality and the repetition filter, with the paper's thresholds."""

    quality: bool = True
    repetition: bool = True
    min_words: int = Field(50, ge=1)
    max_words: int = Field(100_000, ge=1)


class NearDuplicates(Section):
    """MinHash-LSH over word n-grams: of documents this similar (Jaccard) the first is kept."""

    similarity: float = Field(0.75, gt=0, lt=1)
    ngram: int = Field(5, ge=1, le=32)
    hashes: int = Field(112, ge=8, le=1024)


class ParagraphDuplicates(Section):
    """A paragraph seen before, anywhere in the corpus, is cut; the first is kept."""

    min_characters: int = Field(80, ge=1)  # shorter paragraphs (headings, dialogue) may repeat


class SplitLong(Section):
    """Documents longer than this are split at paragraph ends; the parts stay in one split."""

    max_characters: int = Field(200_000, ge=100)


class Decontaminate(Section):
    """Text shared with evaluation files: n words in a row."""

    files: list[Url] = Field(
        min_length=1
    )  # paths, globs or URLs of any format data.sources reads; every text in them counts
    ngram: int = Field(13, ge=2, le=64)
    action: Literal["remove", "cut"] = "remove"  # the document, or the passage


class Clean(Section):
    """Cleaning steps, each off unless named. The order is fixed: see docs/data.md."""

    unicode: Literal["nfc", "nfkc"] | None = None  # repair (mojibake, control characters), then normalise
    language: Annotated[LanguageFilter | None, Switch] = None
    quality: Annotated[QualityFilter | None, Switch] = None
    decontaminate: Decontaminate | None = None
    exact_duplicates: bool = False  # by a hash of the normalised text
    near_duplicates: Annotated[NearDuplicates | None, Switch] = None
    paragraph_duplicates: Annotated[ParagraphDuplicates | None, Switch] = None
    split_long: Annotated[SplitLong | None, Switch] = None


class Slurm(Section):
    """How `data.executor: slurm` submits its job arrays. `run_dir` has to be on a file system that every node sees."""

    partition: str = "cpu"
    time: str = "24:00:00"
    cpus_per_task: int = Field(1, ge=1)
    mem_per_cpu_gb: int = Field(4, ge=1)
    qos: str | None = None
    max_array_size: int = Field(1001, ge=1)
    sbatch_args: dict[str, str] = Field({})  # further options of sbatch, without the dashes


class DataConfig(Section):
    """Corpora to document tars (stage `shard`)."""

    sources: list[Source] = Field(min_length=1)
    clean: Clean = Clean()
    val_fraction: float = Field(0.01, ge=0, lt=1)  # of documents, chosen by a hash of their normalised text
    test_fraction: float = Field(0.01, ge=0, lt=1)
    min_characters: int = Field(1, ge=1)  # shorter documents are dropped and counted
    max_characters: int | None = Field(None, ge=1)  # longer ones too
    max_document_megabytes: int = Field(
        64, ge=1
    )  # a longer line, file or cell is bad input: it is never held in memory
    on_bad_input: Literal["error", "skip"] = "error"
    output: Url | None = None  # folder or fsspec URL of the document tars; null: run_dir/documents
    executor: Literal["local", "slurm", "ray"] = "local"
    slurm: Slurm = Slurm()
    ray_address: str = "auto"  # of the cluster, for executor ray
    tasks: int | None = Field(
        None, ge=1
    )  # shards a split, at most one for each piece of a file; null: one for every 256 MB
    workers: int = Field(2, ge=1)  # tasks at once; never changes the result
    on_bad_shard: Literal["error", "skip"] = "error"  # in training: a token shard that is missing or damaged
    cache_gigabytes: float = Field(50.0, gt=0)  # of a node's disk, for token shards that are read from a URL

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction leave nothing to train on; lower them")
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(f"max_characters {self.max_characters} is below min_characters {self.min_characters}")
        return self


class TokenizerConfig(Section):
    """SentencePiece: train one with `model.vocab_size` pieces on the train split, or take an existing `.model`."""

    model: str | None = None
    max_megabytes: int = Field(200, ge=1)  # text the trainer looks at
    character_coverage: float = Field(0.9995, gt=0, le=1)


class TokensConfig(Section):
    """Documents to token tars (stage `tokenize`). The context length is `model.context_length`."""

    packing: Literal["concat", "best-fit", "pad"] = "concat"
    boundaries: bool = False  # also store which document each token belongs to, for masks
    block_sequences: int = Field(256, ge=1)  # sequences in one tar member: the unit of reading
    remainder: Literal["drop", "pad"] = "drop"  # concat: the last, incomplete sequence of a shard; counted either way
    output: Url | None = None  # folder or fsspec URL of the token tars; null: run_dir/tokens
    workers: int = Field(2, ge=1)
