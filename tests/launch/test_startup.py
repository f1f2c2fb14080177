"""What the command line does not import: the reason that it starts fast. `pldr bench startup` has the seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Prints the modules of sys.argv[1] that are loaded at the end of `pldr`, whatever its exit code.
CODE = """
import atexit, sys
heavy = sys.argv[1].split()
atexit.register(lambda: print("loaded:", *[name for name in heavy if name in sys.modules]))
from launch.cli import main
sys.exit(main(sys.argv[2:]))
"""
HEAVY = ["torch", "mlflow", "deepspeed", "datatrove", "numpy", "pandas", "fsspec", "psutil", "jinja2", "sentencepiece"]


def loaded(heavy, *words, exit_code):
    """Which of these modules a `pldr` command has imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CODE, " ".join(heavy), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == exit_code, done.stderr
    return done.stdout.strip().splitlines()[-1].removeprefix("loaded:").split()


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["launch", "slurm", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(words):
    assert loaded([*HEAVY, "pydantic", "yaml"], *words, exit_code=0) == []


@pytest.mark.parametrize("verb", ["run", "train", "plan", "runs", "doctor", "bench"])
def test_a_wrong_key_is_found_before_anything_heavy_is_imported(repository, verb):
    config = str(repository / "configs" / "quickstart.yaml")
    assert loaded(HEAVY, verb, config, "trian.steps=3", exit_code=2) == []


def test_runs_imports_mlflow_but_not_torch(tmp_path, make_run):
    config = make_run(tmp_path)
    code = "import sys; from pipeline.tracking.client import client; client(sys.argv[1]).create_experiment('pldr')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    subprocess.run([sys.executable, "-c", code, store], check=True, env=environment)
    heavy = ["mlflow", "torch", "deepspeed", "datatrove", "webdataset"]
    assert loaded(heavy, "runs", str(config), exit_code=0) == ["mlflow"]


def test_the_process_that_waits_for_ranks_has_no_torch():
    """It would hold 250 MB for as long as training takes."""
    code = (
        "import sys, pipeline.stages.runner, pipeline.stages.train, launch.backends.deepspeed, launch.commands.going_on\n"
        "print([name for name in ('torch', 'deepspeed') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "[]\n", done.stderr


def test_the_shapes_of_a_model_do_not_import_the_compiler(repository):
    """On the meta device a model's own initialization imports torch._dynamo, which takes as long as torch itself."""
    code = (
        "import sys; from pipeline.bundle.format import state_shapes; from pipeline.config.load import load_config\n"
        "model = load_config(sys.argv[1]).model; shapes = state_shapes(model)\n"
        "assert state_shapes(model.with_constant_g()).keys() < shapes.keys() | {'g_lm'}\n"
        "assert shapes['embedding.weight'] == (model.vocab_size, model.d_model)\n"
        "print([name for name in ('torch._dynamo', 'mlflow', 'deepspeed') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(repository / "configs" / "quickstart.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "[]\n", done.stderr


def test_the_models_configuration_does_not_import_torch():
    code = "import sys, pldr_model.config; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "False\n", done.stderr
