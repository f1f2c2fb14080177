"""Finished document shards: their index, and verified reads, from a folder or an fsspec URL.

`index.json` (schema 2) describes the shards, what each cleaning step did, and what was left out, by reason. Its fingerprint
covers all of this and identifies the corpus: the same text sharded the same way has the same fingerprint on any machine,
wherever the corpus is stored.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import zstandard

from pipeline.data.tar import read_members
from pipeline.errors import UserError
from pipeline.io.remote import open_retrying, size_of
from pipeline.io.storage import CHUNK, exists, path_of, read_json, safe_member, sha256_file, sha256_json
from pipeline.io.urls import check_url, is_local, join, public_url

SCHEMA_VERSION = 2
SPLITS = ("train", "val", "test")
SHARD_AGAIN = "run `pldr shard` again"


@dataclass(frozen=True)
class Document:
    """One document: its text and metadata (source, sha256, split, license, repeat, part)."""

    key: str
    text: str
    meta: dict[str, Any]


@dataclass(frozen=True)
class DocumentIndex:
    """`documents/index.json`, read once. `tree`: the entire index."""

    folder: str
    fingerprint: str
    shards: tuple[dict[str, Any], ...]  # name, split, documents, text_bytes, words, bytes, sha256[, source]
    splits: dict[str, dict[str, Any]]
    tree: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> DocumentIndex:
        """Read `index.json`. Raises UserError if there is none (unfinished documents) or it is damaged."""
        url = join(check_url(str(folder)), "index.json")
        if not exists(url):
            raise UserError(f"{url}: no finished documents; run `pldr shard` first")
        tree = read_json(url, schema_version=SCHEMA_VERSION)
        if tree.get("fingerprint") != fingerprint_of(tree):
            raise UserError(f"{url}: its fingerprint does not match its content; it was changed: {SHARD_AGAIN}")
        if not _is_index(tree):
            raise UserError(
                f"{url}: not an index of documents; name the folder that `pldr shard` made, or {SHARD_AGAIN}"
            )
        return cls(str(folder), tree["fingerprint"], tuple(tree["shards"]), tree["splits"], tree)

    def of_split(self, split: str) -> list[dict[str, Any]]:
        """The shards of a split, in order."""
        return [shard for shard in self.shards if shard["split"] == split]

    def verify(self) -> int:
        """Check size and sha256 of every shard and every list of removed documents; returns the number of files.
        Raises UserError naming the first that is damaged or missing."""
        files = [*self.shards, *self.tree["removed"]]
        for facts in files:
            check_file(join(self.folder, facts["name"]), facts, fix=SHARD_AGAIN)
        return len(files)


def _is_index(tree: dict[str, Any]) -> bool:
    """Whether the files that it lists have names and hashes."""
    files, removed = tree.get("shards"), tree.get("removed")
    return (
        isinstance(files, list)
        and isinstance(removed, list)
        and isinstance(tree.get("splits"), dict)
        and all(isinstance(shard, dict) and isinstance(shard.get("split"), str) for shard in files)
        and all(
            isinstance(file, dict)
            and isinstance(file.get("name"), str)
            and isinstance(file.get("sha256"), str)
            and _stays_inside(file["name"])
            for file in [*files, *removed]
        )
    )


def _stays_inside(name: str) -> bool:
    try:
        return bool(safe_member(name))
    except UserError:
        return False


def fingerprint_of(tree: dict[str, Any]) -> str:
    """sha256 of an index without its own fingerprint."""
    return sha256_json({key: value for key, value in tree.items() if key != "fingerprint"})


def read_shard(folder: str | Path, shard: dict[str, Any]) -> Iterator[Document]:
    """The documents of a shard in order, streamed. The file is checked against the index before anything is returned.

    Raises UserError naming the shard when it is missing or damaged.
    """
    with checked_file(join(folder, shard["name"]), shard, fix=SHARD_AGAIN) as path:
        members = read_members(path)
        for name, payload in members:
            key, _, extension = name.partition(".")
            meta_name, meta = next(members)
            assert extension == "txt" and meta_name == f"{key}.json", f"{path}: {name} is followed by {meta_name}"
            yield Document(key, payload.decode("utf-8"), orjson.loads(meta))


def read_texts(folder: str | Path, shard: dict[str, Any]) -> Iterator[bytes]:
    """Only the texts of `read_shard`, as UTF-8, at half the cost, which matters for short documents."""
    with checked_file(join(folder, shard["name"]), shard, fix=SHARD_AGAIN) as path:
        yield from (payload for name, payload in read_members(path) if name.endswith(".txt"))


def read_removed(index: DocumentIndex) -> Iterator[dict[str, Any]]:
    """What the stage left out or cut, record by record: id, step, reason, source and further details."""
    for facts in index.tree["removed"]:
        with checked_file(join(index.folder, facts["name"]), facts, fix=SHARD_AGAIN) as path, open(path, "rb") as raw:
            lines = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
            for line in lines:
                yield json.loads(line)


@contextmanager
def checked_file(url: str, facts: dict[str, Any], *, fix: str) -> Iterator[Path]:
    """A local path of a file checked against `facts` (bytes, sha256): the file itself, or a temporary copy of a remote one.

    Raises UserError naming the file when it is missing or damaged.
    """
    if is_local(url):
        check_file(url, facts, fix=fix)
        yield Path(url.removeprefix("file://"))
        return
    with tempfile.TemporaryFile() as copy:
        path = path_of(copy)
        try:
            with open_retrying(url) as stream:
                while chunk := stream.read(CHUNK):
                    copy.write(chunk)
        except FileNotFoundError:
            raise UserError(f"{public_url(url)}: missing, but its index lists it; {fix}") from None
        copy.flush()
        try:
            check_file(path, facts, fix=fix)
        except UserError as error:
            raise UserError(str(error).replace(str(path), url)) from None
        yield path


def check_file(url: str | Path, facts: dict[str, Any], *, fix: str) -> None:
    """Check that a file exists with the size and sha256 in `facts`. Raises UserError naming it."""
    try:
        size = size_of(str(url))
    except FileNotFoundError:
        raise UserError(f"{public_url(url)}: missing, but its index lists it; {fix}") from None
    if size != facts["bytes"]:
        raise UserError(
            f"{public_url(url)}: {size} bytes, its index says {facts['bytes']}: truncated or damaged; {fix}"
        )
    if sha256_file(url) != facts["sha256"]:
        raise UserError(f"{public_url(url)}: its sha256 is not the one in its index: damaged; {fix}")
