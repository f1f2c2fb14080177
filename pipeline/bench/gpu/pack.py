"""`python -m pipeline.bench.gpu.pack FOLDER`: the wheels that a bare GPU machine without a network lacks for `--what train`.

In: constraints.txt, which has the versions; the package index of this machine. Out: FOLDER with wheels, SHA256SUMS, and
install.sh, which checks the hashes and installs with what lies beside it. DeepSpeed is a source package: its wheel is built
here, without its C++ and CUDA operators (DS_BUILD_OPS=0), which nothing here uses.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.errors import UserError
from pipeline.io.storage import sha256_file

ROOT = Path(__file__).resolve().parents[3]
LIMIT_MB = 64.0  # what a device machine takes, with the checkout

BUILT = ("deepspeed",)  # no wheel in the index
# Of pyproject.toml's dependencies and theirs: what a GPU machine has beside torch and triton, and what it does not.
THERE = (
    *(
        "torch",
        "numpy",
        "sentencepiece",
        "safetensors",
        "pandas",
        "pyarrow",
        "aiohttp",
        "fsspec",
        "psutil",
        "tqdm",
        "regex",
    ),
    *("pyyaml", "jinja2", "einops", "msgpack", "ninja", "py-cpuinfo", "packaging", "protobuf", "requests", "urllib3"),
    *("huggingface-hub", "anyio", "click", "typing-extensions", "annotated-doc"),
)
LEFT_OUT = ("mlflow", "cryptography")  # mlflow-skinny is enough for imports; nothing here signs in to Google
MISSING = (
    *("hjson", "pydantic", "pydantic_core", "annotated-types", "typing-inspection"),
    *("webdataset", "braceexpand", "datatrove", "loguru", "dill", "multiprocess", "orjson", "zstandard", "humanize"),
    *("python-flint", "argcomplete"),  # tests load all of the pipeline
    *("mlflow-skinny", "mlflow-tracing", "cachetools", "databricks-sdk", "google-auth", "pyasn1", "pyasn1_modules"),
    *("GitPython", "gitdb", "smmap", "importlib_metadata", "zipp", "opentelemetry-api", "opentelemetry-proto"),
    *("opentelemetry-sdk", "opentelemetry-semantic-conventions", "python-dotenv", "sqlparse", "cloudpickle"),
    *("fastapi", "starlette", "uvicorn", "h11"),
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")

INSTALL = """\
#!/bin/sh
# Installs the wheels beside this file into TARGET, without a network: sh install.sh TARGET; then PYTHONPATH=TARGET.
set -e
cd "$(dirname "$0")"
sha256sum --quiet --check SHA256SUMS
exec "${PYTHON:-python3}" -m pip install --quiet --no-index --find-links . --no-deps --no-compile --no-cache-dir --upgrade \\
    --target "$1" ./*.whl
"""


def main(words: list[str] | None = None) -> int:
    """Exit code 0 if all wheels are there and small enough."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench.gpu.pack", description=__doc__)
    parser.add_argument("folder", type=Path, help="for the wheels; its wheels are replaced")
    parser.add_argument("--python", default="3.12", help="version of the machine's Python (%(default)s)")
    arguments = parser.parse_args(words)
    try:
        megabytes = pack(arguments.folder, python=arguments.python)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments.folder}: {len(list(arguments.folder.glob('*.whl')))} wheels, {megabytes:.1f} MB")
    return 0


def pack(folder: Path, *, python: str) -> float:
    """Megabytes of wheels. Raises UserError, one line, for a package that cannot be had, or wheels over the limit."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    versions = locked_versions((ROOT / "constraints.txt").read_text())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = [f"{name}=={versions[canonical(name)]}" for name in BUILT]
    without = {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    _run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), *built], without)
    tags = ["--implementation", "cp", "--python-version", python, *(f"--platform={each}" for each in PLATFORMS)]
    chosen = [f"{name}=={versions[canonical(name)]}" for name in MISSING]
    _run([*pip, "download", "--no-deps", "--only-binary=:all:", *tags, "--dest", str(folder), *chosen], {})
    wheels = sorted(folder.glob("*.whl"))
    (folder / "SHA256SUMS").write_text("".join(f"{sha256_file(wheel)}  {wheel.name}\n" for wheel in wheels))
    (folder / "install.sh").write_text(INSTALL)
    megabytes = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    if megabytes > LIMIT_MB:
        raise UserError(
            f"{folder}: {megabytes:.0f} MB of wheels, over the {LIMIT_MB:.0f} MB that a machine takes; pack fewer"
        )
    return megabytes


def locked_versions(constraints: str) -> dict[str, str]:
    """Versions by canonical name."""
    lines = (line.partition("#")[0].strip() for line in constraints.splitlines())
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def canonical(name: str) -> str:
    """A package's name as an index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _run(words: list[str], variables: dict[str, str]) -> None:
    done = subprocess.run(words, env={**os.environ, **variables}, capture_output=True, text=True)
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise UserError(f"pip {words[4]}: {(reason or ['it failed'])[0]}")


if __name__ == "__main__":
    sys.exit(main())
