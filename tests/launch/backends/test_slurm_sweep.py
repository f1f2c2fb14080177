"""launch/backends/slurm_sweep.py: the array of a sweep's children.

With a real Slurm: tests/launch/end_to_end/test_slurm_sweep.py.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from launch.backends import slurm_sweep
from launch.cli import main
from pipeline.errors import UserError
from pipeline.sweep import apart
from pipeline.sweep.sweep import Sweep
from pipeline.tracking.client import tracking_uri
from tests.helpers.slurm_commands import NO_ACCOUNTING, NO_GPUS, install


def dry_run(capsys, *words: str) -> str:
    assert main(["sweep", "sweep.yaml", "--slurm", "--dry-run", "--json", *words]) == 0
    (script,) = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["files"].values()
    return script


@pytest.mark.parametrize(
    ("numbers", "text"), [([1], "1"), ([1, 2, 3], "1-3"), ([1, 3, 4, 7], "1,3-4,7"), ([2, 4], "2,4")]
)
def test_an_array_of_what_is_left(numbers, text):
    assert slurm_sweep.ranges(numbers) == text


def test_the_script_runs_what_is_not_complete(sweep, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(apart, "unfinished", lambda sweep: {2: "seed-2", 3: "seed-3", 4: "seed-4"})
    script = dry_run(capsys, "--at-once", "2", "--ranks-per-node", "2", "--time", "1:00:00", "train.steps=90")
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"array=2-4%2", "nodes=1", "gpus-per-node=2", "cpus-per-task=16", "time=1:00:00", "requeue"} <= set(lines)
    assert f"output={tmp_path}/sweep/logs/sweep-%A_%a.out" in lines
    assert not (tmp_path / "sweep").exists()
    # Slurm's own number of one element is that of the array: it would be requeued as a whole.
    assert 'scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' in script
    run = script.partition("srun ")[2]
    assert "train.steps=90" in run and '--only "$SLURM_ARRAY_TASK_ID" --ranks-per-node 2 --stopped-code 75' in run


def test_an_element_knows_its_child_and_requeues_only_itself(sweep, capsys, tmp_path):
    """The script with stand-ins: srun commits a checkpoint of child 3, and is stopped."""
    script = dry_run(capsys, "--time", "1:00:00")
    commits = 'mkdir -p "$SAVES"; touch "$SAVES/COMMITTED"'
    stop = f"trap '{commits}; exit 75' USR1\n: > listening\nfor _ in $(seq 100); do sleep 0.1; done"
    install(tmp_path / "bin", srun=stop, scontrol='echo "$@" >> called', squeue="echo 40:00")
    script = script.replace("export PATH=", f"export PATH={tmp_path}/bin:")
    environment = {**os.environ, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "7",
                   "SAVES": str(tmp_path / "sweep/children/seed-3/checkpoints/step-000010")}  # fmt: skip
    job = subprocess.Popen(["bash", "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "listening").exists():
        assert job.poll() is None
    job.send_signal(10)
    out, _ = job.communicate()
    assert job.returncode == 75 and "stopped by SIGUSR1: saved, requeued" in out, out
    assert (tmp_path / "called").read_text().splitlines()[-1] == "requeue 7_3"


def test_children_that_run_at_once_share_no_sqlite_file(sweep, tmp_path):
    uris = {tracking_uri(child.config) for child in Sweep(sweep, [], apart=True).children}
    assert uris == {f"sqlite:///{tmp_path}/sweep/children/seed-{n}/mlflow.db" for n in (1, 2, 3, 4)}
    together = {tracking_uri(child.config) for child in Sweep(sweep, []).children}
    assert len(together) == 1


def test_children_that_run_at_once_share_a_server(sweep, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert {tracking_uri(child.config) for child in Sweep(sweep, [], apart=True).children} == {"http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slurm", "--at-once", "0"], "--at-once 0: at least 1"),
        (["--slurm", "--ranks-per-node", "3"], "is not a multiple of micro_batch"),
        (["--slurm", "--sbatch", "array=1-3"], "array is set by pldr"),
        (["--slurm", "--sbatch", "foo"], "--sbatch foo: it takes a value; write foo=VALUE"),
        (["--slurm", "--sbatch", "hold=1"], "--sbatch hold=1: it takes no value; write hold"),
        (["--slurm", "--only", "1"], "--slurm goes without"),
        (["--slurm", "--ranks-per-node", "0"], "--ranks-per-node 0: at least 1"),
        ([], "--dry-run is only read with --slurm"),  # it would train
        (["--only", "1"], "--dry-run is only read with --slurm"),
    ],
)
def test_wrong_options(sweep, capsys, words, message):
    assert main(["sweep", sweep, *words, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_wrong_options_are_refused_before_anything_is_made(sweep, capsys, tmp_path):
    assert main(["sweep", sweep, "--slurm", "--sbatch", "foo"]) == 2
    assert "--sbatch foo: it takes a value" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "5"], "--only 5: the sweep has children 1 to 4"),
        (["--time", "1:00:00"], "--time is only read with --slurm"),
        (["--gpus-per-node", "0"], "--gpus-per-node is only read with --slurm"),
        (["--sbatch", "foo"], "--sbatch is only read with --slurm"),
        (["--env", "1=2"], "--env is only read with --hostfile"),
        (["--master-addr", "a"], "--master-addr is only read with --hostfile"),
        (["--hostfile", "hosts", "--env", "1=2"], "--env 1=2: write NAME=VALUE"),
        (["--hostfile", "hosts", "--env", "NOT_SET_HERE"], "--env NOT_SET_HERE: write NAME=VALUE, or the NAME"),
        (["foo"], "override 'foo': write key=value"),
    ],
)
def test_wrong_options_without_slurm(sweep, capsys, words, message):
    Path("hosts").write_text("one slots=1\n")
    assert main(["sweep", sweep, *words]) == 2
    assert message in capsys.readouterr().err


def test_why_a_child_is_not_complete_without_accounting(sweep, tmp_path, monkeypatch):
    """sacct answers "disabled" and the controller has forgotten the job: the element's output is left."""
    monkeypatch.setattr(apart, "unfinished", lambda sweep: {2: "seed-2", 4: "seed-4"})
    install(tmp_path / "bin", sacct=NO_ACCOUNTING, scontrol="exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    logs = tmp_path / "sweep" / "logs"
    logs.mkdir(parents=True)
    (logs / "sweep-9_2.out").write_text("slurmstepd: error: *** JOB 9 ON n1 CANCELLED AT 1 DUE TO TIME LIMIT ***\n")
    (logs / "sweep-9_4.out").write_text(
        "pldr: error: seed-4: run_dir: no space left\nsrun: error: n1: task 0: Exited\n"
    )
    errors = slurm_sweep._errors(Sweep(sweep, [], apart=True), "9", {})
    assert "ended as TIMEOUT in Slurm job 9_2" in errors["seed-2"] and "raise --time" in errors["seed-2"]
    assert errors["seed-4"].endswith("seed-4: run_dir: no space left")


def test_a_refused_array_names_the_option(sweep, tmp_path, monkeypatch):
    install(tmp_path / "bin", sbatch=NO_GPUS, squeue="")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(apart, "make_shared_data", lambda sweep, report: None)
    monkeypatch.setattr(Sweep, "open_parent", lambda self: "parent")
    monkeypatch.setattr(Sweep, "log", lambda self, parent, files, status=None: None)
    with pytest.raises(UserError, match="change --gpus-per-node"):
        slurm_sweep.sweep_on_slurm(
            Sweep(sweep, [], apart=True), slurm_sweep.ScheduledJob(1, 1, 1, 1, "auto", False, None),
            slurm_sweep.SlurmOptions(), [sweep], at_once=2, dry=False, report=lambda text: None,
        )  # fmt: skip


@pytest.fixture
def tuned(sweep, tmp_path, monkeypatch):
    """A sweep of two variants at two rates with two seeds on a cluster of stand-ins: `sbatch` ends an array at once; of it the
    children in `lost` do not complete. Returns (sweep, the arrays, lost)."""
    tree = {"name": "tuned", "config": "tiny.yaml", "run_dir": str(tmp_path / "sweep"), "until": "train",
            "variants": {"sdpa": {"model.g_source": "identity"}, "paper": {}},
            "grid": {"train.max_lr": [0.001, 0.01], "seed": [1, 2]},
            "compare": {"baseline": "sdpa", "tune": "train.max_lr"}}  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    losses = {"sdpa": {0.001: 4.2, 0.01: 4.1}, "paper": {0.001: 4.15, 0.01: 4.3}}
    complete, arrays, lost = set(), [], set()

    def submit(file, *_):
        arrays.append(
            [line.split("child=")[1].split(" ;;")[0] for line in file.read_text().splitlines() if " child=" in line]
        )
        complete.update(set(arrays[-1]) - lost)
        return str(len(arrays))

    def value(config, done):
        variant, *_ = config.name.removeprefix("tuned.").split(".")
        return {"run_id": config.name, "val_loss_cached": losses[variant][config.train.max_lr]}

    monkeypatch.setattr(slurm_sweep.slurm, "submit", submit)
    monkeypatch.setattr(slurm_sweep.slurm, "queue", lambda: [])
    monkeypatch.setattr(slurm_sweep.slurm, "state_at_end", lambda element, output, ended: ended or "FAILED")
    monkeypatch.setattr(slurm_sweep, "check", lambda script, file: None)
    monkeypatch.setattr(slurm_sweep.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(apart, "make_shared_data", lambda sweep, report: None)
    monkeypatch.setattr(
        apart, "_done", lambda config: {"train": {}} if config.name.removeprefix("tuned.") in complete else {}
    )
    monkeypatch.setattr(apart, "measured", value)
    monkeypatch.setattr(Sweep, "open_parent", lambda self: "parent")
    monkeypatch.setattr(Sweep, "log", lambda self, parent, files, status=None: None)
    return Sweep("sweep.yaml", [], apart=True), arrays, lost


def run_on_slurm(sweep, lines=None):
    job = slurm_sweep.ScheduledJob(1, 1, 1, 1, "auto", False, None)
    report = (lambda text: None) if lines is None else lines.append
    return slurm_sweep.sweep_on_slurm(
        sweep, job, slurm_sweep.SlurmOptions(), ["sweep.yaml"], at_once=2, dry=False, report=report
    )


FIRST_SEED = [f"{variant}.max_lr-{rate}.seed-1" for variant in ("sdpa", "paper") for rate in ("0.001", "0.01")]


def test_a_second_array_has_the_other_seeds_at_the_best_of_the_first(tuned):
    sweep, arrays, _ = tuned
    result = run_on_slurm(sweep)
    assert arrays == [FIRST_SEED, ["sdpa.max_lr-0.01.seed-2", "paper.max_lr-0.001.seed-2"]]
    assert result["children"] == 6 and {row["status"] for row in result["table"]} == {"finished"}


def test_the_other_seeds_run_beside_a_child_that_fails(tuned):
    """Its rate is out; what is left is compared, and the failure is told at the end with where it is written."""
    sweep, arrays, lost = tuned
    lost.add("paper.max_lr-0.001.seed-1")
    with pytest.raises(UserError, match=r"1 of 6 children failed, paper\.max_lr-0\.001\.seed-1 with: ended as FAILED"):
        run_on_slurm(sweep)
    assert arrays == [FIRST_SEED, ["sdpa.max_lr-0.01.seed-2", "paper.max_lr-0.01.seed-2"]]


def test_after_a_cancel_nothing_more_is_submitted(tuned, monkeypatch):
    sweep, arrays, lost = tuned
    lost.add(FIRST_SEED[0])
    follow, lines = slurm_sweep._follow, []
    monkeypatch.setattr(slurm_sweep, "_follow", lambda *words: follow(*words) | {"1_1": "CANCELLED"})
    with pytest.raises(UserError, match="1 of 4 children failed"):
        run_on_slurm(sweep, lines)
    assert arrays == [FIRST_SEED]
    assert lines[-1] == "children    2 more are to run: start the sweep again"
    lost.clear()
    monkeypatch.setattr(slurm_sweep, "_follow", follow)
    run_on_slurm(sweep)
    assert arrays[1:] == [[FIRST_SEED[0], "paper.max_lr-0.001.seed-2"], ["sdpa.max_lr-0.01.seed-2"]]
