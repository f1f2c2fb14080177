"""One damaged file a case, then what a user does next: a correct result, or one line that names the file.

    python -m tests.launch.end_to_end.damage_cases FOLDER FIRST COUNT

FOLDER holds tiny.yaml and its finished run (`prepare` makes it ready). Case N of a folder is the same whenever it is run: its
number is the seed. Each is a process of its own, forked after the imports, with limits of time and memory; one JSON line each.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.helpers.damage import damage
from tests.launch.end_to_end.damaged_areas import AREAS, Area

PRISTINE = "undamaged"
NO_COMMIT = {"GIT_DIR": "/nonexistent"}  # bundles name the commit of the code, which may change meanwhile
LIMIT_S = 300  # of one case; most take less than one second
MEMORY = 3 << 30  # bytes of address space, on top of what the imports take
VOLATILE = ("seconds", "skipped", "page", "points_sent")
REMADE = ("resumed_from",)  # differs where training, which was complete, is started again
TABLES = ("metrics", "latest_metrics", "params", "tags", "runs")


def prepare(folder: Path) -> None:
    """Keep the finished run as it is, and an MLflow store without any run."""
    from pipeline.tracking.client import client
    from pipeline.tracking.sqlite_store import uri_of

    os.rename(folder / "run", folder / PRISTINE)
    client(uri_of(folder / "empty.db")).search_experiments()


def main(folder: Path, first: int, count: int) -> Iterator[dict[str, Any]]:
    """The cases `first` to `first + count`."""
    os.chdir(folder)
    os.environ |= NO_COMMIT
    os.fsync = lambda handle: None  # half of the time; no power failure is tried here
    _warm_up()
    references: dict[str, Any] = {}
    for seed in range(first, first + count):
        area = sorted(AREAS)[seed % len(AREAS)]
        if area not in references:
            references[area] = _in_child(lambda area=area: _work(AREAS[area], None))
            assert all(done["code"] == 0 for done in references[area]["commands"]), (area, references[area])
        found = _in_child(lambda seed=seed, area=area: _work(AREAS[area], random.Random(seed)))
        yield {"seed": seed, "area": area, **found, **_judge(AREAS[area], found, references[area])}


def _warm_up() -> None:
    """Run every command once on a copy of the run, so that a case imports nothing. MLflow keeps stores open by their URI: this
    one's is another."""
    import torch

    torch.set_num_threads(1)
    shutil.rmtree("warm", ignore_errors=True)
    shutil.copytree(PRISTINE, "warm", symlinks=True)
    for words in sorted({words for area in AREAS.values() for words in area.commands}):
        _command(tuple(word if word == "run" else word.replace("run/", "warm/") for word in words), "run_dir=warm")
    shutil.rmtree("warm")


def _work(area: Area, rng: random.Random | None) -> dict[str, Any]:
    """Damage a copy of the run (rng None: do not), and run the commands of its area. In a process of its own."""
    run = Path("run").absolute()
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(PRISTINE, run, symlinks=True)
    area.prepare(run)
    found: dict[str, Any] = {}
    if rng is not None:
        files = sorted(p for pattern in area.files for p in run.glob(pattern) if p.is_file())
        what, paths = damage(files, rng)
        found = {"damage": what, "files": [str(path.relative_to(run)) for path in paths]}
    limit = MEMORY + int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    found["commands"] = [_command(words) for words in area.commands]
    if all(done["code"] == 0 for done in found["commands"]):
        found["content"] = _content(run, area.same)
    return found


def _command(words: tuple[str, ...], *overrides: str) -> dict[str, Any]:
    from launch.cli import main as pldr

    out, err = io.StringIO(), io.StringIO()
    logging.root.handlers.clear()  # else warnings go to the stderr of the first command
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = pldr([*words, *(overrides if "tiny.yaml" in words else ()), "--json"])
        except BaseException:
            code = -1
            traceback.print_exc()
    return {"words": " ".join(words), "code": code, "out": out.getvalue(), "err": err.getvalue()}


