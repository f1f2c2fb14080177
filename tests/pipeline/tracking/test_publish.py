"""Publishing beside training: real stores (MLflow's SQLite, a folder, an S3 that breaks on command) and the real thread."""

import json
import os
import threading
import time

import pytest

from pipeline.checkpoint import format
from pipeline.checkpoint.retention import Policy
from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths
from pipeline.io import storage
from pipeline.tracking import outbox, publish
from pipeline.tracking.client import client
from pipeline.tracking.publish import Publisher, fetch_checkpoint, published_checkpoints
from pipeline.tracking.run import open_run
from pipeline.tracking.stores import MlflowStore, UrlStore, names_in

TREE = {
    "name": "t",
    "data": {"sources": [{"url": "x.txt"}]},
    "model": {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8},
}


def configuration(folder, **sections):
    return parse_config({**TREE, "run_dir": str(folder), **sections}, where="test")


def save(folder, step, loss=None, content=b"weights"):
    """A committed checkpoint of a few files, as checkpoint.save leaves it."""
    name = format.checkpoint_name(step)
    hidden = folder / f".{name}.staging"
    (hidden / name).mkdir(parents=True)
    for rank in range(2):
        (hidden / name / f"rank_{rank}.pt").write_bytes(content * 100 + bytes([rank]))
    state = {"schema_version": 1, "step": step, "config": {}, "val_step": step, "val_loss_cached": loss}
    storage.publish_json(hidden / "state.json", state)
    manifest = {"schema_version": 1, "files": storage.manifest_of(hidden)}
    storage.publish_json(hidden / storage.MANIFEST, manifest)
    (hidden / "COMMITTED").write_text(storage.sha256_file(hidden / storage.MANIFEST))
    return hidden.rename(folder / name)


def opened(config, **options):
    return open_run(config, RunPaths(config.run_dir), **options)


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """One SQLite store for all: making one takes seconds."""
    return opened(configuration(tmp_path_factory.mktemp("mlflow"))).uri


@pytest.fixture(params=["mlflow", "folder", "s3"])
def store(request, tmp_path, uri):
    if request.param == "mlflow":
        return MlflowStore(uri, opened(configuration(tmp_path / "r", tracking={"uri": uri})).id)
    if request.param == "folder":
        return UrlStore(str(tmp_path / "published" / "run"))
    return UrlStore(request.getfixturevalue("s3").url("runs/one"))


def test_a_store_holds_checkpoints_completely_or_not_at_all(store, tmp_path):
    assert names_in(store) == []
    one, two = save(tmp_path / "c", 1, 2.0), save(tmp_path / "c", 2, 1.0)
    store.upload(one)
    store.upload(two)
    assert names_in(store) == ["step-000002", "step-000001"]
    assert json.loads(store.read("step-000002", "state.json"))["val_loss_cached"] == 1.0
    fetched = publish.fetch(store, "step-000002", tmp_path / "elsewhere")
    assert format.verify(fetched)["step"] == 2
    assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == ["step-000002"]
    store.remove("step-000002")
    assert names_in(store) == ["step-000001"]
    (two / "COMMITTED").rename(two / "MANIFEST.json")  # what an interrupted upload leaves has no COMMITTED
    with pytest.raises(FileNotFoundError):
        store.upload(two)
    assert store.listing() == {"step-000002": False, "step-000001": True}
    for name in ("step-000001", "step-000002", "step-000003"):  # of the third there is nothing
        store.remove(name)
    assert store.listing() == {}


class Gate(UrlStore):
    """A real folder whose uploads wait until they are let through."""

    def __init__(self, url):
        super().__init__(url)
        self.open, self.began, self.uploads, self.under_way, self.most = threading.Event(), threading.Event(), [], 0, 0

    def upload(self, checkpoint):
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        self.began.set()
        assert self.open.wait(30)
        super().upload(checkpoint)
        self.uploads.append(checkpoint.name)
        self.under_way -= 1


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def test_training_does_not_wait_and_what_is_uploaded_stays(tmp_path):
    folder, store, announced = tmp_path / "checkpoints", Gate(str(tmp_path / "published")), []
    publisher = Publisher(folder, Policy(2), lambda: store, announced.append)
    save(folder, 1)
    publisher.saved(1)
    assert store.began.wait(10)
    slowest = 0.0
    for step in (2, 3, 4, 5):  # the first upload hangs all the while
        save(folder, step)
        started = time.monotonic()
        publisher.saved(step)
        slowest = max(slowest, time.monotonic() - started)
    assert slowest < 1
    kept = ["step-000001", "step-000004", "step-000005"]  # what is uploaded and the last two
    wait_for(lambda: [c.name for c in format.committed(folder)] == kept)
    store.open.set()
    assert publisher.close(30) == []
    assert store.uploads == ["step-000001", "step-000005", "step-000004"] and store.most == 1
    assert [c.name for c in format.committed(folder)] == ["step-000004", "step-000005"]
    assert names_in(store) == ["step-000005", "step-000004"] and announced[-1] == ["step-000004", "step-000005"]


