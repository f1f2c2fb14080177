"""A longer run and an annealed one equal uninterrupted runs bit by bit, on the first run's data: two ranks, real processes."""

import contextlib
import io
import json

import pytest
import yaml

from launch.cli import main
from pipeline.checkpoint.format import verify
from pipeline.config.load import load_config
from pipeline.tracking.client import client, tracking_uri
from tests.helpers.runs import write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def pldr(config, verb, *arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(config.parent), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([verb, str(config), *arguments, "--json"])
    return code, out.getvalue(), err.getvalue()


def trained(config, folder, *arguments):
    """The output of `pldr train` in a run directory, and the losses and rates of its run, by step."""
    where = [f"run_dir={config.parent / folder}"]
    code, output, errors = pldr(config, "train", *where, *arguments)
    assert code == 0, errors + output
    result = json.loads(output.strip().splitlines()[-1])["result"]
    mlflow = client(tracking_uri(load_config(config, where)))
    curves = {}
    for metric in ("train/loss", "train/lr", "invariance/budget"):
        for point in mlflow.get_metric_history(result["run_id"], metric):
            curves.setdefault(point.step, []).append(point.value)
    state = verify(config.parent / folder / "checkpoints" / result["checkpoint"])
    return output, curves, {key: state[key] for key in ("step", "sequences_consumed", "tokens_consumed", "budget")}


def test_going_on_equals_not_having_stopped(make_run, tmp_path):
    config = make_run(tmp_path, steps=16, checkpoint_every=8, warmup_steps=4, log_every=1, schedule="constant")
    for stage in ("shard", "tokenizer", "tokenize"):
        assert pldr(config, stage)[0] == 0
    of = f"data.of={tmp_path / 'run'}"
    _, first, _ = trained(config, "run")
    code, _, errors = pldr(config, "train", "train.steps=32")
    assert (
        code == 2 and f"pldr train {config} train.steps=32 run_dir={tmp_path}/run-32 --resume {tmp_path}/run" in errors
    )

    # Longer: the order of the data goes on at the checkpoint's position.
    _, straight, straight_state = trained(config, "straight", of, "train.steps=32")
    output, longer, state = trained(config, "longer", "train.steps=32", "--resume", str(tmp_path / "run"))
    assert "schedule    constant: goes on in the stable part (rate 2.0e-3) until step 32" in output
    assert state == straight_state and sorted(longer) == list(range(17, 33))
    assert {**first, **longer} == straight
    assert not (tmp_path / "longer" / "tokens").exists()

    # The decay from step 16 of the longest one, as a run of its own: 0.2 of 20 steps.
    wsd = (of, "train.schedule=wsd", "train.steps=20")
    _, straight, straight_state = trained(config, "straight-wsd", *wsd)
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step-000016")
    output, branch, state = trained(config, "branch", "--anneal-from", checkpoint)
    assert "schedule    wsd: decays from step 16 on, linear, to 2.0e-4 at step 20" in output
    assert state == straight_state and sorted(branch) == [17, 18, 19, 20]
    assert {**first, **branch} == straight
    assert not (tmp_path / "branch" / "tokens").exists()


def test_other_phases_go_on_from_what_was_drawn_and_resume_bit_equal(make_run, tmp_path):
    config = make_run(tmp_path, steps=16, checkpoint_every=8, warmup_steps=4, log_every=1, schedule="constant")
    write_corpus(tmp_path / "books.jsonl", seed=7)
    tree = yaml.safe_load(config.read_text())
    sources = [{"url": "corpus.jsonl", "name": "web"}, {"url": "books.jsonl", "name": "books"}]
    tree["data"] |= {"sources": sources, "separate_sources": True, "phases": phases((0.5, {"web": 3, "books": 1}))}
    config.write_text(yaml.safe_dump(tree))
    for stage in ("shard", "tokenizer", "tokenize"):
        assert pldr(config, stage)[0] == 0
    trained(config, "run")
    half = verify(tmp_path / "run" / "checkpoints" / "step-000008")
    assert sum(half["mixture"]["drawn"].values()) == 64

    # The decay on books alone: 4 of 20 steps after step 16, saved in between.
    given = [f"data.phases={json.dumps(phases((1, {'books': 1}))[:1])}", "train.checkpoint_every=2"]
    anneal = ["--anneal-from", str(tmp_path / "run" / "checkpoints" / "step-000016"), *given]
    output, branch, _ = trained(config, "branch", *anneal)
    assert "phases      those of this run decide from step 16 on, in phase 1 of 1 (sequence 128 of 160)" in output
    before = verify(tmp_path / "run" / "checkpoints" / "step-000016")["mixture"]["drawn"]
    done = verify(tmp_path / "branch" / "checkpoints" / "step-000020")
    assert done["mixture"]["drawn"] == {"web": before["web"], "books": before["books"] + 32}
    assert done["mixture"]["begin"] == {"step": 16, "position": 128, "drawn": before}

    # From step 18 of that, on as many ranks and on one: the same sequences.
    recipe = [f"train.{key}={done['config']['train'][key]}" for key in ("schedule", "steps", "decay_share")]
    source = ["--resume", str(tmp_path / "branch" / "checkpoints" / "step-000018")]
    for ranks, tolerance in ((2, 0.0), (1, 1e-5)):
        _, again, _ = trained(config, f"again-{ranks}", *given, *recipe, *source, f"train.ranks={ranks}")
        assert verify(tmp_path / f"again-{ranks}" / "checkpoints" / "step-000020")["mixture"] == done["mixture"]
        for step in (19, 20):
            assert again[step][0] == pytest.approx(branch[step][0], abs=tolerance, rel=0)


def phases(*ends):
    """These, and books alone to the end."""
    return [{"until": until, "weights": weights} for until, weights in (*ends, (1, {"books": 1}))]
