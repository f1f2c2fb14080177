"""Publishing beside training: real stores (MLflow's SQLite, a folder, an S3 that breaks on command) and the real thread."""

import json
import os
import threading
import time

import pytest

from pipeline.checkpoint import format
from pipeline.checkpoint.retention import Policy
from pipeline.config.load import parse_config
from pipeline.io import storage
from pipeline.tracking import outbox, publish, run
from pipeline.tracking.client import client, tracking_uri
from pipeline.tracking.publish import Publisher, fetch_checkpoint, published_checkpoints
from pipeline.tracking.stores import MlflowPlace, UrlPlace, names_in

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


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One SQLite store for all: making one takes seconds."""
    config = configuration(tmp_path_factory.mktemp("mlflow"))
    run.open_run(config)
    return tracking_uri(config)


@pytest.fixture(params=["mlflow", "folder", "s3"])
def place(request, tmp_path, store):
    if request.param == "mlflow":
        return MlflowPlace(store, run.open_run(configuration(tmp_path / "r", tracking={"uri": store})))
    if request.param == "folder":
        return UrlPlace(str(tmp_path / "published" / "run"))
    return UrlPlace(request.getfixturevalue("s3").url("runs/one"))


def test_a_place_holds_checkpoints_whole_or_not_at_all(place, tmp_path):
    assert names_in(place) == []
    one, two = save(tmp_path / "c", 1, 2.0), save(tmp_path / "c", 2, 1.0)
    place.upload(one)
    place.upload(two)
    assert names_in(place) == ["step-000002", "step-000001"]
    assert json.loads(place.read("step-000002", "state.json"))["val_loss_cached"] == 1.0
    fetched = publish.fetch(place, "step-000002", tmp_path / "elsewhere")
    assert format.verify(fetched)["step"] == 2
    assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == ["step-000002"]
    place.remove("step-000002")
    assert names_in(place) == ["step-000001"]
    (two / "COMMITTED").rename(two / "MANIFEST.json")  # what a cut upload leaves has no COMMITTED
    with pytest.raises(FileNotFoundError):
        place.upload(two)
    assert place.listing() == {"step-000002": False, "step-000001": True}
    for name in ("step-000001", "step-000002", "step-000003"):  # of the third there is nothing
        place.remove(name)
    assert place.listing() == {}


class Gate(UrlPlace):
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
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_training_does_not_wait_and_what_is_uploaded_stays(tmp_path):
    folder, place, told = tmp_path / "checkpoints", Gate(str(tmp_path / "published")), []
    publisher = Publisher(folder, Policy(2), lambda: place, told.append)
    save(folder, 1)
    publisher.saved(1)
    assert place.began.wait(10)
    slowest = 0.0
    for step in (2, 3, 4, 5):  # the first upload hangs all the while
        save(folder, step)
        started = time.monotonic()
        publisher.saved(step)
        slowest = max(slowest, time.monotonic() - started)
    assert slowest < 1
    kept = ["step-000001", "step-000004", "step-000005"]  # what is uploaded and the last two
    wait_for(lambda: [c.name for c in format.committed(folder)] == kept)
    place.open.set()
    assert publisher.close(30) == []
    assert place.uploads == ["step-000001", "step-000005", "step-000004"] and place.most == 1
    assert [c.name for c in format.committed(folder)] == ["step-000004", "step-000005"]
    assert names_in(place) == ["step-000005", "step-000004"] and told[-1] == ["step-000004", "step-000005"]


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
    with open(state, "r+b", buffering=0):  # the disk answers: there is nothing in the file
        state.rename(folder / "pipe")
    wait_for(lambda: [c.name for c in format.committed(folder)] == ["step-000002", "step-000003"])


def test_a_wish_to_stop_is_heard_while_the_last_upload_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "STOPPING_S", 0.3)
    folder, place, asked = tmp_path / "checkpoints", Gate(str(tmp_path / "published")), []
    publisher = Publisher(folder, Policy(2), lambda: place, print)
    save(folder, 1)
    publisher.saved(1)
    assert place.began.wait(10)

    def stop():
        asked.append(time.monotonic())
        return len(asked) > 2

    started = time.monotonic()
    assert publisher.close(600, stop=stop) == ["step-000001"]
    assert time.monotonic() - started < 20 and len(asked) == 3  # heard once, not asked again
    place.open.set()


def test_an_upload_that_hangs_does_not_hold_the_end(tmp_path, caplog):
    folder, place = tmp_path / "checkpoints", Gate(str(tmp_path / "published"))
    publisher = Publisher(folder, Policy(2), lambda: place, print)
    save(folder, 1)
    publisher.saved(1)
    assert place.began.wait(10)
    started = time.monotonic()
    assert publisher.close(0.5) == ["step-000001"]
    assert time.monotonic() - started < 5
    assert "step-000001 not published" in caplog.text and "pldr track replay" in caplog.text
    assert names_in(place) == []
    place.open.set()


def test_the_same_set_here_and_there_with_the_best_and_every_nth(tmp_path):
    folder, place, policy = tmp_path / "checkpoints", UrlPlace(str(tmp_path / "p")), Policy(2, every=4, best=True)
    publisher = Publisher(folder, policy, lambda: place, lambda names: None)
    for step, loss in enumerate([3.0, 2.5, 1.0, 2.0, 2.2, 2.1, 2.05], start=1):
        save(folder, step, loss)
        publisher.saved(step)
    assert publisher.close(30) == []
    kept = [c.name for c in format.committed(folder)]
    assert kept == ["step-000003", "step-000004", "step-000006", "step-000007"]
    assert names_in(place) == kept[::-1]
    # Another machine holds the newest one only: nothing that stays for ever is lost, the best is known from there.
    other = tmp_path / "other"
    publish.fetch(place, "step-000007", other)
    publisher = Publisher(other, policy, lambda: place, lambda names: None)
    save(other, 8, 1.5)
    publisher.saved(8)
    assert publisher.close(30) == []
    assert names_in(place) == ["step-000008", "step-000007", "step-000004", "step-000003"]


def test_a_step_that_was_reached_another_way_replaces_the_published_one(tmp_path):
    folder, place = tmp_path / "checkpoints", UrlPlace(str(tmp_path / "p"))
    publisher = Publisher(folder, Policy(2), lambda: place, lambda names: None)
    for step in (1, 2):
        save(folder, step)
    publisher.saved(step)
    wait_for(lambda: names_in(place) == ["step-000002", "step-000001"])
    storage.replace_dir(save(tmp_path / "again", 2, content=b"others!"), folder / "step-000002")
    publisher.saved(2)
    assert publisher.close(30) == []
    fetched = publish.fetch(place, "step-000002", tmp_path / "x")
    format.verify(fetched)
    assert (fetched / "step-000002" / "rank_0.pt").read_bytes().startswith(b"others!")


def test_what_a_cut_upload_left_is_taken_away(tmp_path):
    """Half a checkpoint of a name that comes again with other files, and half of one that never comes again."""
    folder, url = tmp_path / "checkpoints", tmp_path / "p"
    for name, file in (("step-000002", "rank_7.pt"), ("step-000001", "rank_0.pt")):
        (url / name / name).mkdir(parents=True)
        (url / name / name / file).write_bytes(b"half")
    place = UrlPlace(str(url))
    save(folder, 2)
    assert Publisher(folder, Policy(2), lambda: place, lambda names: None).close(30) == []
    assert place.listing() == {"step-000002": True}
    assert format.verify(publish.fetch(place, "step-000002", tmp_path / "x"))["step"] == 2


def test_a_future_that_the_run_left_is_neither_published_nor_in_the_way(tmp_path):
    """Steps 30 and 40 are of the time before a rollback to 20."""
    folder, place = tmp_path / "checkpoints", UrlPlace(str(tmp_path / "p"))
    publisher = Publisher(folder, Policy(2), lambda: place, lambda names: None)
    for step in (10, 20, 30, 40):
        save(folder, step)
    place.upload(folder / "step-000030")
    save(folder, 25)
    publisher.saved(25)
    assert publisher.close(30) == []
    assert names_in(place) == ["step-000030", "step-000025", "step-000020"]
    assert [c.name for c in format.committed(folder)] == [f"step-0000{step}" for step in (20, 25, 30, 40)]


def test_a_damaged_checkpoint_is_not_published(tmp_path, caplog):
    folder, place = tmp_path / "checkpoints", UrlPlace(str(tmp_path / "p"))
    for step in (1, 2):
        save(folder, step)
    (folder / "step-000002" / "step-000002" / "rank_1.pt").write_bytes(b"flipped")
    publisher = Publisher(folder, Policy(2), lambda: place, lambda names: None)
    publisher.close(30)
    assert names_in(place) == ["step-000001"] and "step-000002 is damaged and not published" in caplog.text


def test_an_upload_that_fails_half_way_is_tried_again_and_never_committed_half(
    tmp_path, faulty_s3, monkeypatch, caplog
):
    """The store refuses writes after the first ones: the previous checkpoint stays, and in the end the new one is whole."""
    monkeypatch.setenv("PLDR_RETRIES", "0")
    folder, place = tmp_path / "checkpoints", UrlPlace(faulty_s3.url("run"))
    seen = []

    def told(names):
        seen.append(names)

    publisher = Publisher(folder, Policy(2), lambda: place, told)
    save(folder, 1)
    publisher.saved(1)
    wait_for(lambda: seen == [["step-000001"]])
    real = place._put

    def put(source, url):
        real(source, url)
        if source.name == "rank_0.pt" and source.parent.name == "step-000002" and len(cuts) < 2:
            cuts.append(names_in(place))
            faulty_s3.fail_next(1, 500, "PUT")  # the next file of this checkpoint

    cuts = []
    monkeypatch.setattr(place, "_put", put)
    save(folder, 2)
    publisher.saved(2)
    assert publisher.close(60) == []
    assert cuts == [["step-000001"]] * 2  # twice half of it was there, and was no checkpoint
    assert "publishing checkpoints is tried again" in caplog.text
    assert names_in(place) == ["step-000002", "step-000001"]
    format.verify(publish.fetch(place, "step-000002", tmp_path / "x"))


def test_a_store_that_stays_away_is_given_up_at_the_end(tmp_path, faulty_s3, monkeypatch, caplog):
    monkeypatch.setenv("PLDR_RETRIES", "0")
    folder, place = tmp_path / "checkpoints", UrlPlace(faulty_s3.url("run"))
    save(folder, 1)
    faulty_s3.fail_next(100, 403, "PUT")
    publisher = Publisher(folder, Policy(2), lambda: place, print)
    started = time.monotonic()
    assert publisher.close(600) == ["step-000001"]  # some attempts, not ten minutes
    assert time.monotonic() - started < 30
    assert "publishing checkpoints is tried again" in caplog.text
    faulty_s3.heal()
    assert names_in(place) == []
    assert Publisher(folder, Policy(2), lambda: place, print).close(30) == []  # what `pldr track replay` does
    assert names_in(place) == ["step-000001"]


@pytest.mark.parametrize("kind", ["mlflow", "s3"])
def test_a_run_says_where_its_checkpoints_are(tmp_path, request, kind, store):
    """Published by one machine, fetched by another that knows the run's id only."""
    where = {} if kind == "mlflow" else {"train": {"publish_to": request.getfixturevalue("s3").url("all-runs")}}
    config, uri = configuration(tmp_path / "a", tracking={"uri": store}, **where), store
    run_id = run.open_run(config)
    tracker = outbox.open_tracker(config, run_id)
    publisher = publish.open_publisher(config, tracker)
    folder = tmp_path / "a" / "checkpoints"
    for step in (1, 2, 3):
        save(folder, step)
        publisher.saved(step)
    assert publisher.close(30) == [] and tracker.close()
    tags = client(uri).get_run(run_id).data.tags
    assert tags["pldr.checkpoints"] == "step-000002,step-000003"
    assert tags["pldr.publish_to"].startswith("s3://" if kind == "s3" else "")
    assert published_checkpoints(uri, run_id) == ["step-000003", "step-000002"]
    other = configuration(tmp_path / "b", tracking={"uri": uri})  # does not say publish_to
    assert run.open_run(other, run_id=run_id) == run_id
    place, names = publish.available(other, run_id)
    assert names == ["step-000003", "step-000002"]
    fetched = publish.fetch(place, names[0], tmp_path / "b" / "checkpoints")
    assert format.verify(fetched)["step"] == 3
    again = fetch_checkpoint(uri, run_id, "step-000002", tmp_path / "c")
    assert format.verify(again)["step"] == 2
