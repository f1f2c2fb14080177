"""pipeline/environment.py: what is taken from the shell, and what children get."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from requests.utils import should_bypass_proxies

from pipeline import environment as module
from pipeline.environment import omp_threads, prepare, without_other_jobs

ROOT = Path(__file__).resolve().parents[2]
DROPPED = """
RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_NAME NODE_RANK MASTER_ADDR MASTER_PORT
TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_RUN_ID PET_NNODES OMPI_COMM_WORLD_RANK PMI_RANK PMIX_RANK MPI_LOCALRANKID
SLURM_PROCID SLURM_JOB_ID SLURMD_NODENAME CROSS_RANK CROSS_SIZE LOCAL_SIZE DS_ENV_FILE DLTS_HOSTFILE AZUREML_EXPERIMENT_ID
MLFLOW_RUN_ID
"""
KEPT = """
NCCL_DEBUG GLOO_SOCKET_IFNAME UCX_TLS AWS_ACCESS_KEY_ID MLFLOW_TRACKING_TOKEN http_proxy LD_LIBRARY_PATH TMPDIR PATH HOME
CUDA_VISIBLE_DEVICES CUDA_HOME HF_HOME DS_ACCELERATOR DEEPSPEED_TIMEOUT TORCH_DISTRIBUTED_DEBUG TORCH_NCCL_BLOCKING_WAIT
OMP_NUM_THREADS MKL_NUM_THREADS PYTHONPATH PLDR_RETRIES RANKING MY_RANK MASTER_ADDRESS
"""
CODE = """
import os, sys
if __name__ == "__main__":
    sys.path[0] = {root!r}
    import launch
    import multiprocessing, subprocess
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.errors", "random"])
    process = context.Process(target=os.getpid)
    process.start()
    process.join()
    assert process.exitcode == 0
    subprocess.run([sys.executable, "-m", "pipeline.errors"], check=True)
    subprocess.run([sys.executable, "-c", "import random, pipeline, launch, tempfile"], check=True)
"""


def prepared(**given):
    prepare(given)
    return given


def test_variables_of_other_jobs_are_dropped_and_those_that_libraries_read_stay():
    dropped = dict.fromkeys(DROPPED.split(), "1")
    kept = dict.fromkeys(KEPT.split(), "1")
    assert without_other_jobs(dropped | kept) == kept


@pytest.mark.parametrize(
    ("value", "threads", "kept"),
    [("4", 4, True), ("4,2", 4, True), (" 3 ", 3, True), ("", None, False), ("abc", None, False), ("0", None, False),
     ("-2", None, False), ("2.5", None, False), ("2,", None, False)],
)  # fmt: skip
def test_a_number_of_threads_that_openmp_would_ignore_is_removed(value, threads, kept):
    assert omp_threads({"OMP_NUM_THREADS": value}) == threads
    assert ("OMP_NUM_THREADS" in prepared(OMP_NUM_THREADS=value)) == kept


@pytest.mark.parametrize(
    ("given", "no_proxy"),
    [
        ({}, None),
        ({"http_proxy": "http://p:1"}, "127.0.0.1,localhost,::1"),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "x.org, localhost"}, "x.org,localhost,127.0.0.1,::1"),
        ({"all_proxy": "http://p:1", "no_proxy": "*"}, "*"),
    ],
)
def test_this_machine_is_never_asked_through_a_proxy(given, no_proxy):
    environment = prepared(**given)
    assert environment.get("no_proxy") == environment.get("NO_PROXY") == no_proxy
    if no_proxy:
        assert all(should_bypass_proxies(f"http://{host}:5000/x", no_proxy) for host in ("127.0.0.1", "localhost"))


def test_an_empty_entry_of_the_search_path_is_dropped_and_the_others_stay(monkeypatch):
    monkeypatch.setattr(sys, "path", ["/bin", str(ROOT), *sys.path])
    assert prepared(PYTHONPATH=f":/x::lib{os.pathsep}")["PYTHONPATH"] == f"/x:{os.getcwd()}/lib"
    assert "PYTHONPATH" not in prepared(PYTHONPATH="")
    assert prepared()["PYTHONSAFEPATH"] == "1"


def test_modules_of_the_working_directory_are_not_imported_by_processes_that_pldr_starts(tmp_path):
    """A fork server, its resource tracker and `python -m`, from a folder with modules of these names. The checkout is found
    without PYTHONPATH, as for `python -m launch.cli` in one that is not installed."""
    for name in ("random", "pipeline", "launch", "torch", "tempfile"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the working directory')\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    script = tmp_path / "elsewhere" / "start.py"
    script.parent.mkdir()
    script.write_text(CODE.format(root=str(ROOT)))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "working directory" not in done.stderr


def test_warnings_of_libraries_are_not_errors():
    code = "import launch, warnings; warnings.warn('old', DeprecationWarning)"
    for flag in ("error", "error::DeprecationWarning"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": flag}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and f"PYTHONWARNINGS={flag} is ignored" in done.stderr


def test_a_user_that_the_system_does_not_know_gets_a_name_and_a_home(monkeypatch):
    known = prepared()
    assert known["HOME"] == pwd.getpwuid(os.getuid()).pw_dir and known["USER"] == pwd.getpwuid(os.getuid()).pw_name
    monkeypatch.setattr(module.os, "getuid", lambda: 54321)
    assert (prepared()["HOME"], prepared(HOME="")["USER"]) == ("/", "uid-54321")
    given = prepared(HOME="/x", LOGNAME="ann")
    assert given["HOME"] == "/x" and "USER" not in given
