"""One process at a time works in a run directory."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config.paths import RunPaths
from pipeline.errors import ConfigError, UserError
from pipeline.stages.runner import LOCK, exclusive


def test_a_folder_with_other_files_is_no_run_directory(make, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    with (
        pytest.raises(ConfigError, match="holds files that are no run's"),
        exclusive(make(f"run_dir={tmp_path / 'home'}")[0].paths, print),
    ):
        raise AssertionError("not reached")
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["thesis.txt"]


def test_a_process_that_holds_nodes_does_not_wait_for_ever(tmp_path):
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    holds = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    command = [sys.executable, "-c", holds, str(paths.root / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        said = []
        with (
            pytest.raises(UserError, match="works here; it did not end in 0.1 s"),
            exclusive(paths, said.append, wait_s=0.1),
        ):
            pass
        assert "waiting for it to end" in said[0]
        other.communicate("\n")
    with exclusive(paths, said.append, wait_s=0.1):
        pass


def test_five_that_begin_at_once_in_a_new_run_directory_work_one_after_another(tmp_path, at_once):
    def work(turn, number):
        paths, reported = RunPaths(str(tmp_path / f"run{turn}")), []
        with exclusive(paths, reported.append):
            inside = paths.root / "inside"
            inside.touch(exist_ok=False)
            time.sleep(0.002)  # long enough for another one to be seen
            inside.unlink()
            (paths.root / f"made-by-{number}").touch()
        return reported

    reports = at_once(work, rounds=20)
    assert all(line.endswith("works here; waiting for it to end") for reported in reports for line in reported)
    assert all(len(list((tmp_path / f"run{turn}").glob("made-by-*"))) == 5 for turn in range(20))


def test_whoever_waited_for_a_removed_run_directory_begins_anew(make, tmp_path, at_once):
    pipeline, root = make()[0], tmp_path / "run"

    def work(turn, number):
        if number == 0:
            with exclusive(pipeline.paths, print):
                (tmp_path / "begun").touch()
                while not (tmp_path / "waiting").exists():
                    pass
                shutil.rmtree(root)
            return None
        while not (tmp_path / "begun").exists():
            pass
        with exclusive(pipeline.paths, lambda line: (tmp_path / "waiting").touch()):
            return (root / ".lock").exists()

    assert at_once(work, processes=2) == [None, True]


def test_a_run_that_begins_while_another_looks_at_its_new_directory_is_no_foreign_one(tmp_path, monkeypatch):
    """The other one makes its lock, then its files, between two looks of ours."""
    root, listing = tmp_path / "run", Path.iterdir

    def begun_meanwhile(folder):
        (root / ".lock").touch()
        (root / "logs").mkdir(exist_ok=True)
        return listing(folder)

    monkeypatch.setattr(Path, "iterdir", begun_meanwhile)
    with exclusive(RunPaths(str(root)), print):
        pass
    monkeypatch.undo()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="no run's"), exclusive(RunPaths(str(tmp_path / "foreign")), print):
        pass
