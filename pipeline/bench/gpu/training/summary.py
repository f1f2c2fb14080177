"""What was wanted of training on an H100-class GPU, beside what a run saw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

Row = dict[str, Any]


class Wanted(NamedTuple):
    """met: None where nothing was measured. of: which measurement it is."""

    what: str
    wanted: str
    seen: Any
    met: bool | None
    of: str = ""


def judge(rows: list[Row]) -> list[Wanted]:
    """Every wanted number, from the results of all parts."""
    return [
        _mfu(rows),
        _ratio(rows, "110m", "ours plga", "ours twin", "PLGA beside its SDPA twin, 110M", at_least=0.93),
        _ratio(rows, "110m", "ours plga-shared", "ours twin", "the same with one G for a micro batch", at_least=0.97),
        _overhead(rows),
        _share(rows, "loader", "share", "waiting for data, of a step"),
        _share(rows, "checkpoint", "stall", "checkpoints, of training"),
        _resume(rows),
        _tests(rows),
    ]


def _timed(rows: list[Row], model: str, form: str) -> Iterator[Row]:
    """Rows of steps, the compiled ones last."""
    mine = [row for row in rows if row["what"] == "train" and row["model"] == model and row["form"] == form]
    yield from sorted((row for row in mine if "error" not in row), key=lambda row: row["mode"] == "compiled")


def _mfu(rows: list[Row]) -> Wanted:
    found = [row for row in _timed(rows, "110m", "ours plga") if row["mfu"] is not None]
    best = max(found, key=lambda row: row["mfu"], default=None)
    name, wanted = "MFU in bf16, 110M", ">= 0.45"
    if best is None:
        return Wanted(name, wanted, None, None)
    return Wanted(name, wanted, round(best["mfu"], 3), best["mfu"] >= 0.45, _of(best))


def _ratio(rows: list[Row], model: str, form: str, other: str, what: str, *, at_least: float) -> Wanted:
    found = [row for row in _timed(rows, model, form) if other in row["ratios"]]
    if not found:
        return Wanted(what, f">= {at_least}", None, None)
    seen = found[-1]["ratios"][other]
    return Wanted(what, f">= {at_least}", round(seen, 3), seen >= at_least, _of(found[-1]))


def _overhead(rows: list[Row]) -> Wanted:
    found = [row for row in _timed(rows, "110m", "ours plga") if "plain plga" in row["ratios"]]
    name, wanted = "DeepSpeed's overhead over plain PyTorch, 110M", "<= 0.03"
    if not found:
        return Wanted(name, wanted, None, None)
    seen = 1 / found[-1]["ratios"]["plain plga"] - 1
    return Wanted(name, wanted, round(seen, 4), seen <= 0.03, _of(found[-1]))


def _share(rows: list[Row], what: str, key: str, name: str) -> Wanted:
    found = [row for row in rows if row["what"] == what]
    if not found:
        return Wanted(name, "< 0.01", None, None)
    of = f"checkpoint_every {found[0]['checkpoint_every']}" if what == "checkpoint" else ""
    return Wanted(name, "< 0.01", round(found[0][key], 5), found[0][key] < 0.01, of)


def _resume(rows: list[Row]) -> Wanted:
    found = [row for row in rows if row["what"] == "resume"]
    name = "a resumed run, train.deterministic, bf16"
    if not found:
        return Wanted(name, "bit-equal", None, None)
    equal = found[0]["bit_equal"]
    return Wanted(name, "bit-equal", "bit-equal" if equal else "differs", equal)


def _tests(rows: list[Row]) -> Wanted:
    found = [row for row in rows if row["what"] == "tests" and "failed" in row]
    if not found:
        return Wanted("pytest -m gpu", "all pass", None, None)
    row = found[0]
    seen = f"{row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped"
    return Wanted("pytest -m gpu", "all pass", seen, row["exit_code"] == 0 and row["passed"] > 0)


def _of(row: Row) -> str:
    return f"{row['mode']}, micro batch {row['micro_batch']}"


def table(wanted: list[Wanted]) -> str:
    """As Markdown."""
    verdict = {True: "met", False: "**missed**", None: "not measured"}
    lines = [f"| {w.what} | {w.wanted} | {w.seen} | {verdict[w.met]} | {w.of} |" for w in wanted]
    return "\n".join(["| | wanted | seen | | of |", "|---|---|---|---|---|", *lines])
