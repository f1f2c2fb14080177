"""Publishing committed checkpoints beside training, and getting them back.

Rank 0 hands over after each save and goes on at once; one thread uploads. So there is never more than one publication under
way: that of a second save waits for the first in this thread, not in the training loop, and when several are waiting only
what is still kept is uploaded. Retention is done here too, because the checkpoint that is being uploaded must stay until
it is: in a second thread, because an upload may take long and the disk must not fill meanwhile.

What is published follows the run's retention policy over everything that is there and here: a machine that has only the
newest checkpoints does not remove what other machines published and what stays for ever.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.checkpoint.format import COMMITTED, STATE, checkpoint_name, committed, step_of, verify
from pipeline.checkpoint.retention import Policy, local_losses, loss_in, policy_of, retain
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.errors import UserError, first_line
from pipeline.io import storage
from pipeline.tracking.client import client, is_away, mend_for, tracking_uri
from pipeline.tracking.metrics import Tracker
from pipeline.tracking.run_record import LOCAL_PREFIX, PLACE_TAG, RunRecord, place_url, record_of
from pipeline.tracking.stores import MlflowPlace, Place, UrlPlace, names_in, place_at

log = logging.getLogger(__name__)
CHECKPOINTS_TAG = "pldr.checkpoints"
LONGEST_WAIT_S = 30.0  # between attempts
MEET_S = 5.0  # how long the first attempt waits until MLflow was asked for the run
CLOSING_ATTEMPTS = 3  # once training has ended
LOOK_S, STOPPING_S = 0.2, 5.0  # how often the end looks for a wish to stop, and what it still waits then


class Publisher:
    """The thread of rank 0 that publishes.

    folder: the run's `checkpoints/`. place: where to, None as long as MLflow has not made the run; called at each attempt.
    told: gets the names of all published checkpoints after each publication; what it raises is tried again too.
    """

    def __init__(
        self, folder: Path, policy: Policy, place: Callable[[], Place | None], told: Callable[[list[str]], None]
    ) -> None:
        self._folder, self._policy, self._find_place, self._told = folder, policy, place, told
        self._change = threading.Condition()
        there = committed(folder)
        self._step = step_of(there[-1]) if there else 0  # how far the run is
        self._asked = 1 if there else 0  # what an earlier start left unpublished
        self._done = 0
        self._pruned = self._asked
        self._closing = False
        self._files = threading.Lock()  # nothing is removed while it is being decided that it is uploaded
        self._busy: str | None = None
        self._known: dict[str, tuple[str, float | None]] = {}  # published: its COMMITTED and loss
        self._thread = threading.Thread(target=self._publish_forever, name="publisher", daemon=True)
        self._thread.start()
        self._pruner = threading.Thread(target=self._prune_forever, name="retention", daemon=True)
        self._pruner.start()

    def saved(self, step: int) -> None:
        """A checkpoint of this step was committed: what is no longer kept is removed, and what is gets published, beside."""
        with self._change:
            self._step = step
            self._asked += 1
            self._change.notify_all()

    def close(self, wait_s: float, *, stop: Callable[[], bool] | None = None) -> list[str]:
        """Wait for the last publication, `wait_s` at most and a few attempts; the names that are still not published.

        stop: asked all the while whether somebody wants the process to end; then STOPPING_S is what is left to wait.
        """
        with self._change:
            self._closing = True
            self._change.notify_all()
        end = time.monotonic() + wait_s
        while self._thread.is_alive() and (left := end - time.monotonic()) > 0:
            self._thread.join(min(left, LOOK_S))
            if stop is not None and stop():
                end, stop = min(end, time.monotonic() + STOPPING_S), None
        missing = [] if self._done == self._asked else self._missing()
        if missing:
            log.warning(
                "%s not published; kept in %s, `pldr track replay` publishes what is missing",
                ", ".join(missing),
                self._folder,
            )
        self._prune()  # what was being uploaded too, when it is not any more
        return missing

    def _prune(self) -> None:
        with self._files:
            retain(self._folder, self._policy, now=self._step, busy={self._busy} if self._busy else ())

    def _prune_forever(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._asked > self._pruned or self._closing)
                if self._closing:  # `close` does it
                    return
                asked = self._asked
            self._prune()
            self._pruned = asked

    def _missing(self) -> list[str]:
        kept = self._policy.keep(local_losses(self._folder), self._step)
        names = [checkpoint_name(step) for step in sorted(kept) if step <= self._step]
        return [name for name in names if name not in self._known]

    def _publish_forever(self) -> None:
        failures, warned = 0, False
        while True:
            with self._change:
                self._change.wait_for(lambda: self._asked > self._done or self._closing)
                if self._asked == self._done:
                    return
                asked = self._asked
            try:
                self.publish()
            except Exception as error:  # an outage must not end a run: the local checkpoints are committed
                failures += 1
                if not warned:
                    log.warning("publishing checkpoints is tried again: %s", first_line(error))
                warned = True
                with self._change:
                    if self._closing and failures >= CLOSING_ATTEMPTS:
                        return
                    self._change.wait(min(2.0 ** (failures - 1), LONGEST_WAIT_S if not self._closing else 2.0))
                continue
            failures, warned, self._done = 0, False, asked

    def publish(self) -> None:
        """Make the place hold what the policy keeps. Safe to repeat; raises what the store raises."""
        place = self._find_place()
        if place is None:
            raise UserError("MLflow has not made the run yet")
        listing = place.listing()
        losses, local = self._look(place, listing), local_losses(self._folder)
        keep = self._policy.keep({**losses, **local}, self._step)
        for step in sorted(keep & local.keys(), reverse=True):  # the newest is needed first
            if step <= self._step:
                self._upload(place, self._folder / checkpoint_name(step))
        outdated = {checkpoint_name(step) for step in losses.keys() - keep}
        unfinished = {name for name, is_committed in listing.items() if not is_committed and name not in self._known}
        for name in sorted(outdated | unfinished):
            place.remove(name)
            self._known.pop(name, None)
        self._told(sorted(self._known))

    def _look(self, place: Place, listing: dict[str, bool]) -> dict[int, float | None]:
        """Step -> loss of what is published. What was seen before is not read again."""
        names = [name for name, is_committed in listing.items() if is_committed]
        self._known = {name: self._known[name] if name in self._known else _facts(place, name) for name in names}
        return {step_of(Path(name)): loss for name, (_, loss) in self._known.items()}

    def _upload(self, place: Place, checkpoint: Path) -> None:
        with self._files:  # from here on retention leaves it alone
            if not (checkpoint / COMMITTED).is_file():
                return
            self._busy = checkpoint.name
        try:
            seal = (checkpoint / COMMITTED).read_text()
            published = self._known.get(checkpoint.name)
            if published is not None and published[0] == seal:
                return
            try:
                state = verify(checkpoint)
            except UserError as error:
                log.warning("%s is damaged and not published: %s", checkpoint.name, error)
                return
            # A cut upload, or the run went back and came here another way: nothing of that may stay among our files.
            place.remove(checkpoint.name)
            place.upload(checkpoint)
            self._known[checkpoint.name] = (seal, loss_in(state))
        finally:
            self._busy = None


def _facts(place: Place, name: str) -> tuple[str, float | None]:
    seal = place.read(name, COMMITTED).decode("utf-8", "replace")
    try:
        return seal, loss_in(json.loads(place.read(name, STATE)))
    except (ValueError, FileNotFoundError):
        return seal, None


def open_publisher(config: RunConfig, tracker: Tracker) -> Publisher:
    """The publisher of a run that logs through `tracker`."""
    url = place_url(config, record_of(config, tracker.run_id))
    uri = tracking_uri(config)

    def place() -> Place | None:
        tracker.tried.wait(MEET_S)
        if url is None and tracker.mlflow_id is None:
            return None
        return place_at(uri, tracker.mlflow_id or "", url)

    def told(names: list[str]) -> None:
        if tracker.mlflow_id is None:
            raise UserError("MLflow has not made the run yet; it is told later what is published")
        mlflow = client(uri)
        mlflow.set_tag(tracker.mlflow_id, CHECKPOINTS_TAG, ",".join(names))
        mlflow.set_tag(tracker.mlflow_id, PLACE_TAG, url or "")

    return Publisher(RunPaths(config.run_dir).checkpoints, policy_of(config.train), place, told)


def place_of(uri: str, run_id: str) -> Place:
    """Where the checkpoints of a run are, as the run itself says."""
    return place_at(uri, run_id, client(uri).get_run(run_id).data.tags.get(PLACE_TAG) or None)


def published_checkpoints(uri: str, run_id: str) -> list[str]:
    """Names of the committed checkpoints that a run has published, newest first. UserError when MLflow does not answer."""
    if run_id.startswith(LOCAL_PREFIX):  # MLflow has not made it yet
        return []
    try:
        return names_in(place_of(uri, run_id))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"checkpoints of MLflow run {run_id}: {first_line(error)}; {mend_for(uri)}") from error


def fetch_checkpoint(uri: str, run_id: str, name: str, folder: Path) -> Path:
    """Bring a published checkpoint into `folder`. Its bytes are checked against its manifest by who loads it."""
    return fetch(place_of(uri, run_id), name, folder)


def available(config: RunConfig, run_id: str) -> tuple[Place | None, list[str]]:
    """Where a run's checkpoints are published, and their names, newest first.

    With MLflow away the configuration is believed, where the folder's name is known; a run that MLflow has not made yet has
    nothing among its artifacts. Raises UserError when MLflow would have to be asked and does not answer.
    """
    uri, record = tracking_uri(config), record_of(config, run_id)
    url = place_url(config, record)
    try:
        place = place_of(uri, record.run_id) if record.run_id is not None else None
    except Exception as error:
        if not is_away(uri, error):
            raise UserError(f"checkpoints of MLflow run {record.id}: {first_line(error)}; {mend_for(uri)}") from error
        place = None
    if place is None and url is not None and record.local_id is not None:
        place = UrlPlace(url)
    if place is None and (record.run_id is None or _never_saved(config, record)):
        return None, []
    try:
        place = place or MlflowPlace(uri, record.id)
        return place, names_in(place)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"checkpoints of MLflow run {record.id}: {first_line(error)}; {mend_for(uri)}") from error


def _never_saved(config: RunConfig, record: RunRecord) -> bool:
    """Whether the run was begun in this directory and has not come to its first checkpoint."""
    return bool(record.params) and not RunPaths(config.run_dir).checkpoints.exists()


def fetch(place: Place, name: str, folder: Path) -> Path:
    """Bring a checkpoint from a place into `folder`, whole or not at all."""
    target = folder / storage.safe_member(name)
    staging = folder / f".{name}.download"
    shutil.rmtree(staging, ignore_errors=True)
    (staging / name).mkdir(parents=True)
    try:
        place.download(name, staging / name)
        storage.replace_dir(staging / name, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target
