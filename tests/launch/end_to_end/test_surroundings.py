"""A whole run where a shell or a container is odd: another job's variables, modules of the user, no PATH, no home, no user."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = (
    "import sys\n\nfrom launch.cli import main\n\nif __name__ == '__main__':\n    sys.exit(main())\n"  # as pip makes it
)
ODD = {
    "PATH": "",
    "OMP_NUM_THREADS": "",
    "LC_ALL": "C",
    "PYTHONIOENCODING": "ascii",
    "PYTHONWARNINGS": "error",
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "3",
    "MASTER_ADDR": "192.0.2.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "PET_NNODES": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "SLURM_PROCID": "1",
    "CROSS_SIZE": "2",
    "MLFLOW_RUN_ID": "0" * 32,
    "MLFLOW_EXPERIMENT_ID": "77",
    "MLFLOW_REGISTRY_URI": "http://192.0.2.1:5000",
    "http_proxy": "http://192.0.2.1:3128",
}


def as_unknown_user() -> list[str]:
    unshare = shutil.which("unshare")
    words = [str(unshare), "-U", "--map-user=54321", "--map-group=54321"]
    if unshare is None or subprocess.run([*words, "/bin/true"], capture_output=True).returncode:
        pytest.skip("unshare -U is not possible here")
    return words


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_whole_run_in_odd_surroundings(tmp_path, make_run):
    unknown_user = as_unknown_user()
    config = make_run(tmp_path)
    for name in ("pipeline", "launch", "random", "logging", "tempfile", "torch", "mlflow", "deepspeed", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the working directory')\n")
    script = tmp_path / "bin" / "pldr"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    command = [*unknown_user, sys.executable, str(script), "run", str(config)]
    environment = {**ODD, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout[-3000:]
    assert "certificate: CERTIFIED" in done.stdout and "working directory" not in done.stderr
    assert (tmp_path / "run" / "bundle").is_dir()
