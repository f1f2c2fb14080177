"""`pldr init NAME --corpus GLOB`: a commented YAML that fits a corpus."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.commands.verbs import Report, Result, Verbs
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config.starter import Corpus

SAMPLED = 200  # documents that are read for the estimate


def add_init_verb(verbs: Verbs) -> None:
    """The verb `init`."""
    sub = verbs.add("init", _init, "write a commented YAML for a corpus: sizes, steps, warm-up and budget that fit")
    sub.add_argument("name", metavar="NAME", help="of the run; NAME.yaml is written")
    sub.add_argument(
        "--corpus", action="append", required=True, metavar="GLOB", help="path, folder, glob or URL; repeatable"
    )
    sub.add_argument("--size", choices=("tiny", "30m", "110m", "350m"), default="tiny", help="of the model (tiny)")


def _init(arguments: Any, report: Report) -> Result:
    from pipeline.config.load import load_config
    from pipeline.config.starter import FEW_STEPS, FEW_TOKENS, TOKENS_PER_PARAMETER, per_parameter, starter_yaml

    name, file = arguments.name, Path(f"{arguments.name}.yaml")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"init {name}: a name has letters, digits and . _ - only; the YAML is written here")
    if file.exists():
        raise ConfigError(f"{file}: is there already; take another name, or remove it")
    text = starter_yaml(name, _look_at(arguments.corpus), arguments.size)
    with open(file, "x", encoding="utf-8") as stream:
        stream.write(text)
    config = load_config(file)
    report(f"{file}: {arguments.size}, {config.train.steps:,} steps")
    if (share := per_parameter(config)) < FEW_TOKENS:
        fix = "add text" if arguments.size == "tiny" else "add text, or take a smaller --size"
        enough = f"{share:.2g} tokens a parameter where {TOKENS_PER_PARAMETER} would do"
        report(f"note        the corpus is small for this model: {enough}; {fix}")
    if config.train.steps < FEW_STEPS:
        report(
            f"note        {config.train.steps:,} steps are few: attention may stay dead, and the certificate then fails "
            '(docs/certificate.md, "When it fails")'
        )
    report(f"look        pldr check {file}; pldr plan {file}\nstart       pldr run {file}")
    return {"config": str(file), "steps": config.train.steps}


def _look_at(urls: list[str]) -> Corpus:
    """Sizes of the files, and the mean length and the beginning of the first documents. Raises UserError for a corpus that
    names no file."""
    from itertools import islice

    from pipeline.config.data import Source
    from pipeline.config.starter import Corpus
    from pipeline.data.documents.spool import split_key
    from pipeline.data.documents.write import hash_position
    from pipeline.data.readers.sources import list_sources
    from pipeline.data.readers.text import read_unit
    from pipeline.data.readers.units import Text, plan_units

    files = list_sources([Source(url=url) for url in urls]).files
    units = plan_units(files)
    found = (
        item.text for unit in units for item in read_unit(unit, max_document_bytes=64 << 20) if isinstance(item, Text)
    )
    texts = list(islice(found, SAMPLED + 1))
    if not texts:
        raise ConfigError(f"init: {', '.join(urls)}: no text in {files[0].shown}; see docs/data.md for what is read")
    sizes = [len(text.encode("utf-8", "replace")) for text in texts]
    if len(texts) <= SAMPLED:  # that was all
        documents = dict(zip(map(split_key, texts), sizes, strict=True))  # equal texts are in one split
        positions = tuple((hash_position(key), size) for key, size in documents.items())
        return Corpus(urls, sum(sizes), len(texts), _prompt(texts), positions)
    total = sum(unit.size for unit in units)
    return Corpus(urls, total, max(1, int(total * len(sizes) / max(sum(sizes), 1))), _prompt(texts))


def _prompt(texts: list[str]) -> str:
    """The first words of a sentence, to be continued: headings and markup are left out."""
    lines = (line.split() for text in texts for line in text.splitlines())
    words = next((words for words in lines if len(words) >= 8 and words[0].isalpha()), ["The"])
    return " ".join(words[:4])
