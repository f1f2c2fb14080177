"""Where a run's MLflow store lies when neither `tracking.uri` nor MLFLOW_TRACKING_URI names one.

Beside the run directory: the runs in one folder share one SQLite file, so that one page of MLflow compares them. In the run
directory where that cannot be: SQLite's locks, and the memory that its WAL shares, hold between the processes of one machine.
A run that MLflow has made stays in its store, whatever these rules would say today; so do the runs of earlier versions, which
all had a store in their run directory.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.errors import UserError
from pipeline.io.mounts import network_file_system, same_disk, writable
from pipeline.io.sealed import read_sealed
from pipeline.tracking.sqlite_store import OWN, RUN_FILE, file_of, holds_run, uri_of

VARIABLE = "MLFLOW_TRACKING_URI"
FREE = ("tracking_uri",)  # of run.json, may be edited: a store that has not got the run is refused
RUN_DIR_TAG = "pldr.run_dir"
log = logging.getLogger(__name__)
WAY_OUT = "to compare runs in one place, set tracking.uri (or MLFLOW_TRACKING_URI) to an MLflow server"


def default_uri(root: Path) -> str:
    """The URI of the store of a run directory that names none."""
    if (begun := _begun(root)) is not None:
        return _store_of_run(root, *begun)
    own = root / OWN
    return uri_of(own if own.exists() or why_inside(root) else _beside(root))


def job_uri(root: Path, uri: str, run_dir: Path) -> str:
    """The URI of the store that a job in a run directory names, which was `run_dir` then."""
    if (begun := _begun(root)) is not None:
        return _store_of_run(root, *begun)
    now = None if (then := file_of(uri)) is None else _moved_along(then, run_dir, root)
    return uri if now is None or not now.exists() else uri_of(now)


def stores_of(folder: Path) -> list[str]:
    """The URIs of the stores in a folder of runs: the shared one first, then those of sweeps and of earlier versions' runs,
    which are in the folders below."""
    found = [file for pattern in (OWN, f"*/{OWN}", f"*/*/{OWN}") for file in sorted(folder.glob(pattern))]
    return [uri_of(file.absolute()) for file in found]


def why_inside(root: Path) -> str | None:
    """Why the store of a new run lies in its run directory; None: it lies beside it."""
    file = _beside(root)
    folder = file.parent
    if folder == folder.parent:
        return "run_dir lies in /"
    if Path.cwd().is_relative_to(os.path.normpath(root)):
        return "run_dir is the working directory"
    if kind := network_file_system(folder):
        return f"{folder} is on a network file system ({kind}), where SQLite's locks do not hold"
    if not same_disk(root, folder):
        return f"run_dir is on another disk than {folder}"
    if not writable(folder) or (file.exists() and not writable(file)):
        return f"{file} is not writable for this user"
    return None


def for_several_nodes(config: RunConfig, nodes: int) -> RunConfig:
    """The configuration of a launch on so many nodes. Without a server a new run's store lies in its run directory, which all
    nodes see: rank 0 may be on another machine than the next command."""
    if nodes == 1 or (inside := for_children_at_once(config)) is config:
        return config
    report_inside(RunPaths(config.run_dir).root, f"the launch is on {nodes} nodes")
    return inside


def for_children_at_once(config: RunConfig) -> RunConfig:
    """The configuration of a sweep's own run whose children run at once, here or on any nodes (`of_its_own`). A new run's store
    lies in its run directory, unless one is named."""
    root = RunPaths(config.run_dir).root
    if config.tracking.uri or os.environ.get(VARIABLE) or _begun(root) is not None:
        return config
    tracking = config.tracking.model_copy(update={"uri": uri_of(root / OWN)})
    return config.model_copy(update={"tracking": tracking})


def of_its_own(config: RunConfig) -> RunConfig:
    """The configuration of a run that is one of several at once, on any nodes: a server takes them all. Without one a new run's
    store lies in its run directory: a SQLite file has one writer."""
    root, uri = RunPaths(config.run_dir).root, config.tracking.uri
    if uri and file_of(uri) is None:
        return config
    tracking = config.tracking.model_copy(update={"uri": default_uri(root) if _begun(root) else uri_of(root / OWN)})
    return config.model_copy(update={"tracking": tracking})


def report_inside(root: Path, reason: str) -> None:
    """A warning that a new run's store lies in its run directory."""
    log.warning("MLflow's store is %s, in the run directory: %s; %s", root / OWN, reason, WAY_OUT)


def _beside(root: Path) -> Path:
    return Path(os.path.normpath(root)).parent / OWN


def _begun(root: Path) -> tuple[str, str, Path] | None:
    """Store, id and run directory of the run in run.json, as they were then. None where MLflow has not made it, or the file
    is damaged."""
    try:
        record = read_sealed(root / RUN_FILE, free=FREE)
        run_id, home = record["run_id"], record["tags"].get(RUN_DIR_TAG) or root
        return None if run_id is None else (str(record["tracking_uri"]), str(run_id), Path(home))
    except (OSError, UserError, KeyError, AttributeError, TypeError):
        return None


def _store_of_run(root: Path, uri: str, run_id: str, home: Path) -> str:
    """Where a run's store is now: where run.json says, or, when it was moved or copied along, where it lies now as it did."""
    then = file_of(uri)
    if then is None or (now := _moved_along(then, home, root)) == then:
        return uri
    for file in (now, root / OWN):
        if holds_run(uri_of(file), run_id):
            return uri_of(file)
    was_ours = then in (home / OWN, _beside(home))
    return uri_of(now) if was_ours and not then.exists() else uri


def _moved_along(file: Path, home: Path, root: Path) -> Path:
    """What lies to `root` as a file did to `home`: a sweep's store, for one, lies above its children."""
    return Path(os.path.normpath(root / os.path.relpath(file, home)))
