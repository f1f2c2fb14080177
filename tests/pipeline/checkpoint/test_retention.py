"""Which checkpoints are kept: properties of the policy, and the policy on a folder."""

import json
import math
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pipeline.checkpoint import format
from pipeline.checkpoint.retention import PINNED, Policy, local_losses, loss_in, retain

LOSSES = st.dictionaries(
    st.integers(1, 400), st.none() | st.sampled_from([1.0, 2.0]) | st.floats(allow_nan=True), max_size=40
)
POLICIES = st.builds(Policy, st.integers(2, 5), st.none() | st.integers(1, 50), st.booleans())


@given(LOSSES, POLICIES)
def test_what_is_kept(losses, policy):
    now = max(losses, default=0)
    stay = policy.keep(losses, now)
    steps = sorted(losses)
    assert stay <= losses.keys()
    assert set(steps[-policy.last :]) <= stay
    every = {s for s in steps if policy.every and s % policy.every == 0}
    assert every <= stay
    pinned = {s for s in steps if losses[s] == PINNED}
    assert pinned <= stay
    rest = stay - set(steps[-policy.last :]) - every - pinned
    assert len(rest) <= policy.best  # nothing but the best is kept for another reason
    finite = {s: loss for s, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if policy.best and finite:
        assert min(finite.values()) in [finite[s] for s in stay if s in finite]
    assert rest <= finite.keys()
    assert policy.keep({s: losses[s] for s in stay}, now) == stay  # asked again, the same


@given(LOSSES, POLICIES)
def test_saving_one_after_the_other_keeps_what_the_policy_keeps_of_all(losses, policy):
    here: dict[int, float | None] = {}
    for step in sorted(losses):
        here[step] = losses[step]
        stay = policy.keep(here, step)
        here = {s: here[s] for s in stay}
    assert here.keys() == policy.keep(losses, max(losses, default=0))


@given(LOSSES, POLICIES, st.integers(0, 400))
def test_steps_after_a_rollback_are_kept_and_crowd_nothing_out(losses, policy, now):
    past = {s: loss for s, loss in losses.items() if s <= now}
    assert policy.keep(losses, now) == policy.keep(past, now) | (losses.keys() - past.keys())


@given(POLICIES, st.integers(1, 300), st.integers(1, 30))
def test_the_estimate_of_the_disk_is_enough(policy, steps, interval):
    saved = {step: float(step) for step in {*range(interval, steps + 1, interval), steps}}  # the best is the oldest
    kept = len(policy.keep(saved, steps))
    spare = policy.last + 2  # one that is kept for two reasons may be counted twice
    assert kept <= policy.at_most(steps, interval) <= kept + spare


def save(folder, step, **state):
    checkpoint = folder / format.checkpoint_name(step)
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"schema_version": 1, "step": step, **state}))
    (checkpoint / "COMMITTED").write_text("x")
    return checkpoint


def test_a_loss_counts_at_its_own_step_only():
    assert loss_in({"step": 20, "val_step": 20, "val_loss_cached": 1.5}) == 1.5
    assert loss_in({"step": 30, "val_step": 20, "val_loss_cached": 1.5}) is None
    assert loss_in({"step": 20, "val_step": 20, "val_loss_cached": None}) is None
    assert loss_in({"step": 20}) is None and loss_in([]) is None
    assert loss_in({"step": 20, "freezes": True}) == PINNED and loss_in({"step": 20, "freezes": False}) is None


def test_a_folder_is_left_with_the_last_the_nth_and_the_best(tmp_path):
    values = {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5, 50: 2.0, 60: 1.7}
    removed = []
    for step, loss in values.items():
        save(tmp_path, step, val_step=step, val_loss_cached=loss)
        removed += [path.name for path in retain(tmp_path, Policy(2, every=30, best=True), busy={"step-000040"})]
    (tmp_path / "step-000070").mkdir()  # never committed
    (tmp_path / "step-000020" / "state.json").write_text("{")  # damaged: its loss is unknown now
    assert local_losses(tmp_path) == {20: None, 30: 2.0, 40: 2.5, 50: 2.0, 60: 1.7}
    assert removed == ["step-000010"]
    retain(tmp_path, Policy(2, every=30, best=True))  # 40 is no longer being read
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000030", "step-000050", "step-000060"]


def test_what_cannot_be_removed_is_logged_and_tried_again(tmp_path, monkeypatch, caplog):
    for step in (10, 20, 30):
        save(tmp_path, step)
    real = Path.unlink

    def unlink(path, missing_ok=False):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Path, "unlink", unlink)  # an injected disk error: root may remove everything
    assert retain(tmp_path, Policy(2)) == [] and "Input/output error" in caplog.text
    monkeypatch.setattr(Path, "unlink", real)
    assert [path.name for path in retain(tmp_path, Policy(2))] == ["step-000010"]


def test_a_save_in_progress_is_left_alone(tmp_path):
    save(tmp_path, 10)
    (tmp_path / ".step-000020.staging" / "step-000020").mkdir(parents=True)
    retain(tmp_path, Policy(2))
    assert (tmp_path / ".step-000020.staging" / "step-000020").is_dir()


def test_what_is_committed_during_retention_is_not_removed(tmp_path, monkeypatch):
    """Retention runs beside training: the next checkpoint may be committed between its listing and its removal."""
    for step in (10, 20, 30):
        save(tmp_path, step)

    def look(folder):
        seen = local_losses(folder)
        save(folder, 40)
        return seen

    monkeypatch.setattr("pipeline.checkpoint.retention.local_losses", look)
    assert [path.name for path in retain(tmp_path, Policy(2), now=30)] == ["step-000010"]
    assert [path.name for path in format.committed(tmp_path)] == [
        "step-000020", "step-000030", "step-000040"
    ]  # fmt: skip
