"""Random damage to any file of a finished run: an error that names the file, or a correct result (damage_cases.py).

FUZZ_FIRST=17 FUZZ_CASES=1 pytest -m slow -s tests/launch/end_to_end/test_damage.py     # case 17 of a new run
python -m tests.launch.end_to_end.damage_cases FOLDER 17 1                              # of the run that was damaged before
"""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from pipeline.io import storage
from pipeline.stages.runner import LOCK
from pipeline.tracking.sqlite_store import make_store
from tests.launch.end_to_end.damage_cases import NO_COMMIT, prepare

FIRST, CASES = int(os.environ.get("FUZZ_FIRST", "0")), int(os.environ.get("FUZZ_CASES", "1000"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_run):
    """A finished run on one rank, kept as it is."""
    folder = tmp_path_factory.mktemp("damage")
    config = make_run(folder, ranks=1, checkpoint_every=250)
    (folder / "run").mkdir()
    storage.publish_json(
        folder / "run" / "run.json", {}
    )  # a store in the run directory, so that a copy has one of its own
    make_store(folder / "run" / "mlflow.db")
    (folder / "run" / LOCK).touch()  # a run's folder, which is not refused as one of other files
    (folder / "run" / "run.json").unlink()
    command = [sys.executable, "-m", "launch.cli", "run", str(config)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **NO_COMMIT})
    assert done.returncode == 0, done.stderr[-3000:]
    prepare(folder)
    return folder


def cases(folder, first, count):
    """The outcomes of so many cases, in a process of their own."""
    command = [sys.executable, "-m", "tests.launch.end_to_end.damage_cases", str(folder), str(first), str(count)]
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"seed"')]


@pytest.mark.slow
def test_damage_is_named_or_does_no_harm(folder):
    found = cases(folder, FIRST, CASES)
    table = Counter((case["area"], case["outcome"]) for case in found)
    print(f"{folder}, seeds {FIRST} to {FIRST + CASES - 1}:", *sorted(table.items()), sep="\n")
    assert len(found) == CASES
    assert not [case for case in found if case["outcome"] == "WRONG"]
