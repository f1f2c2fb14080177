"""Publishing committed checkpoints beside training, and getting them back.

Rank 0 hands over after each save and trains on at once; one thread uploads. So at most one publication is in progress: that
of a second save waits for the first in this thread, not in the training loop, and when several are waiting only what is
still kept is uploaded. Retention is done here too, because a checkpoint must stay until its upload is complete: in a second
thread, because an upload may take long and the disk must not fill meanwhile.

What is published follows the run's retention policy over all published and local checkpoints: a machine that has only the
newest ones does not remove what other machines published and what is kept forever.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.checkpoint.format import COMMITTED, STATE, checkpoint_name, committed, step_of, verify
from pipeline.checkpoint.retention import Policy, local_losses, loss_in, policy_of, retain
from pipeline.errors import UserError, first_line
from pipeline.io import storage
from pipeline.tracking.client import client, is_unreachable, why
from pipeline.tracking.metrics import Tracker
from pipeline.tracking.run import TrackedRun
from pipeline.tracking.run_record import LOCAL_PREFIX, PUBLISH_TAG
from pipeline.tracking.stores import CheckpointStore, MlflowStore, UrlStore, names_in, store_at

log = logging.getLogger(__name__)
CHECKPOINTS_TAG = "pldr.checkpoints"
LONGEST_WAIT_S = 30.0  # between attempts
FIRST_CONTACT_S = 5.0  # how long the first attempt waits for the tracker's first contact with MLflow
CLOSING_ATTEMPTS = 3  # once training has ended
POLL_S, STOPPING_S = 0.2, 5.0  # while closing: how often `stop` is asked, and how long it still waits after a yes


class Publisher:
    """The thread of rank 0 that publishes.

    folder: the run's `checkpoints/`. find_store: where to, None as long as MLflow has not made the run; called at each
    attempt. announce: gets the names of all published checkpoints after each publication; when it raises, the publication is
    retried. busy: names that others read now, and that stay meanwhile.
    """

    def __init__(
        self,
        folder: Path,
        policy: Policy,
        find_store: Callable[[], CheckpointStore | None],
        announce: Callable[[list[str]], None],
        busy: Callable[[], set[str]] = set,
    ) -> None:
        self._folder, self._policy, self._find_store, self._announce = folder, policy, find_store, announce
        self._busy_elsewhere = busy
        self._change = threading.Condition()
        local = committed(folder)
        self._step = step_of(local[-1]) if local else 0  # how far the run is
        self._asked = 1 if local else 0  # publications asked for; one for what an earlier start left unpublished
        self._done = 0
        self._pruned = self._asked
        self._closing = False
        self._files = threading.Lock()  # nothing is removed between the decision to upload it and `_busy`
        self._busy: str | None = None  # the checkpoint that is being uploaded
        self._known: dict[str, tuple[str, float | None]] = {}  # published: its COMMITTED and loss
        self._thread = threading.Thread(target=self._publish_forever, name="publisher", daemon=True)
        self._thread.start()
        self._pruner = threading.Thread(target=self._prune_forever, name="retention", daemon=True)
        self._pruner.start()

    def saved(self, step: int) -> None:
        """A checkpoint of this step was committed: the threads remove what is no longer kept and publish what is."""
        with self._change:
            self._step = step
            self._asked += 1
            self._change.notify_all()

    def close(self, wait_s: float, *, stop: Callable[[], bool] | None = None) -> list[str]:
        """Wait for the last publication, `wait_s` at most and a few attempts; the names that are still not published.

        stop: polled meanwhile, whether the process is asked to end; after that it waits STOPPING_S at most.
        """
        with self._change:
            self._closing = True
            self._change.notify_all()
        end = time.monotonic() + wait_s
        while self._thread.is_alive() and (left := end - time.monotonic()) > 0:
            self._thread.join(min(left, POLL_S))
            if stop is not None and stop():
                end, stop = min(end, time.monotonic() + STOPPING_S), None
        missing = [] if self._done == self._asked else self._missing()
        if missing:
            log.warning(
                "%s not published; kept in %s, `pldr track replay` publishes what is missing",
                ", ".join(missing),
                self._folder,
            )
        self._prune()  # also what could not be removed while it was being uploaded
        return missing

    def _prune(self) -> None:
        with self._files:
            busy = self._busy_elsewhere() | ({self._busy} if self._busy else set())
            retain(self._folder, self._policy, now=self._step, busy=busy)

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
                    log.warning("publishing checkpoints failed and is retried: %s", first_line(error))
                warned = True
                with self._change:
                    if self._closing and failures >= CLOSING_ATTEMPTS:
                        return
                    self._change.wait(min(2.0 ** (failures - 1), LONGEST_WAIT_S if not self._closing else 2.0))
                continue
            failures, warned, self._done = 0, False, asked

    def publish(self) -> None:
        """Make the store hold what the policy keeps. Safe to repeat; raises what the store raises."""
        store = self._find_store()
        if store is None:
            raise UserError("MLflow has not made the run yet")
        listing = store.listing()
        losses, local = self._read_losses(store, listing), local_losses(self._folder)
        keep = self._policy.keep({**losses, **local}, self._step)
        for step in sorted(keep & local.keys(), reverse=True):  # the newest is needed first
            if step <= self._step:
                self._upload(store, self._folder / checkpoint_name(step))
        outdated = {checkpoint_name(step) for step in losses.keys() - keep}
        unfinished = {name for name, is_committed in listing.items() if not is_committed and name not in self._known}
        for name in sorted(outdated | unfinished):
            store.remove(name)
            self._known.pop(name, None)
        self._announce(sorted(self._known))

    def _read_losses(self, store: CheckpointStore, listing: dict[str, bool]) -> dict[int, float | None]:
        """Step -> loss of what is published. What was read before is not read again."""
        names = [name for name, is_committed in listing.items() if is_committed]
        self._known = {name: self._known[name] if name in self._known else _facts(store, name) for name in names}
        return {step_of(Path(name)): loss for name, (_, loss) in self._known.items()}

    def _upload(self, store: CheckpointStore, checkpoint: Path) -> None:
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
            # An interrupted upload, or the run was rolled back and reached this step again: no file of that may stay.
            store.remove(checkpoint.name)
            store.upload(checkpoint)
            self._known[checkpoint.name] = (seal, loss_in(state))
        finally:
            self._busy = None


def _facts(store: CheckpointStore, name: str) -> tuple[str, float | None]:
    """The content of a published checkpoint's COMMITTED, and its held-out loss."""
    seal = store.read(name, COMMITTED).decode("utf-8", "replace")
    try:
        return seal, loss_in(storage.parse_json(store.read(name, STATE)))
    except (ValueError, FileNotFoundError):
        return seal, None


