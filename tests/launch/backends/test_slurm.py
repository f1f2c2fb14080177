"""launch/backends/slurm.py: what is checked before Slurm gets a job, what is said after, and when the batch script requeues
itself. With a real Slurm: test_real_slurm.py."""

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch.backends import slurm
from launch.backends.scheduled import ScheduledJob
from launch.backends.slurm import SlurmOptions
from launch.cli import main
from pipeline.config.load import load_config
from pipeline.config.paths import RunPaths
from pipeline.errors import ConfigError
from tests.helpers.slurm_commands import NO_ANSWER, NO_GPUS, install

SIZES = ("--nodes", "1", "--ranks-per-node", "1", "--gpus-per-node", "0")


@pytest.fixture
def run(tmp_path, make_run, monkeypatch):
    """A YAML whose run directory holds folders named as checkpoints."""
    config = make_run(tmp_path)
    (tmp_path / "run" / "checkpoints" / "step-000100").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return str(config)


@pytest.mark.parametrize(
    ("cwd", "given"),
    [
        (".", "run/checkpoints/step-000100"),
        ("run/checkpoints", "./step-000100"),
        ("run/checkpoints", "step-000100"),
        ("run", "../run/checkpoints/step-000100/"),
    ],
    ids=["relative", "inside", "bare", "up"],
)
def test_slurm_would_go_back_at_every_start(run, capsys, cwd, given):
    with contextlib.chdir(cwd):
        assert main(["launch", "slurm", run, *SIZES, "--resume", given, "--dry-run"]) == 2
    assert f"--resume {given}: would go back to it at every start" in capsys.readouterr().err


def script_of(config: str, *, time: str | None = None) -> str:
    job = ScheduledJob(
        nodes=2, ranks_per_node=1, gpus_per_node=0, cpus_per_rank=1, resume="auto", force=False, template=None
    )
    settings = load_config(config)
    return slurm.render(settings, RunPaths(settings.run_dir), job, SlurmOptions(time=time), [config])


# Stand-ins: srun ends with CODE, or commits what SAVES says and ends with 75; EARLY, it does not listen yet.
SRUN = """case "$*" in *--overlap*) exit $SILENT ;; esac
[ -n "$EARLY" ] || trap '[ -z "$SAVES" ] || { mkdir -p "$SAVES"; touch "$SAVES/COMMITTED"; }; exit 75' USR1 TERM
touch listening
for _ in $(seq $TENTHS); do sleep 0.1; done
exit $CODE
"""
SCONTROL = """case $1-$2 in
show-hostnames) echo n1; echo n2 ;;
show-job) echo "JobId=7 JobState=RUNNING Restarts=$RESTARTS PreemptEligibleTime=2026-11-28T09:30:20 PreemptTime=$PREEMPTED" ;;
*) echo "$@" >> scontrol.log; exit $REFUSES ;;
esac
"""
SQUEUE = """case "$*" in
*%L*) echo "$LEFT" ;;
*) cat running 2>/dev/null ;;
esac
"""
USR1, TERM = signal.SIGUSR1, signal.SIGTERM