def test_training_does_not_wait_for_removals(tmp_path):
    """A disk that hangs: reading what an old checkpoint says blocks (a pipe that nobody writes to)."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save(folder, step)
    state = folder / "step-000001" / "state.json"
    state.unlink()
    os.mkfifo(state)
    publisher = Publisher(folder, Policy(2), lambda: None, print)
    caller = threading.Thread(target=publisher.saved, args=(3,), daemon=True)
    caller.start()
    caller.join(5)
    assert not caller.is_alive() and len(format.committed(folder)) == 3
    state.rename(folder / "pipe")  # before the removal goes on, which removes it
    with open(folder / "pipe", "r+b", buffering=0):  # the disk answers: there is nothing in the file
        pass
    wait_for(lambda: [c.name for c in format.committed(folder)] == ["step-000002", "step-000003"])


def test_a_request_to_stop_is_seen_while_waiting_for_the_last_upload(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "STOPPING_S", 0.3)
    folder, store, asked = tmp_path / "checkpoints", Gate(str(tmp_path / "published")), []
    publisher = Publisher(folder, Policy(2), lambda: store, print)
    save(folder, 1)
    publisher.saved(1)
    assert store.began.wait(10)

    def stop():
        asked.append(time.monotonic())
        return len(asked) > 2

    started = time.monotonic()
    assert publisher.close(600, stop=stop) == ["step-000001"]
    assert time.monotonic() - started < 20 and len(asked) == 3  # seen once, not asked again
    store.open.set()


def test_an_upload_that_hangs_does_not_hold_the_end(tmp_path, caplog):
    folder, store = tmp_path / "checkpoints", Gate(str(tmp_path / "published"))
    publisher = Publisher(folder, Policy(2), lambda: store, print)
    save(folder, 1)
    publisher.saved(1)
    assert store.began.wait(10)
    started = time.monotonic()
    assert publisher.close(0.5) == ["step-000001"]
    assert time.monotonic() - started < 5
    assert "step-000001 not published" in caplog.text and "pldr track replay" in caplog.text
    assert names_in(store) == []
    store.open.set()


def test_the_same_set_here_and_there_with_the_best_and_every_nth(tmp_path):
    folder, store, policy = tmp_path / "checkpoints", UrlStore(str(tmp_path / "p")), Policy(2, every=4, best=True)
    publisher = Publisher(folder, policy, lambda: store, lambda names: None)
    for step, loss in enumerate([3.0, 2.5, 1.0, 2.0, 2.2, 2.1, 2.05], start=1):
        save(folder, step, loss)
        publisher.saved(step)
    assert publisher.close(30) == []
    kept = [c.name for c in format.committed(folder)]
    assert kept == ["step-000003", "step-000004", "step-000006", "step-000007"]
    assert names_in(store) == kept[::-1]
    # Another machine holds the newest one only: nothing that is kept forever is lost, the best is known from there.
    other = tmp_path / "other"
    publish.fetch(store, "step-000007", other)
    publisher = Publisher(other, policy, lambda: store, lambda names: None)
    save(other, 8, 1.5)
    publisher.saved(8)
    assert publisher.close(30) == []
    assert names_in(store) == ["step-000008", "step-000007", "step-000004", "step-000003"]


def test_a_step_that_was_reached_another_way_replaces_the_published_one(tmp_path):
    folder, store = tmp_path / "checkpoints", UrlStore(str(tmp_path / "p"))
    publisher = Publisher(folder, Policy(2), lambda: store, lambda names: None)
    for step in (1, 2):
        save(folder, step)
    publisher.saved(step)
    wait_for(lambda: names_in(store) == ["step-000002", "step-000001"])
    storage.replace_dir(save(tmp_path / "again", 2, content=b"others!"), folder / "step-000002")
    publisher.saved(2)
    assert publisher.close(30) == []
    fetched = publish.fetch(store, "step-000002", tmp_path / "x")
    format.verify(fetched)
    assert (fetched / "step-000002" / "rank_0.pt").read_bytes().startswith(b"others!")


def test_what_an_interrupted_upload_left_is_removed(tmp_path):
    """Half a checkpoint of a name that comes again with other files, and half of one that never comes again."""
    folder, url = tmp_path / "checkpoints", tmp_path / "p"
    for name, file in (("step-000002", "rank_7.pt"), ("step-000001", "rank_0.pt")):
        (url / name / name).mkdir(parents=True)
        (url / name / name / file).write_bytes(b"half")
    store = UrlStore(str(url))
    save(folder, 2)
    assert Publisher(folder, Policy(2), lambda: store, lambda names: None).close(30) == []
    assert store.listing() == {"step-000002": True}
    assert format.verify(publish.fetch(store, "step-000002", tmp_path / "x"))["step"] == 2


def test_a_future_that_the_run_left_is_neither_published_nor_in_the_way(tmp_path):
    """Steps 30 and 40 are of the time before a rollback to 20."""
    folder, store = tmp_path / "checkpoints", UrlStore(str(tmp_path / "p"))
    publisher = Publisher(folder, Policy(2), lambda: store, lambda names: None)
    for step in (10, 20, 30, 40):
        save(folder, step)
    store.upload(folder / "step-000030")
    save(folder, 25)
    publisher.saved(25)
    assert publisher.close(30) == []
    assert names_in(store) == ["step-000030", "step-000025", "step-000020"]
    assert [c.name for c in format.committed(folder)] == [f"step-0000{step}" for step in (20, 25, 30, 40)]


def test_a_damaged_checkpoint_is_not_published(tmp_path, caplog):
    folder, store = tmp_path / "checkpoints", UrlStore(str(tmp_path / "p"))
    for step in (1, 2):
        save(folder, step)
    (folder / "step-000002" / "step-000002" / "rank_1.pt").write_bytes(b"flipped")
    publisher = Publisher(folder, Policy(2), lambda: store, lambda names: None)
    publisher.close(30)
    assert names_in(store) == ["step-000001"] and "step-000002 is damaged and not published" in caplog.text


def test_an_upload_that_fails_halfway_is_retried_and_never_committed_incomplete(
    tmp_path, faulty_s3, monkeypatch, caplog
):
    """The store refuses writes after the first ones: the previous checkpoint stays, and in the end the new one is complete."""
    monkeypatch.setenv("PLDR_RETRIES", "0")
    folder, store = tmp_path / "checkpoints", UrlStore(faulty_s3.url("run"))
    seen = []

    publisher = Publisher(folder, Policy(2), lambda: store, seen.append)
    save(folder, 1)
    publisher.saved(1)
    wait_for(lambda: seen == [["step-000001"]])
    real = store._put

    def put(source, url):
        real(source, url)
        if source.name == "rank_0.pt" and source.parent.name == "step-000002" and len(cuts) < 2:
            cuts.append(names_in(store))
            faulty_s3.fail_next(1, 500, "PUT")  # the next file of this checkpoint

    cuts = []
    monkeypatch.setattr(store, "_put", put)
    save(folder, 2)
    publisher.saved(2)
    assert publisher.close(60) == []
    assert cuts == [["step-000001"]] * 2  # twice half of it was there, and was no checkpoint
    assert "publishing checkpoints failed and is retried" in caplog.text
    assert names_in(store) == ["step-000002", "step-000001"]
    format.verify(publish.fetch(store, "step-000002", tmp_path / "x"))


def test_the_end_gives_up_on_a_store_that_stays_unreachable(tmp_path, faulty_s3, monkeypatch, caplog):
    monkeypatch.setenv("PLDR_RETRIES", "0")
    folder, store = tmp_path / "checkpoints", UrlStore(faulty_s3.url("run"))
    save(folder, 1)
    faulty_s3.fail_next(100, 403, "PUT")
    publisher = Publisher(folder, Policy(2), lambda: store, print)
    started = time.monotonic()
    assert publisher.close(600) == ["step-000001"]  # some attempts, not ten minutes
    assert time.monotonic() - started < 30
    assert "publishing checkpoints failed and is retried" in caplog.text
    faulty_s3.heal()
    assert names_in(store) == []
    assert Publisher(folder, Policy(2), lambda: store, print).close(30) == []  # what `pldr track replay` does
    assert names_in(store) == ["step-000001"]


@pytest.mark.parametrize("kind", ["mlflow", "s3"])
def test_a_runs_tag_names_the_store_of_its_checkpoints(tmp_path, request, kind, uri):
    """Published by one machine, fetched by another that knows the run's id only."""
    where = {} if kind == "mlflow" else {"train": {"publish_to": request.getfixturevalue("s3").url("all-runs")}}
    run = opened(configuration(tmp_path / "a", tracking={"uri": uri}, **where))
    run_id = run.id
    tracker = outbox.open_tracker(run)
    publisher = publish.open_publisher(run, tracker)
    folder = tmp_path / "a" / "checkpoints"
    for step in (1, 2, 3):
        save(folder, step)
        publisher.saved(step)
    assert publisher.close(30) == [] and tracker.close()
    tags = client(uri).get_run(run_id).data.tags
    assert tags["pldr.checkpoints"] == "step-000002,step-000003"
    assert tags["pldr.publish_to"].startswith("s3://" if kind == "s3" else "")
    assert published_checkpoints(uri, run_id) == ["step-000003", "step-000002"]
    other = configuration(tmp_path / "b", tracking={"uri": uri})  # without publish_to
    elsewhere = opened(other, run_id=run_id)
    assert elsewhere.id == run_id
    store, names = publish.available(elsewhere)
    assert names == ["step-000003", "step-000002"]
    fetched = publish.fetch(store, names[0], tmp_path / "b" / "checkpoints")
    assert format.verify(fetched)["step"] == 3
    again = fetch_checkpoint(uri, run_id, "step-000002", tmp_path / "c")
    assert format.verify(again)["step"] == 2