def open_publisher(run: TrackedRun, tracker: Tracker, busy: Callable[[], set[str]] = set) -> Publisher:
    """The publisher of a run that logs through `tracker`."""
    url = run.publish_url

    def find_store() -> CheckpointStore | None:
        tracker.tried.wait(FIRST_CONTACT_S)
        if url is None and tracker.mlflow_id is None:
            return None
        return store_at(run.uri, tracker.mlflow_id or "", url)

    def announce(names: list[str]) -> None:
        if tracker.mlflow_id is None:
            raise UserError("MLflow has not made the run yet; its checkpoints are listed there later")
        mlflow = client(run.uri)
        mlflow.set_tag(tracker.mlflow_id, CHECKPOINTS_TAG, ",".join(names))
        mlflow.set_tag(tracker.mlflow_id, PUBLISH_TAG, url or "")

    return Publisher(run.paths.checkpoints, policy_of(run.config.train), find_store, announce, busy)


def _store_by_tag(uri: str, run_id: str) -> CheckpointStore:
    """Where the checkpoints of a run are, by the run's own tag."""
    return store_at(uri, run_id, client(uri).get_run(run_id).data.tags.get(PUBLISH_TAG) or None)


def published_checkpoints(uri: str, run_id: str) -> list[str]:
    """Names of the committed checkpoints that a run has published, newest first. UserError when MLflow is unreachable."""
    if run_id.startswith(LOCAL_PREFIX):  # MLflow has not made it yet
        return []
    try:
        return names_in(_store_by_tag(uri, run_id))
    except UserError:
        raise
    except Exception as error:
        raise _explain(uri, run_id, error) from error


def fetch_checkpoint(uri: str, run_id: str, name: str, folder: Path) -> Path:
    """Bring a published checkpoint into `folder`. Whoever loads it checks its bytes against its manifest."""
    return fetch(_store_by_tag(uri, run_id), name, folder)


def available(run: TrackedRun) -> tuple[CheckpointStore | None, list[str]]:
    """Where a run's checkpoints are published, and their names, newest first.

    With MLflow unreachable the configuration decides, where the folder's name is known; a run that MLflow has not made yet
    has nothing among its artifacts. Raises UserError when MLflow would have to be asked and is unreachable.
    """
    record, url = run.record, run.publish_url
    try:
        store = _store_by_tag(run.uri, record.run_id) if record.run_id is not None else None
    except Exception as error:
        if not is_unreachable(run.uri, error):
            raise _explain(run.uri, run.id, error) from error
        store = None
    if store is None and url is not None and record.local_id is not None:
        store = UrlStore(url)
    # Begun in this directory, and it has not come to its first checkpoint.
    never_saved = bool(record.params) and not run.paths.checkpoints.exists()
    if store is None and (record.run_id is None or never_saved):
        return None, []
    try:
        store = store or MlflowStore(run.uri, run.id)
        return store, names_in(store)
    except UserError:
        raise
    except Exception as error:
        raise _explain(run.uri, run.id, error) from error


def _explain(uri: str, run_id: str, error: Exception) -> UserError:
    return UserError(f"checkpoints of MLflow run {run_id}: {why(uri, error)}")


def fetch(store: CheckpointStore, name: str, folder: Path) -> Path:
    """Bring a checkpoint from a store into `folder`, completely or not at all."""
    target = folder / storage.safe_member(name)
    staging = folder / f".{name}.download"
    shutil.rmtree(staging, ignore_errors=True)
    (staging / name).mkdir(parents=True)
    try:
        store.download(name, staging / name)
        storage.replace_dir(staging / name, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target
