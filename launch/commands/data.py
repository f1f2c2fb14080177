"""`pldr data report | verify | show`: look at what the data stages made."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.commands.verbs import Report, Result, Verbs, add_config, add_overrides
from pipeline.errors import ConfigError, UserError

if TYPE_CHECKING:
    from pipeline.config.run import RunConfig


def add_data_verbs(verbs: Verbs) -> None:
    """The verb `data` with its own verbs."""
    about = "look at the data: an HTML report, checksums, single sequences"
    inner = verbs.group("data", about, metavar="report|verify|show")
    sub = inner.add(
        "report", _report, "one HTML page: the sources, what each step removed, samples of the training text"
    )
    add_config(sub)
    sub = inner.add("verify", _verify, "check every checksum and the fingerprints again")
    sub.add_argument(
        "index", metavar="CONFIG_OR_INDEX", help="YAML of a run, or a documents or tokens folder (path, URL)"
    )
    add_overrides(sub, "override a key of the YAML")
    sub = inner.add("show", _show, "print a stored sequence decoded, with document ends")
    sub.add_argument("index", metavar="INDEX", help="tokens folder or its index.json (path, URL), or YAML of a run")
    sub.add_argument("number", metavar="NUMBER", type=int, help="which sequence of the split, from 0")
    add_overrides(sub, "override a key of the YAML")
    sub.add_argument("--split", default="train", help="train, val or test (train)")
    sub.add_argument("--ids", action="store_true", help="print the token ids too")


def _report(arguments: Any, report: Report) -> Result:
    from pipeline.config.load import load_config
    from pipeline.config.paths import RunPaths, documents_folder, tokens_folder
    from pipeline.data.inspect.report import write_report
    from pipeline.report.links import DATA, links, mlflow_link
    from pipeline.stages.runner import LOCK
    from pipeline.tracking.outbox import log_report
    from pipeline.tracking.run import known_run

    config = load_config(arguments.config, arguments.overrides)
    paths = RunPaths(config.run_dir)
    root = paths.root
    if not root.exists() or not any(root.iterdir()):  # the documents lie elsewhere; a stage must find a run's folder
        root.mkdir(parents=True, exist_ok=True)
        (root / LOCK).touch()
    target, mlflow = root / DATA, None
    with contextlib.suppress(UserError):  # a damaged run.json: `log_report` warns about it
        run = known_run(config, paths)
        mlflow = None if run is None else mlflow_link(run.uri, run.record.run_id)
    pages = links(target, root, mlflow=mlflow, in_sweep=config.tracking.parent_run is not None)
    result = write_report(config.name, documents_folder(config), tokens_folder(config), target, pages)
    run_id = log_report(config, paths, target)
    report(str(target))
    numbers = f"{result['documents']:,} documents, {result['text_bytes']:,} bytes"
    if result["tokens"] is not None:
        numbers += f", {result['tokens']:,} tokens, {result['bytes_per_token']:.3f} bytes a token"
    report(numbers)
    return {**result, "run_id": run_id}


def _verify(arguments: Any, report: Report) -> Result:
    from pipeline.config.load import load_config
    from pipeline.config.paths import documents_folder
    from pipeline.data.inspect.verify import folder_of, kind_of, verify

    if _is_config(arguments.index):
        config = load_config(arguments.index, arguments.overrides)
        result = verify(documents_folder(config), _tokens_if_made(config, report), report)
    else:
        _no_overrides(arguments)
        folder = folder_of(arguments.index)
        result = verify(None, folder, report) if kind_of(folder) == "tokens" else verify(folder, None, report)
    checked = sum(part["files"] for part in result.values())
    report(f"{checked} files checked, none damaged")
    return {"files": checked, **result}


def _tokens_if_made(config: RunConfig, report: Report) -> str | None:
    """The tokens folder of a run; None before its stage `tokenize` has started."""
    from pipeline.config.paths import RunPaths, tokens_folder
    from pipeline.io.storage import exists
    from pipeline.io.urls import join

    folder = tokens_folder(config)
    if exists(join(folder, "index.json")) or (RunPaths(config.run_dir).stages / "tokenize.json").exists():
        return folder
    report(f"{folder}: no finished tokens yet")
    return None


def _show(arguments: Any, report: Report) -> Result:
    from pipeline.config.load import load_config
    from pipeline.config.paths import tokens_folder
    from pipeline.data.inspect.show import as_text, read_sequence, spans, tokenizer_of
    from pipeline.data.inspect.verify import folder_of
    from pipeline.data.tokens.index import TokenIndex

    given = arguments.index
    if _is_config(given):
        folder = tokens_folder(load_config(given, arguments.overrides))
    else:
        _no_overrides(arguments)
        folder = folder_of(given)
    index = TokenIndex.load(folder)
    sequence = read_sequence(index, arguments.split, arguments.number)
    tokenizer = tokenizer_of(index)
    where = f"{sequence.shard}, block {sequence.block}, row {sequence.row}"
    report(f"{sequence.split} {sequence.number} of {sequence.of:,} ({where}), {len(sequence.ids)} tokens\n")
    report(as_text(spans(sequence, tokenizer)))
    if arguments.ids:
        report("\n" + " ".join(str(token) for token in sequence.ids))
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


def _is_config(argument: str) -> bool:
    return Path(argument).suffix in (".yaml", ".yml")


def _no_overrides(arguments: Any) -> None:
    if arguments.overrides:
        raise ConfigError(
            f"{arguments.data_verb}: {arguments.overrides[0]} goes with the YAML of a run, not with a folder"
        )