def _content(run: Path, patterns: tuple[str, ...]) -> dict[str, Any]:
    files = sorted(path for pattern in patterns for path in run.glob(pattern) if path.is_file())
    return {
        str(path.relative_to(run)): _rows(path)
        if path.suffix == ".db"
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _rows(database: Path) -> dict[str, list[str]]:
    """What a store holds; a run that was made anew has another id and other times."""
    with contextlib.closing(sqlite3.connect(database)) as opened:
        opened.row_factory = sqlite3.Row
        unsure = ("run_uuid", "start_time", "end_time", "artifact_uri", "experiment_id", "lifecycle_stage")
        return {
            table: sorted(
                json.dumps({key: value for key, value in dict(row).items() if key not in unsure})
                for row in opened.execute(f"SELECT * FROM {table}")
                if table != "tags" or (row["key"].startswith("pldr") and row["key"] != "pldr.nodes")
            )
            for table in TABLES
        }


def _judge(area: Area, found: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """The outcome: "named" (an error that names the file), "healed" (told, and all results are right), "right", or what is
    wrong."""
    if "died" in found:
        return {"outcome": "WRONG", "why": found["died"]}
    told, refused, older = False, False, False
    for done, expected in zip(found["commands"], reference["commands"], strict=True):
        where, lines = done["words"], [x for x in done["err"].splitlines() if x.startswith("pldr: error: ")]
        if "Traceback" in done["err"] or done["code"] not in (0, 1, 2, 3):
            return {"outcome": "WRONG", "why": f"{where}: {done['err'].strip()[-700:]}"}
        if done["code"]:
            if len(lines) != 1:
                return {"outcome": "WRONG", "why": f"{where}: {len(lines)} lines of error: {done['err'][-300:]}"}
            if not refused and not _names(lines[0], found["files"]):  # later ones may follow from it
                return {"outcome": "WRONG", "why": f"{where}: does not name it: {lines[0]}"}
            refused = True
            continue
        leave_out = VOLATILE if "--prepare" in where else (*VOLATILE, *REMADE)
        ours, theirs = _result(done["out"], leave_out), _result(expected["out"], leave_out)
        older |= "is damaged and left out" in done["out"]  # the checkpoint before it is right, too
        if area.covered and ours != theirs and not (refused or older):
            return {"outcome": "WRONG", "why": f"{where}: {_first_difference(ours, theirs)}"}
        told |= bool(done["err"].strip()) or done["out"].count("skipped") != expected["out"].count("skipped")
    if refused:
        return {"outcome": "named"}
    if older:
        return {"outcome": "healed"}
    if area.covered and found["content"] != reference["content"]:
        return {"outcome": "WRONG", "why": f"content: {_first_difference(found['content'], reference['content'])}"}
    return {"outcome": "healed" if told else "right"}


def _names(line: str, files: list[str]) -> bool:
    return any(Path(file).name in line for file in files)


def _result(out: str, leave_out: tuple[str, ...]) -> Any:
    def stable(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: {name: facts[-1] for name, facts in inner.items()} if key == "outputs" else stable(inner)
                for key, inner in value.items()
                if key not in leave_out
            }
        return [stable(inner) for inner in value] if isinstance(value, list) else value

    return stable(json.loads(out.strip().splitlines()[-1]))


def _first_difference(ours: Any, theirs: Any, where: str = "") -> str:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}):
            if ours.get(key) != theirs.get(key):
                return _first_difference(ours.get(key), theirs.get(key), f"{where}.{key}")
    if isinstance(ours, list) and isinstance(theirs, list):
        more, less = [x for x in ours if x not in theirs], [x for x in theirs if x not in ours]
        return f"{where}: {len(more)} only here {str(more[:1])[:300]}, {len(less)} only undamaged {str(less[:1])[:300]}"
    return f"{where}: {str(ours)[:200]}, undamaged {str(theirs)[:200]}"


def _in_child(work: Any) -> dict[str, Any]:
    """What `work` returns, from a forked process. {"died": why} when it took too long or was killed."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(LIMIT_S)
        with open(writing, "wb") as stream:
            try:
                result = work()
            except BaseException:
                result = {"died": traceback.format_exc()}
            stream.write(json.dumps(result).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as stream:
        data = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return json.loads(data) if data else {"died": f"ended with {status} ({-signal.SIGALRM}: not done in {LIMIT_S} s)"}


if __name__ == "__main__":
    began = time.monotonic()
    for case in main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])):
        shown = {key: case.get(key) for key in ("seed", "area", "damage", "files", "outcome", "why")}
        print(json.dumps({**shown, "s": round(time.monotonic() - began, 1)}), flush=True)
