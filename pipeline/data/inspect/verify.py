"""Verifying finished documents and tokens: every checksum and fingerprint is computed again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from pipeline.data.documents.read import DocumentIndex, read_removed, read_shard
from pipeline.data.inspect.show import tokenizer_of
from pipeline.data.tar import strays
from pipeline.data.tokens.index import TOKENIZE_AGAIN, TokenIndex
from pipeline.errors import UserError
from pipeline.io.storage import exists, read_json
from pipeline.io.urls import join, public_url

Report = Callable[[str], None]


def folder_of(index: str) -> str:
    """The folder of an index, given as a folder or an index.json."""
    return index.removesuffix("index.json").rstrip("/") or "."


def kind_of(folder: str) -> str:
    """The kind of a folder, "documents" or "tokens". Raises UserError if it is neither."""
    url = join(folder, "index.json")
    if not exists(url):
        raise UserError(
            f"{public_url(folder)}: contains no index.json; name a documents or tokens folder, or the YAML of a run"
        )
    tree = read_json(url)
    if isinstance(tree, dict) and isinstance(tree.get("shards"), list):
        return "tokens" if "context_length" in tree else "documents"
    raise UserError(
        f"{public_url(url)}: not an index of documents or tokens; name the folder that `pldr shard` or `pldr tokenize` made"
    )


def verify(documents: str | None, tokens: str | None, report: Report) -> dict[str, Any]:
    """Check every checksum of documents, removed lists and tokens, and the fingerprints. A folder that is None is skipped.

    Returns what was checked. Raises UserError naming the first damaged, missing or stray file.
    """
    result: dict[str, Any] = {}
    if documents is not None:
        result["documents"] = verify_documents(documents)
        facts = result["documents"]
        report(
            f"{public_url(documents)}: {facts['files']} files, {facts['documents']:,} documents, {facts['removed']:,} removed: "
            f"all checksums match, fingerprint {facts['fingerprint'][:16]}"
        )
    if tokens is not None:
        result["tokens"] = verify_tokens(tokens)
        facts = result["tokens"]
        report(
            f"{public_url(tokens)}: {facts['files']} files, {facts['blocks']:,} blocks, {facts['sequences']:,} sequences: "
            f"all checksums match, fingerprint {facts['fingerprint'][:16]}"
        )
    if documents is not None and tokens is not None:
        made, found = result["tokens"]["documents_fingerprint"], result["documents"]["fingerprint"]
        if made != found:
            raise UserError(
                f"{tokens}: tokens of documents {made[:16]}, but {documents} has {found[:16]} (fingerprints); {TOKENIZE_AGAIN}"
            )
    return result


def verify_documents(folder: str) -> dict[str, Any]:
    """Every document tar and removed list against its size and sha256, and every document against its own."""
    index = DocumentIndex.load(folder)
    _check_strays(folder, {shard["name"] for shard in index.shards})
    documents = sum(_verify_shard(index, shard) for shard in index.shards)
    removed = sum(1 for _ in read_removed(index))
    listed = sum(file["records"] for file in index.tree["removed"])
    if removed != listed:
        raise UserError(
            f"{folder}: {removed} records of removed documents, the index lists {listed}; run `pldr shard` again"
        )
    files = len(index.shards) + len(index.tree["removed"])
    return {
        "folder": folder,
        "files": files,
        "documents": documents,
        "removed": removed,
        "fingerprint": index.fingerprint,
    }


def _check_strays(folder: str, listed: set[str]) -> None:
    """Raise UserError for tars that the index does not list: whoever reads `*.tar` would mix them in."""
    if found := strays(folder, listed):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(
            f"{public_url(join(folder, found[0]))}: not in the index{more}: who reads every tar would mix it in; move it away, "
            "or run the stage again with --force"
        )


def _verify_shard(index: DocumentIndex, shard: dict[str, Any]) -> int:
    count = 0
    for document in read_shard(index.folder, shard):
        if hashlib.sha256(document.text.encode("utf-8")).hexdigest() != document.meta["sha256"]:
            raise UserError(
                f"{join(index.folder, shard['name'])}: {document.key}.txt does not match the sha256 in its .json; "
                "run `pldr shard` again"
            )
        count += 1
    if count != shard["documents"]:
        raise UserError(
            f"{join(index.folder, shard['name'])}: {count} documents, the index lists {shard['documents']}; "
            "run `pldr shard` again"
        )
    return count


def verify_tokens(folder: str) -> dict[str, Any]:
    """Every token tar, every block in it, and the copy of the tokenizer against their checksums."""
    index = TokenIndex.load(folder)
    _check_strays(folder, {shard.name for shard in index.shards})
    index.verify()
    tokenizer_of(index)
    return {
        "folder": folder,
        "files": len(index.shards) + 1,
        "blocks": sum(len(shard.offsets) for shard in index.shards),
        "sequences": sum(shard.sequences for shard in index.shards),
        "fingerprint": index.fingerprint,
        "documents_fingerprint": index.documents_fingerprint,
    }
