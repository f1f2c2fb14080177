"""The data report: one HTML page of the sources, what each cleaning step removed, and what a model will see.

Documents are untrusted input: values are escaped (pipeline/report/html.py), and control characters become symbols. Equal data
and links give an equal page.

Only the indexes, the lists of removed documents and a few blocks of tokens are read, so a report of a large corpus is fast: the
lists are read until each reason has ten examples.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.data.documents.read import SPLITS, DocumentIndex, read_removed
from pipeline.data.inspect.show import read_sequences, spans, tokenizer_of, visible
from pipeline.data.tokens.index import TokenIndex
from pipeline.io.storage import exists, publish_bytes
from pipeline.io.urls import join, public_url
from pipeline.report import html
from pipeline.report.histogram import charts
from pipeline.report.links import Link
from pipeline.report.numbers import short, size
from pipeline.report.terms import explained

EXAMPLES = 10  # of each reason
DASH = "\u2013"
TERMS = ("split", "shard", "packing", "fertility", "near-duplicate", "fingerprint")
SAMPLES = {"train": 3, "val": 1, "test": 1}
CANDIDATES = 32  # following sequences searched for one with a document end in it
EXACT, NEAR, PARAGRAPHS = "exact_duplicate", "near_duplicate", "paragraph_duplicates"  # two reasons, one step

Tree = dict[str, Any]


def write_report(title: str, documents: str, tokens: str | None, target: Path, pages: Sequence[Link] = ()) -> Tree:
    """Write the page to `target`; `tokens`: None or a folder without an index if there are none yet. pages: the run's others.

    Returns the headline numbers. Raises UserError if there are no documents, or a file is damaged.
    """
    index = DocumentIndex.load(documents)
    made = TokenIndex.load(tokens) if tokens is not None and exists(join(tokens, "index.json")) else None
    publish_bytes(target, render({**page(title, index, made), "pages": pages}).encode("utf-8", errors="replace"))
    return {"report": str(target), **headline(index, made)}


def headline(index: DocumentIndex, tokens: TokenIndex | None) -> Tree:
    """Documents, bytes, tokens, bytes per token and tokens per word over all splits; None where there are no tokens."""
    counts = index.tree["counts"]
    splits = [_split(index, tokens, name) for name in SPLITS]
    total = {key: sum(split[key] or 0 for split in splits) for key in ("text_bytes", "words", "tokens", "tokens_in")}
    ends = sum(split["token_documents"] for split in splits)
    return {
        "documents": counts["documents_written"],
        "documents_read": counts["documents_read"],
        "text_bytes": total["text_bytes"],
        "words": total["words"],
        "tokens": total["tokens"] if tokens else None,
        "bytes_per_token": _ratio(total["text_bytes"], total["tokens_in"]) if tokens else None,
        "fertility": _ratio(total["tokens_in"] - ends, total["words"]) if tokens else None,
        "fingerprint": index.fingerprint,
        "tokens_fingerprint": tokens.fingerprint if tokens else None,
    }


def render(content: Tree) -> str:
    """The HTML of the content that `page` returns, and of `pages`."""
    filters: dict[str, Callable[[Any], str]] = {
        "count": lambda number: f"{number:,}",
        "count_or_dash": lambda number: DASH if number is None else f"{number:,}",
        "size": size,
        "percent": lambda share: f"{share:.1%}",
        "ratio": lambda number: DASH if number is None else f"{number:.3f}",
    }
    return html.render(Path(__file__).with_name("report.html"), content, filters)


def page(title: str, index: DocumentIndex, tokens: TokenIndex | None) -> Tree:
    """Everything the page shows, as plain values."""
    tree = index.tree
    examples = _examples(index)
    counted = _removed(tree)
    order: dict[str, int] = {}
    for place, step in enumerate(tree["steps"]):
        order.setdefault(step["name"], place)  # two of them check the length
    removed = [
        _group(step, reason, counted.get(reason), found)
        for (step, reason), found in sorted(examples.items(), key=lambda group: order.get(group[0][0], -1))
    ]
    copies = [group for group in removed if group["reason"] in (EXACT, NEAR) or group["step"] == PARAGRAPHS]
    return {
        "title": title,
        "warnings": _warnings(index, tokens),
        "tiles": _tiles(headline(index, tokens), tokens),
        "counts": {"left_out_by_weight": 0, **tree["counts"]},
        "ignored": tree["counts"].get("files_of_unknown_ending", 0),
        "hidden": tree["counts"].get("hidden_entries", 0),
        "sources": _sources(tree["sources"]),
        "steps": _steps(tree["steps"], tree["counts"]["documents_read"]),
        "removed": [group for group in removed if group not in copies and group["reason"] not in tree["rejected"]],
        "duplicates": _duplicates(tree),
        "copies": copies,
        "rejected": [_rejected(reason, count, removed) for reason, count in tree["rejected"].items()],
        "splits": [_split(index, tokens, name) for name in SPLITS],
        "charts": charts({"in characters": index.splits, **({"in tokens": tokens.splits} if tokens else {})}, SPLITS),
        "tokens": tokens is not None,
        "tokens_folder": public_url(tokens.folder) if tokens else None,
        "samples": list(_samples(tokens)) if tokens else [],
        "identity": _identity(index, tokens),
        "settings": list(_flat("", tree["settings"])),
        "terms": explained(*TERMS),
    }


def _warnings(index: DocumentIndex, tokens: TokenIndex | None) -> list[str]:
    if tokens is not None and tokens.documents_fingerprint != index.fingerprint:
        return ["These tokens were made from other documents; run `pldr tokenize` again."]
    return []


def _tiles(numbers: Tree, tokens: TokenIndex | None) -> list[dict[str, str]]:
    tiles = [
        _tile("documents", numbers["documents"]),
        {"label": "of UTF-8 text", "value": size(numbers["text_bytes"]), "exact": f"{numbers['text_bytes']:,} bytes"},
        _tile("words", numbers["words"]),
    ]
    if tokens is None:
        return [*tiles, {"label": "tokens: not made yet", "value": DASH, "exact": ""}]
    return [
        *tiles,
        _tile("tokens", numbers["tokens"]),
        {"label": "bytes per token", "value": f"{numbers['bytes_per_token']:.2f}", "exact": ""},
        {"label": "tokens per word (fertility)", "value": f"{numbers['fertility']:.2f}", "exact": ""},
        _tile(f"sequences of {tokens.context_length:,} tokens", sum(shard.sequences for shard in tokens.shards)),
    ]


def _tile(label: str, number: int) -> dict[str, str]:
    return {"label": label, "value": short(number), "exact": f"{number:,}"}


def _sources(sources: list[Tree]) -> list[Tree]:
    total = max(1, sum(source["text_bytes"] for source in sources))
    return [{**source, "share": source["text_bytes"] / total} for source in sources]


def _steps(steps: list[Tree], read: int) -> list[Tree]:
    return [
        {
            "partly_checked": 0,
            **step,
            "removed": list(step["removed"].items()),
            "kept_width": None if step["documents_out"] is None else _width(step["documents_out"], read),
            "gone_width": _width(sum(step["removed"].values()), read),
        }
        for step in steps
    ]


def _width(part: int, whole: int) -> float:
    return round(100 * min(1.0, part / max(1, whole)), 2)


def _removed(tree: Tree) -> dict[str, int]:
    """Documents removed, by reason. A step can occur twice: lengths are checked again if text was cut."""
    counted: Counter[str] = Counter()
    for step in tree["steps"]:
        counted.update(step["removed"])
    return dict(counted)


def _examples(index: DocumentIndex) -> dict[tuple[str, str], list[Tree]]:
    """The first records of each (step, reason). Files are read until every counted reason has its examples."""
    found: dict[tuple[str, str], list[Tree]] = defaultdict(list)
    counted = _removed(index.tree) | index.tree["rejected"]
    wanted = {reason: min(EXAMPLES, n) for reason, n in counted.items()}
    for file in index.tree["removed"]:
        for record in read_removed(replace(index, tree={**index.tree, "removed": [file]})):
            examples = found[str(record["step"]), str(record["reason"])]
            if len(examples) < EXAMPLES:
                examples.append(record)
        collected: dict[str, int] = defaultdict(int)
        for (_, reason), records in found.items():
            collected[reason] += len(records)
        if all(collected[reason] >= count for reason, count in wanted.items()):
            break
    return dict(found)


def _group(step: str, reason: str, count: int | None, records: list[Tree]) -> Tree:
    examples = [
        {key: visible(str(record.get(key, "") or "")) for key in ("id", "keeper", "detail", "excerpt", "message")}
        | {"reason": reason}
        for record in records
    ]
    return {
        "step": step,
        "reason": reason,
        "count": count,
        "examples": examples,
        "has_keeper": any(example["keeper"] for example in examples),
        "has_detail": any(example["detail"] for example in examples),
    }


def _rejected(reason: str, count: int, groups: list[Tree]) -> Tree:
    examples = [example for group in groups if group["reason"] == reason for example in group["examples"]]
    return {"reason": reason, "count": count, "messages": [e["message"] or e["id"] for e in examples[:EXAMPLES]]}


def _duplicates(tree: Tree) -> list[Tree]:
    removed = _removed(tree)
    paragraphs: Tree = next((step for step in tree["steps"] if step["name"] == PARAGRAPHS), {})
    on = tree["settings"].get("clean") or {}

    def kind(title: str, key: str, removed: int = 0, step: Tree | None = None) -> Tree:
        cut = step or {}
        return {
            "title": title,
            "key": f"data.clean.{key}",
            "on": bool(on.get(key)),
            "removed": removed,
            "changed": cut.get("changed", 0),
            "cut": cut.get("characters_cut", 0),
        }

    return [
        kind("identical text", "exact_duplicates", removed.get(EXACT, 0)),
        kind("near-duplicates", "near_duplicates", removed.get(NEAR, 0)),
        kind("repeated paragraphs", PARAGRAPHS, step=paragraphs),
    ]


def _split(index: DocumentIndex, tokens: TokenIndex | None, name: str) -> Tree:
    """A split's numbers from both indexes; zeros if the split or the tokens do not exist."""
    documents = index.splits.get(name, {})
    made = tokens.splits.get(name, {}) if tokens else {}
    total, words, ends = made.get("tokens_in", 0), documents.get("words", 0), made.get("documents", 0)
    return {
        "name": name,
        **{key: documents.get(key, 0) for key in ("documents", "text_bytes", "words", "shards")},
        **{key: made.get(key, 0) for key in ("sequences", "tokens", "tokens_in", "tokens_dropped", "tokens_padded")},
        "token_documents": ends,
        "bytes_per_token": _ratio(documents.get("text_bytes", 0), total),
        "fertility": _ratio(total - ends, words),
    }


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def _samples(tokens: TokenIndex) -> Iterator[Tree]:
    """A few sequences of each split at evenly spaced positions, preferably with a document end inside."""
    tokenizer = tokenizer_of(tokens)
    for split, wanted in SAMPLES.items():
        total = tokens.num_sequences(split)
        for place in sorted({i * total // wanted for i in range(min(wanted, total))}):
            near = list(islice(read_sequences(tokens, split, place), CANDIDATES))
            inside = (one for one in near if tokenizer.eos_id in one.ids[1:-1])
            at_end = (
                one for one in near if tokenizer.eos_id == one.ids[-1]
            )  # packing best-fit: the rest of a long document
            sequence = next(inside, None) or next(at_end, near[0])
            yield {
                **{key: getattr(sequence, key) for key in ("split", "number", "of", "shard", "block", "row")},
                "length": len(sequence.ids),
                "ends": sequence.ids.count(tokenizer.eos_id),
                "spans": [{"kind": span.kind, "text": visible(span.text)} for span in spans(sequence, tokenizer)],
            }


def _identity(index: DocumentIndex, tokens: TokenIndex | None) -> list[tuple[str, str]]:
    known = [("documents", index.fingerprint)]
    if tokens is not None:
        known += [("tokens", tokens.fingerprint), ("tokenizer (sha256)", tokens.tokenizer_sha256)]
        known += [
            ("sequences", f"{tokens.context_length + 1} x {tokens.dtype}, packing {tokens.packing}"),
            ("vocabulary", f"{tokens.vocab_size:,}"),
        ]
    return known


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, str]]:
    """Settings as (`key.key`, text); a step that is off is one line."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        shown = ", ".join(map(str, value)) if isinstance(value, list) else "on" if value is True else str(value)
        yield prefix, visible("off" if value is None or value is False else shown)
