"""What a process of ours takes from the shell that started it, and what its children get.

A shell may be inside another job: of torchrun, MPI, Slurm or DeepSpeed. Their variables would send our ranks to that job's
rendezvous, so ranks get none of them. What storage, MLflow, NCCL, gloo, CUDA and Python itself read stays.
"""

from __future__ import annotations

import logging
import os
import pwd
import re
import sys
import warnings
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, cast

OTHER_JOBS = re.compile(
    # torchrun; PET_ gives its options
    r"RANK|LOCAL_RANK|NODE_RANK|GROUP_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_WORLD_SIZE|ROLE_(RANK|WORLD_SIZE|NAME)"
    r"|MASTER_(ADDR|PORT)|(TORCHELASTIC|TORCH_ELASTIC|PET)_\w+"
    # DeepSpeed, and the clouds in which it asks MPI for the ranks
    r"|CROSS_(RANK|SIZE)|LOCAL_SIZE|DS_ENV_FILE|DLTS_\w+|AZUREML_EXPERIMENT_ID|SM_TRAINING_ENV"
    # MPI, Slurm
    r"|(OMPI|ORTE|PRTE|PMI|PMI2|PMIX|HYDI|MV2_COMM_WORLD|PALS|SLURM|SLURMD)_\w+|MPI_LOCAL\w+"
    # a run that another process logs to
    r"|MLFLOW_RUN_ID"
)
ENVIRONMENT_FILE = "PLDR_ENVIRONMENT_FILE"  # names a JSON file of variables that must not appear in a command line
VISIBLE_DEVICES = "PLDR_VISIBLE_DEVICES"  # the CUDA_VISIBLE_DEVICES that the launching process has
LOCAL = ("127.0.0.1", "localhost", "::1")
log = logging.getLogger(__name__)


def without_other_jobs(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables for processes of a job of ours: without those that another job has left."""
    return {name: value for name, value in environment.items() if not OTHER_JOBS.fullmatch(name)}


def prepare(environment: MutableMapping[str, str]) -> None:
    """Set what this process and all its children need. Call it before torch is imported."""
    # Threads that wait for one another sleep instead of spinning. On two cores kept busy by others spinning made the
    # validate stage take 18 s instead of 9 (2026-11-24).
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.pop("PYTHONINSPECT", None)  # a process would not end, but wait at Python's prompt
    _user(environment)
    _warnings(environment)
    _search_path(environment)
    _threads(environment)
    _proxies(environment)


def omp_threads(environment: Mapping[str, str]) -> int | None:
    """The threads of OMP_NUM_THREADS, of which a list gives those of each nested level; None: not set, or not such a number."""
    value = environment.get("OMP_NUM_THREADS", "").strip()
    return int(value.partition(",")[0]) if re.fullmatch(r"\+?0*[1-9]\d*(\s*,\s*\d+)*", value) else None


def _search_path(environment: MutableMapping[str, str]) -> None:
    """Children find modules where this process does, and not in the working directory, which may have a module `pipeline`
    or `random` of the user. An empty entry of PYTHONPATH means that directory, and is an accident of `$PYTHONPATH:/x`."""
    given = environment["PYTHONPATH"].split(os.pathsep) if environment.get("PYTHONPATH") else []
    entries = [os.path.abspath(entry) for entry in given if entry]
    if "" in given and (here := os.getcwd()) not in entries:
        sys.path[1:] = [entry for entry in sys.path[1:] if entry != here]
    root = str(Path(__file__).parents[1])
    # `python -m launch.cli` in a checkout
    if sys.path[0] == root and root not in (*sys.path[1:], *entries):
        entries.append(root)
    environment["PYTHONSAFEPATH"] = "1"
    if entries:
        environment["PYTHONPATH"] = os.pathsep.join(entries)
    else:
        environment.pop("PYTHONPATH", None)


def search_path() -> dict[str, str]:
    """For processes that do not inherit the environment: where they find modules, as `prepare` has set it here."""
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}


def _user(environment: MutableMapping[str, str]) -> None:
    """Libraries ask for the user's name and home, which a user id of a container may not have. Docker, too, says `/` then."""
    try:
        known = pwd.getpwuid(os.getuid())
        name, home = known.pw_name, known.pw_dir
    except KeyError:
        name, home = f"uid-{os.getuid()}", "/"
    if not environment.get("HOME"):
        environment["HOME"] = home
    if not any(environment.get(variable) for variable in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        environment["USER"] = name


def _warnings(environment: MutableMapping[str, str]) -> None:
    """Libraries warn. As an error, a warning would end their work half done."""
    options = environment.get("PYTHONWARNINGS", "").split(",")
    if any(option.strip().startswith("error") for option in options):
        log.warning("PYTHONWARNINGS=%s is ignored: libraries that pldr uses warn", environment.pop("PYTHONWARNINGS"))
        sys.warnoptions[:] = [option for option in sys.warnoptions if not option.startswith("error")]
        cast("list[Any]", warnings.filters)[:] = [each for each in warnings.filters if each[0] != "error"]


def _threads(environment: MutableMapping[str, str]) -> None:
    """OpenMP ignores a value that is not a number of threads; so do we, everywhere."""
    value = environment.get("OMP_NUM_THREADS")
    if value is not None and omp_threads(environment) is None:
        if value.strip():
            log.warning("OMP_NUM_THREADS=%s is ignored: not a number of threads", value)
        del environment["OMP_NUM_THREADS"]


def _proxies(environment: MutableMapping[str, str]) -> None:
    """A server on this machine is not asked through a proxy, which would look for it on its own machine."""
    if not any(environment.get(name) for kind in ("http", "https", "all") for name in _both(f"{kind}_proxy")):
        return
    given = next((environment[name] for name in _both("no_proxy") if environment.get(name)), "")
    hosts = [host.strip() for host in given.split(",") if host.strip()]
    if "*" not in hosts:
        hosts += [host for host in LOCAL if host not in hosts]
    for name in _both("no_proxy"):  # programs differ in which of the two they read
        environment[name] = ",".join(hosts)


def _both(name: str) -> tuple[str, str]:
    return name, name.upper()
