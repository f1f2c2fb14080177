"""`pldr data report | verify | show` and `pldr bench data`: looking at what the data stages made, and timing them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config.load import load_config
from pipeline.config.paths import RunPaths, documents_folder, tokens_folder
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError
from pipeline.io.storage import exists
from pipeline.io.urls import join
from pipeline.stages.runner import LOCK

Result = dict[str, Any]
Show = Callable[[str], None]
OF_MODEL_BENCH = ("steps", "batch", "overrides")  # arguments that `pldr bench data` does not have


def add_data_verbs(verbs: Any, common: argparse.ArgumentParser) -> None:
    """The verb `data` with its own verbs."""
    about = "look at the data: an HTML report, checksums, single sequences"
    data = verbs.add_parser("data", help=about, description=about)
    inner = data.add_subparsers(dest="data_verb", required=True, metavar="report|verify|show")

    def verb(name: str, work: Callable[[Any, Show], Result], help: str) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = inner.add_parser(name, help=help, description=help, parents=[common])
        sub.set_defaults(work=work)
        return sub

    report = verb(
        "report", _report, "one HTML page of what came in, what each step took, and samples of what is trained on"
    )
    report.add_argument("config", metavar="CONFIG", help="YAML of the run")
    report.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the YAML")
    check = verb("verify", _verify, "check every checksum and the fingerprints again")
    check.add_argument(
        "index", metavar="CONFIG_OR_INDEX", help="YAML of a run, or a documents or tokens folder (path, URL)"
    )
    check.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the YAML")
    show = verb("show", _show_sequence, "print a stored sequence decoded, with document ends")
    show.add_argument("index", metavar="INDEX", help="tokens folder or its index.json (path, URL), or YAML of a run")
    show.add_argument("number", metavar="NUMBER", type=int, help="which sequence of the split, from 0")
    show.add_argument("--split", default="train", help="train, val or test (train)")
    show.add_argument("--ids", action="store_true", help="print the token ids too")


def add_bench_options(sub: argparse.ArgumentParser) -> None:
    """What `pldr bench data` takes beside --json."""
    sub.add_argument(
        "--text", metavar="FILE", help="with data: text to tokenise (what data.sources reads); else made up"
    )
    sub.add_argument("--tokenizer", metavar="MODEL", help="with data: a SentencePiece .model; else trained on the text")


def _report(arguments: Any, show: Show) -> Result:
    from pipeline.data.inspect.report import write_report
    from pipeline.tracking.run import log_report

    config = load_config(arguments.config, arguments.overrides)
    paths = RunPaths(config.run_dir)
    root = paths.root
    if not root.exists() or not any(root.iterdir()):  # the documents lie elsewhere; a stage must find a run's folder
        root.mkdir(parents=True, exist_ok=True)
        (root / LOCK).touch()
    target = root / "report" / "data.html"
    result = write_report(config.name, documents_folder(config), tokens_folder(config), target)
    run_id = log_report(config, paths, target)
    show(str(target))
    numbers = f"{result['documents']:,} documents, {result['text_bytes']:,} bytes"
    if result["tokens"] is not None:
        numbers += f", {result['tokens']:,} tokens, {result['bytes_per_token']:.3f} bytes a token"
    show(numbers)
    return {**result, "run_id": run_id}


def _verify(arguments: Any, show: Show) -> Result:
    from pipeline.data.inspect.verify import folder_of, kind_of, verify

    if _is_config(arguments.index):
        config = load_config(arguments.index, arguments.overrides)
        result = verify(documents_folder(config), _tokens_if_made(config, show), show)
    else:
        _no_overrides(arguments)
        folder = folder_of(arguments.index)
        result = verify(None, folder, show) if kind_of(folder) == "tokens" else verify(folder, None, show)
    checked = sum(part["files"] for part in result.values())
    show(f"{checked} files checked, none damaged")
    return {"files": checked, **result}


def _tokens_if_made(config: RunConfig, show: Show) -> str | None:
    """The tokens folder of a run; None before its stage `tokenize` has begun."""
    folder = tokens_folder(config)
    if exists(join(folder, "index.json")) or (RunPaths(config.run_dir).stages / "tokenize.json").exists():
        return folder
    show(f"{folder}: no finished tokens yet")
    return None


def _show_sequence(arguments: Any, show: Show) -> Result:
    from pipeline.data.inspect.show import as_text, read_sequence, spans, tokenizer_of
    from pipeline.data.inspect.verify import folder_of
    from pipeline.data.tokens.index import TokenIndex

    given = arguments.index
    folder = tokens_folder(load_config(given)) if _is_config(given) else folder_of(given)
    index = TokenIndex.load(folder)
    sequence = read_sequence(index, arguments.split, arguments.number)
    tokenizer = tokenizer_of(index)
    where = f"{sequence.shard}, block {sequence.block}, row {sequence.row}"
    show(f"{sequence.split} {sequence.number} of {sequence.of:,} ({where}), {len(sequence.ids)} tokens\n")
    show(as_text(spans(sequence, tokenizer)))
    if arguments.ids:
        show("\n" + " ".join(str(token) for token in sequence.ids))
    return {
        "split": sequence.split,
        "sequence": sequence.number,
        "of": sequence.of,
        "shard": sequence.shard,
        "block": sequence.block,
        "row": sequence.row,
        "spans": [[span.kind, span.text] for span in spans(sequence, tokenizer)],
        "ids": sequence.ids,
    }


def bench_data(arguments: Any, show: Show) -> Result:
    """`pldr bench data`."""
    from pipeline.bench.data import bench

    for name in OF_MODEL_BENCH:
        if getattr(arguments, name):
            raise ConfigError(f"bench data: takes no {name}; that is for `pldr bench CONFIG`, the model's benchmark")
    return bench(text=arguments.text, tokenizer=arguments.tokenizer, show=show)


def _is_config(argument: str) -> bool:
    return Path(argument).suffix in (".yaml", ".yml")


def _no_overrides(arguments: Any) -> None:
    if arguments.overrides:
        raise ConfigError(f"verify: {arguments.overrides[0]} goes with the YAML of a run, not with a folder")