class Batch:
    """The batch script, running with stand-ins in the working directory."""

    def __init__(self, config: str, *, saves=True, early=False, **facts):
        install(Path("bin"), srun=SRUN, scontrol=SCONTROL, squeue=SQUEUE)
        script = script_of(config).replace("export PATH=", f"export PATH={Path.cwd()}/bin:")
        usual = {
            "left": "2:30",
            "preempted": "None",
            "restarts": 2,
            "refuses": 0,
            "code": 0,
            "tenths": 100,
            "silent": 0,
        }
        environment = {
            **os.environ,
            **{name.upper(): str(value) for name, value in (usual | facts).items()},
            "SAVES": str(Path.cwd() / "run" / "checkpoints" / "step-1000000") if saves else "",
            "EARLY": "1" if early else "",
            "PATH": f"{Path.cwd()}/bin:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
        }
        self.job = subprocess.Popen(
            ["bash", "-c", script], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def wait_for_the_step(self):
        end = time.monotonic() + 60
        while not Path("listening").exists():
            assert time.monotonic() < end
            time.sleep(0.02)

    def end(self) -> tuple[int, str, bool]:
        """Exit code, output, and whether it was requeued."""
        out, _ = self.job.communicate(timeout=60)
        log = Path("scontrol.log")
        assert not log.exists() or log.read_text() == "requeue 7\n"
        return self.job.returncode, out, log.exists()


@pytest.mark.parametrize(
    ("sent", "facts", "ended", "requeued", "message"),
    [
        (USR1, {}, 75, True, "the time was up: saved, requeued"),
        (USR1, {"saves": False}, 75, False, "not requeued, because that would repeat forever; raise --time"),
        (USR1, {"refuses": 1}, 75, True, "could not requeue it, to go on: sbatch "),
        (USR1, {"left": "1-02:00:00"}, 75, True, "stopped by SIGUSR1: saved, requeued"),
        (USR1, {"left": "UNLIMITED"}, 75, True, "stopped by SIGUSR1: saved, requeued"),
        (
            USR1,
            {"left": "23:00:00", "saves": False},
            75,
            False,
            "stopped by SIGUSR1 before a checkpoint was committed: not re",
        ),
        (USR1, {"early": True, "saves": False}, 75, False, "the time was up before a checkpoint was committed"),
        (TERM, {"preempted": "2026-11-28T09:33:37"}, 75, True, "preempted: saved, requeued"),
        (
            TERM,
            {"preempted": "2026-11-28T09:33:37", "early": True, "saves": False},
            75,
            True,
            "preempted: saved, requeued",
        ),
        (TERM, {"restarts": 3}, 75, False, "Slurm requeued it"),
        (TERM, {}, 75, False, "stopped by a signal: not requeued"),
        (None, {"tenths": 2}, 0, False, ""),
        (None, {"tenths": 2, "code": 2}, 2, False, ""),
        (None, {"tenths": 2, "code": 1}, 1, False, ""),
        (None, {"tenths": 2, "code": 1, "silent": 1}, 75, True, "a node does not answer: not saved, requeued"),
        (None, {"tenths": 2, "code": 2, "silent": 1}, 2, False, ""),
        (None, {"tenths": 2, "code": 75}, 75, False, "stopped by a signal: not requeued"),
    ],
)
def test_why_the_batch_script_stopped_and_whether_it_requeues_itself(
    run, tmp_path, sent, facts, ended, requeued, message
):
    (tmp_path / "run" / "checkpoints" / "step-000100" / "COMMITTED").touch()
    batch = Batch(run, **facts)
    if sent:
        batch.wait_for_the_step()
        batch.job.send_signal(sent)
    code, out, again = batch.end()
    assert (code, again) == (ended, requeued) and message in out, out


@pytest.mark.parametrize(
    ("running", "goes_on"),
    [
        ("2026-11-28T09:00:00 9 pldr-x-MARK\n2026-11-28T09:30:00 7 pldr-x-MARK", False),
        ("2026-11-28T09:00:00 9 pldr-x-other\n2026-11-28T09:30:00 7 pldr-x-MARK", True),
        ("2026-11-28T09:30:00 9 pldr-x-MARK\n2026-11-28T09:30:00 7 pldr-x-MARK", True),
        ("2026-11-28T09:30:00 10 pldr-x-MARK\n2026-11-28T09:30:00 7 pldr-x-MARK", True),
    ],
    ids=["another started earlier", "of another run", "at once", "at once, by number"],
)
def test_a_second_job_of_a_run_ends_when_it_starts(run, tmp_path, running, goes_on):
    mark = slurm.mark_of(RunPaths(tmp_path / "run"))
    Path("running").write_text(running.replace("MARK", mark) + "\n")
    code, out, _ = Batch(run, tenths=2).end()
    assert code == (0 if goes_on else 1)
    assert ("Slurm job 9 trains this run already: job 7 ends" in out) is not goes_on


@pytest.fixture
def launch(run, tmp_path, monkeypatch, capsys):
    """`launch(squeue=…, …)` with stand-ins for Slurm's commands; exit code and all output. Nothing is checked of the tokens."""
    monkeypatch.setattr(slurm, "check_training", lambda *words, **options: None)
    monkeypatch.setattr(slurm, "POLL_S", 0.01)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")

    def launch(*words, **commands):
        install(tmp_path / "bin", **{"sbatch": "echo 12", "squeue": "", "scancel": "echo $@ > canceled", **commands})
        code = main(["launch", "slurm", run, *SIZES, *words])
        said = capsys.readouterr()
        return code, said.out + said.err

    return launch


def queued(state: str, reason: str, *, job="12", name="pldr-x") -> str:
    return f"echo '{job}|{job}|{state}|{reason}|{name}'"


@pytest.mark.parametrize(
    ("state", "reason", "said"),
    [
        ("RUNNING", "None", "state       RUNNING"),
        ("PENDING", "Priority", "state       waits (Priority); watch: squeue --jobs=12"),
        ("PENDING", "JobHeldUser", "scontrol release 12"),
    ],
)
def test_a_submitted_job_is_told_with_its_state(launch, state, reason, said):
    code, out = launch(squeue=f"[ -f submitted ] && {queued(state, reason)}", sbatch="touch submitted; echo 12")
    assert code == 0 and "submitted   Slurm job 12" in out and said in out, out
    assert not Path("canceled").exists()


def test_a_job_that_can_never_start_is_canceled(launch):
    waits = f"[ -f submitted ] && {queued('PENDING', 'PartitionTimeLimit')}"
    code, out = launch("--time", "9:00:00", squeue=waits, sbatch="touch submitted; echo 12")
    assert code == 1 and "can never start (PartitionTimeLimit) and was canceled; lower --time (now 9:00:00)" in out, out
    assert Path("canceled").read_text() == "12\n"


@pytest.mark.parametrize("how", ["by name", "by number"])
def test_a_run_that_a_job_trains_is_not_submitted_again(launch, tmp_path, how):
    if how == "by number":
        assert launch()[0] == 0
    name = "x-" + slurm.mark_of(RunPaths(tmp_path / "run")) if how == "by name" else "x"
    code, out = launch(squeue=queued("PENDING", "Priority", name=name), sbatch="touch submitted; echo 13")
    assert code == 1 and "Slurm job 12 of this run waits (Priority); wait for it, or scancel 12" in out, out
    assert not Path("submitted").exists()
    code, _ = launch(squeue=queued("COMPLETED", "None", name=name), sbatch="echo 13")
    assert code == 0


def test_a_refused_job_leaves_the_script_of_the_job_before(launch, tmp_path):
    script = tmp_path / "run" / "logs" / "train.sbatch"
    assert launch("--time", "1:00:00")[0] == 0 and "--time=1:00:00" in script.read_text()
    code, out = launch("--time", "2:00:00", sbatch=NO_GPUS)
    assert code == 1 and "Invalid generic resource (gres) specification); change --gpus-per-node (now 0; " in out, out
    assert "--time=1:00:00" in script.read_text()


def test_a_controller_that_does_not_answer_is_not_a_missing_job(launch):
    code, out = launch(squeue=NO_ANSWER)
    assert (
        code == 0 and "queue       not looked at: squeue failed" in out and "state       unknown: squeue failed" in out
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("5:30", 330), ("1:00:00", 3600), ("2-0", 172800), ("1-1:30", 91800), ("1-00:00:01", 86401)],
)
def test_slurms_time_limits(text, seconds):
    assert slurm.seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("time", "message"),
    [("5", "give more than 300 s"), ("00:03:00", "leaves no time to train"), ("tomorrow", "write Slurm's form")],
)
def test_a_limit_that_the_signal_comes_before_is_refused(run, time, message):
    with pytest.raises(ConfigError, match=message):
        script_of(run, time=time)
    assert "--time=6" in script_of(run, time="6") and "--time=0" in script_of(run, time="0")


@pytest.mark.parametrize(
    ("asked", "lines"),
    [
        ([], ["gpus-per-node=4"]),
        (["gres=gpu:a100:4"], ["gres=gpu:a100:4"]),
        (["gres=craynetwork:1,gpu:4"], ["gres=craynetwork:1,gpu:4"]),
        (["gpus-per-node=a100:4"], ["gpus-per-node=a100:4"]),
        (["gres=nvme:1"], ["gpus-per-node=4", "gres=nvme:1"]),
    ],
)
def test_gpus_are_asked_for_once(run, asked, lines):
    job = ScheduledJob(
        nodes=2, ranks_per_node=4, gpus_per_node=4, cpus_per_rank=1, resume="auto", force=False, template=None
    )
    settings = load_config(run)
    script = slurm.render(settings, RunPaths(settings.run_dir), job, SlurmOptions(sbatch=asked), [run])
    assert [
        line.removeprefix("#SBATCH --") for line in script.splitlines() if re.match("#SBATCH --(gpus|gres)", line)
    ] == lines
