"""Pages over several sweeps, made from their sweep.json files: `python -m pipeline.sweep.page SWEEP.json ...`.

--out experiments.html      one page: what came out, what it costs, what is not known; then each comparison with its plots
--markdown                  the comparisons as Markdown, on stdout
--into docs/experiments.md  the same in their places in that page
--copy-to docs/experiments  small copies of the files, which is all that these commands need (saved.py)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.io.storage import publish_bytes, read_json
from pipeline.report.html import render
from pipeline.report.terms import explained
from pipeline.sweep import describe
from pipeline.sweep.markdown import block, put_into
from pipeline.sweep.report import MOST_WANTED, cell
from pipeline.sweep.saved import Saved, read_saved, render_small, small
from pipeline.sweep.view import view

TERMS = ("G_LM", "live, cached", "order parameter", "budget", "nats")
Tree = dict[str, Any]


def write_page(sweeps: Sequence[Saved], target: Path, *, title: str) -> None:
    """Write the page over the sweeps, in their order."""
    content = {
        "title": title,
        "sweeps": [shown(sweep) for sweep in sweeps],
        "terms": explained(*TERMS),
    }
    page = render(Path(__file__).with_name("page.html"), content, {})
    publish_bytes(target, page.encode("utf-8", errors="replace"))


def shown(sweep: Saved) -> Tree:
    """What the page shows of a sweep: its comparison, or its children where nothing is compared."""
    compared = None if sweep.compare is None else view(sweep.lines, sweep.compare, sweep.curves, sweep.to_come)
    keys = [
        key for key in dict.fromkeys([*sweep.grid, *MOST_WANTED]) if any(row.get(key) is not None for row in sweep.rows)
    ]
    return {
        "name": sweep.name,
        "about": sweep.about,
        "ended": f"{len(sweep.rows)} of {sweep.children} children",
        "compared": compared,
        "costs": describe.costs(sweep.lines, sweep.compare) if sweep.compare else "",
        "keys": keys,
        "rows": [] if compared else [[cell(row.get(key)) for key in keys] for row in sweep.rows],
    }


def main(argv: Sequence[str]) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.sweep.page", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="SWEEP.json")
    parser.add_argument("--out", type=Path, metavar="PAGE.html")
    parser.add_argument("--title", default="Experiments")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--into", type=Path, metavar="PAGE")
    parser.add_argument("--copy-to", type=Path, metavar="FOLDER")
    given = parser.parse_args(argv)
    if not (given.out or given.markdown or given.into or given.copy_to):
        parser.error("nothing to make; give --out, --markdown, --into or --copy-to")
    try:
        sweeps = [read_saved(path) for path in given.files]
        names = [sweep.name for sweep in sweeps]
        if len(set(names)) < len(names):
            raise UserError(f"two files are of the sweep {max(names, key=names.count)}; leave one out")
        if given.copy_to:
            for path, name in zip(given.files, names, strict=True):
                publish_bytes(given.copy_to / f"{name}.json", render_small(small(read_json(path))))
        if given.out:
            write_page(sweeps, given.out, title=given.title)
        if given.into:
            text = _read(given.into)
            for sweep in sweeps:
                text = put_into(text, sweep, str(given.into))
            publish_bytes(given.into, text.encode())
        if given.markdown:
            print("\n".join(block(sweep) for sweep in sweeps), end="")
    except (UserError, OSError) as error:
        print(f"pldr: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name the page that the tables are in") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
