"""Damage to files, as a disk, a copy or a hand makes it; each is decided by a random number generator alone.

Half of the damaged files keep their size and time of change, as after bit rot: only reading their bytes shows it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Bytes = Callable[[bytes, random.Random], bytes]
DEEP = 200_000  # levels of nesting


def byte(data: bytes, rng: random.Random) -> bytes:
    """One byte changed; in a text half the time one digit, which leaves it readable."""
    digits = [i for i, value in enumerate(data) if 48 <= value <= 57] if rng.random() < 0.5 else []
    at = rng.choice(digits) if digits else rng.randrange(len(data))
    choices = b"0123456789" if digits else bytes(range(256))
    return data[:at] + bytes([rng.choice([value for value in choices if value != data[at]])]) + data[at + 1 :]


def truncation(data: bytes, rng: random.Random) -> bytes:
    """The end cut off."""
    return data[: rng.randrange(len(data))]


def swap(data: bytes, rng: random.Random) -> bytes:
    """Two ranges of one length exchanged."""
    for _ in range(100):
        size = rng.randint(1, max(1, min(len(data) // 2, 4096)))
        one = rng.randint(0, len(data) - 2 * size) if len(data) >= 2 * size else 0
        other = rng.randint(one + size, len(data) - size) if len(data) >= one + 2 * size else 0
        if data[one : one + size] != data[other : other + size]:
            return (
                data[:one] + data[other : other + size] + data[one + size : other] + data[one : one + size]
                + data[other + size :]
            )  # fmt: skip
    return data[1:]


def zeros(data: bytes, rng: random.Random) -> bytes:
    """A block of zeros, as a disk leaves it that was cut off."""
    at = rng.randrange(len(data))
    size = min(512, len(data) - at)
    return data[:at] + bytes(size) + data[at + size :]


def longer(data: bytes, rng: random.Random) -> bytes:
    """More bytes at the end."""
    return data + rng.randbytes(rng.randint(1, 600))


def empty(data: bytes, rng: random.Random) -> bytes:
    """No byte left."""
    return b""


def huge_length(data: bytes, rng: random.Random) -> bytes:
    """A length of many gigabytes, where safetensors has the one of its header."""
    return rng.choice([2**63 - 1, 2**40, 2**33]).to_bytes(8, "little") + data[8:]


def not_utf8(data: bytes, rng: random.Random) -> bytes:
    """A byte that no UTF-8 text holds."""
    at = rng.randrange(len(data))
    return data[:at] + b"\xff" + data[at:]


def nested(data: bytes, rng: random.Random) -> bytes:
    """JSON nested deeper than any program's stack."""
    return b"[" * DEEP if rng.random() < 0.5 else b'{"a":' * DEEP + b"1" + b"}" * DEEP


def other_value(data: bytes, rng: random.Random) -> bytes:
    """JSON (or one line of JSON lines) with one value or key of another kind; where it is none, one byte changed."""
    lines = data.splitlines(keepends=True)
    number = rng.randrange(len(lines)) if len(lines) > 1 and lines[0].startswith(b'{"') else None
    try:
        tree = json.loads(data if number is None else lines[number])
    except ValueError:
        return byte(data, rng)
    changed = json.dumps(_changed(tree, rng)).encode()
    if number is None:
        return changed
    lines[number] = changed + b"\n"
    return b"".join(lines)


def _changed(tree: Any, rng: random.Random) -> Any:
    values = [None, [], {}, "x", "\ud800", 10**30, -1, True, 1.5, float("nan"), float("inf"), [[[]]], 99, "", 0, 1e308]
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.2:
        return rng.choice([value for value in values if value != tree])
    if isinstance(tree, list):
        at = rng.randrange(len(tree))
        return [_changed(value, rng) if i == at else value for i, value in enumerate(tree)]
    key = rng.choice(sorted(tree))
    rest = {name: value for name, value in tree.items() if name != key}
    if (kind := rng.random()) < 0.15:
        return rest
    return {**rest, key + "x": tree[key]} if kind < 0.25 else {**rest, key: _changed(tree[key], rng)}


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _gone(path: Path) -> None:
    path.unlink()


COMMON: dict[str, Bytes] = {"byte": byte, "truncation": truncation, "swap": swap}
RARE: dict[str, Bytes] = {
    "zeros": zeros, "longer": longer, "empty": empty, "huge length": huge_length, "not UTF-8": not_utf8,
    "nested": nested, "other value": other_value,
}  # fmt: skip
IN_ITS_PLACE = {"a folder": _folder, "a loop of links": _loop, "gone": _gone}


def damage(files: list[Path], rng: random.Random) -> tuple[str, list[Path]]:
    """Damage one of these files, or exchange two of them; returns what was done and to which."""
    path, draw = rng.choice(files), rng.random()
    others = [other for other in files if other.read_bytes() != path.read_bytes()]
    if draw < 0.1 and others:
        other = rng.choice(others)
        _exchange(path, other)
        return "swap of files", [path, other]
    if draw > 0.93:
        what = rng.choice(sorted(IN_ITS_PLACE))
        IN_ITS_PLACE[what](path)
        return what, [path]
    kinds = COMMON if draw < 0.7 else RARE
    what = rng.choice(sorted(kinds))
    before, facts = path.read_bytes(), path.stat()
    after = kinds[what](before or b"x", rng)
    path.write_bytes(after)
    if rng.random() < 0.5:
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    return what, [path]


def _exchange(one: Path, other: Path) -> None:
    held = one.with_name(f"{one.name}.held")
    shutil.move(one, held)
    shutil.move(other, one)
    shutil.move(held, other)
