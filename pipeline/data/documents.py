"""Document shards as written: their index, and reading them back checked.

`documents/index.json` holds what the shards hold and what was dropped on the way, by reason. Its fingerprint
covers all of it, so that it names the corpus: the same text sharded the same way has the same fingerprint on
any machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.tar import read_members
from pipeline.errors import UserError
from pipeline.storage import read_json, sha256_file, sha256_json

SCHEMA_VERSION = 1
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Document:
    """One document: its UTF-8 text and what is known of it (source, sha256, split, license)."""

    key: str
    text: str
    meta: dict[str, Any]


@dataclass(frozen=True)
class DocumentIndex:
    """`documents/index.json`, read once."""

    folder: Path
    fingerprint: str
    shards: tuple[dict[str, Any], ...]  # name, split, shard, documents, text_bytes, bytes, sha256
    splits: dict[str, dict[str, int]]

    @classmethod
    def load(cls, folder: str | Path) -> DocumentIndex:
        """Raises UserError when there is no finished index, or one that is damaged."""
        folder = Path(folder)
        path = folder / "index.json"
        if not path.is_file():
            raise UserError(f"{path}: no finished documents; run `pldr shard` first")
        tree = read_json(path, schema_version=SCHEMA_VERSION)
        if tree.get("fingerprint") != fingerprint_of(tree):
            raise UserError(f"{path}: its fingerprint does not fit its content; it was changed: run `pldr shard` again")
        return cls(folder, tree["fingerprint"], tuple(tree["shards"]), tree["splits"])

    def of_split(self, split: str) -> list[dict[str, Any]]:
        """The shards of a split, in order."""
        return [shard for shard in self.shards if shard["split"] == split]


def fingerprint_of(tree: dict[str, Any]) -> str:
    """sha256 of an index without its own fingerprint."""
    return sha256_json({key: value for key, value in tree.items() if key != "fingerprint"})


def read_shard(folder: Path, shard: dict[str, Any]) -> Iterator[Document]:
    """The documents of a shard in order, streamed. The file is checked against the index before anything
    comes out.

    Raises UserError naming the shard when it is missing or damaged.
    """
    path = folder / shard["name"]
    check_file(path, shard, mend="run `pldr shard` again")
    members = read_members(path)
    for name, payload in members:
        key, _, extension = name.partition(".")
        meta_name, meta = next(members)
        assert extension == "txt" and meta_name == f"{key}.json", f"{path}: {name} is followed by {meta_name}"
        yield Document(key, payload.decode("utf-8"), json.loads(meta))


def check_file(path: Path, facts: dict[str, Any], *, mend: str) -> None:
    """A shard file is there, whole and unchanged: `facts` holds its bytes and sha256. Raises UserError
    naming it."""
    if not path.is_file():
        raise UserError(f"{path}: missing, but its index lists it; {mend}")
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise UserError(f"{path}: {size} bytes, its index says {facts['bytes']}: cut or damaged; {mend}")
    if sha256_file(path) != facts["sha256"]:
        raise UserError(f"{path}: its sha256 is not the one in its index: damaged; {mend}")
