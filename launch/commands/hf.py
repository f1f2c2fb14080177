"""`pldr export hf` and `pldr import hf`: a model as a directory for transformers, vLLM and lm-eval, and back.

`pldr export` and `pldr import` without `hf` are in convert.py.
"""

from __future__ import annotations

import warnings
from itertools import islice
from pathlib import Path
from typing import Any

from launch.commands.verbs import Report, Result, Verbs, add_overrides
from pipeline.errors import Caution, ConfigError, UserError

PASSAGE = 400  # characters of held-out text that are one text of the tokenizer's check
MAX_TEXTS = 2000


def add_hf_verbs(verbs: Verbs) -> None:
    """The verbs `export hf` and `import hf`."""
    sub = verbs.add("export hf", _export, "a model -> a directory that stock transformers and vLLM load", is_work=True)
    sub.add_argument("source", metavar="SOURCE", help="a bundle folder, an earlier export, or the YAML of a run")
    sub.add_argument("target", metavar="DIR", help="a new folder, or an earlier export, which is replaced")
    add_overrides(sub, help="only for a YAML: override a key")
    sub.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "int8"), default="fp32", help="of the weights (fp32)")
    sub.add_argument(
        "--pack-output", action="store_true", help="with --dtype int8: the output layer, too; vLLM does not read that"
    )
    sub.add_argument("--shard-size", metavar="SIZE", default="5GB", help="largest weight file, like 200MB (5GB)")
    sub.add_argument(
        "--live", action="store_true", help="with the metric learner, uncached; such a model is not certified"
    )
    sub = verbs.add("import hf", _import, "an export, or the transformers port's checkpoint -> our safetensors")
    sub.add_argument("source", metavar="DIR")
    sub.add_argument("target", metavar="FOLDER")


def _export(arguments: Any, report: Report) -> Result:
    from pipeline.inference.hf.export import export_hf
    from pipeline.inference.source import open_model

    opened = open_model(arguments.source, arguments.overrides, live=arguments.live)
    texts = _held_out_texts(arguments.source, arguments.overrides) if opened.kind == "run" else None
    if opened.caution:
        warnings.warn(opened.caution, Caution, stacklevel=2)
    manifest = export_hf(
        opened,
        arguments.target,
        dtype=arguments.dtype,
        shard_size=arguments.shard_size,
        live=arguments.live,
        pack_output=arguments.pack_output,
        texts=texts,
        report=report,
    )
    mark = "certified" if manifest["certified"] else "UNCERTIFIED"
    report(f"{arguments.target}: {mark}, {len(manifest['files'])} files; README.md says how to load it")
    keys = ("bundle_sha256", "certified", "dtype", "live", "selfcheck")
    return {"folder": arguments.target, **{key: manifest[key] for key in keys}}


def _import(arguments: Any, report: Report) -> Result:
    from launch.commands.convert import publish_folder
    from pipeline.inference.hf.imported import read_directory
    from pipeline.io.storage import require_unsealed

    if Path(arguments.target).resolve() == Path(arguments.source).resolve():
        raise ConfigError(f"{arguments.target}: names the directory itself; give another folder")
    require_unsealed(Path(arguments.target))
    found = read_directory(arguments.source)
    return publish_folder(Path(arguments.target), found.weights, found.config, source=found.source, report=report)


def _held_out_texts(config_file: str, overrides: list[str]) -> list[str] | None:
    """Passages of the run's validation and test documents; None where the documents are gone."""
    from pipeline.config.load import load_config
    from pipeline.config.paths import documents_folder
    from pipeline.data.documents.read import DocumentIndex, read_texts

    folder = documents_folder(load_config(config_file, overrides))
    try:
        index = DocumentIndex.load(folder)
        shards = [shard for split in ("val", "test") for shard in index.of_split(split)]
        passages = (
            passage
            for shard in shards
            for text in read_texts(folder, shard)
            for passage in _passages(text.decode("utf-8", "replace"))
        )
        return list(islice(passages, MAX_TEXTS))
    except UserError:
        return None


def _passages(text: str) -> list[str]:
    return [text[start : start + PASSAGE] for start in range(0, len(text), PASSAGE)]
