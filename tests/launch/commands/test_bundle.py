"""`pldr bundle` and `pldr bundle verify` from a real checkpoint."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from launch.cli import main
from pipeline.inference.runtime import Bundle, NotFiniteRows
from pipeline.io.storage import MANIFEST
from pipeline.tracking.sqlite_store import merge_log
from tests.helpers.bundles import measured_keys


def test_bundle_verify_is_verify_and_an_error_is_one_line(capsys, tmp_path):
    for words in (["bundle", "verify"], ["verify"]):
        assert main([*words, str(tmp_path / "nowhere")]) == 1
        errors = capsys.readouterr().err
        assert "nowhere: no such bundle folder" in errors and errors.count("\n") == 1
    (tmp_path / "empty").mkdir()
    assert main(["bundle", "verify", "--json", str(tmp_path / "empty")]) == 1
    out, errors = capsys.readouterr()
    assert "MANIFEST.json: missing" in json.loads(out)["error"] and errors.count("\n") == 1


def test_generate_prints_the_others_and_names_the_prompt_without_logits(capsys, monkeypatch):
    class Poisoned:
        certified = True

        def generate(self, prompts, **settings):
            raise NotFiniteRows({1: 4}, [" one", None, " three"])

    monkeypatch.setattr(Bundle, "load", lambda path: Poisoned())
    words = ["generate", "b", "--prompt", "a", "--prompt", "b", "--prompt", "c", "--json"]
    assert main(words) == 1
    out, errors = capsys.readouterr()
    assert "a one\n" in out and "c three\n" in out
    assert "prompts[1]: the model's logits are NaN or infinite" in errors and errors.count("\n") == 1
    assert json.loads(out.splitlines()[-1])["completions"] == [" one", None, " three"]


def test_generate_takes_every_setting(capsys, make_bundle):
    path = make_bundle()
    given = {"max_new_tokens": 9, "temperature": 1.5, "top_k": 30, "top_p": 0.95}
    given |= {"min_p": 0.01, "repetition_penalty": 1.3, "seed": 4}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["generate", str(path), "--prompt", "the quick", "--json", *words]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])["completions"]
    assert said == Bundle.load(path).generate(["the quick"], **given)
    assert main(["generate", str(path), "--prompt", "the quick", "--no-speculate", "--json", *words]) == 0
    assert said == json.loads(capsys.readouterr().out.splitlines()[-1])["completions"]
    for name in given:
        if name not in ("max_new_tokens", "seed"):
            assert main(["generate", str(path), "--prompt", "the", f"--{name.replace('_', '-')}=-1"]) == 1
            assert capsys.readouterr().err.startswith(f"pldr: error: generate: {name}: -1")


def test_an_uncertified_bundle_is_one_clean_line(capsys, make_bundle):
    for certified, lines in ((True, 0), (False, 1)):
        bundle = make_bundle(f"bundle-{certified}", uncertified=not certified)
        assert main(["generate", str(bundle), "--prompt", "the", "--max-new-tokens", "2"]) == 0
        errors = capsys.readouterr().err
        assert errors.count("\n") == lines
        if lines:
            assert errors.startswith(f"pldr: warning: {bundle}: UNCERTIFIED bundle (failed checks: none)")


def test_verify_says_how_many_numbers_a_key_has(capsys, make_bundle, invariant, text):
    bundle = make_bundle(key_rank_section=measured_keys(invariant, text, [[6, 7], [8, 6]]))
    assert main(["verify", str(bundle)]) == 0
    assert "weights fp32, keys of 6.75 numbers on average, sha256" in capsys.readouterr().out
    assert main(["generate", str(bundle), "--prompt", "the", "--max-new-tokens", "4"]) == 0


AGAIN = """
import sys
from launch.cli import main
from pipeline.inference.runtime import Bundle, NotFiniteRows
config, *settings = sys.argv[1:]
for stage in ("consolidate", "extract", "validate", "bundle"):
    code = main([stage, config, *settings, *(["--uncertified"] if stage == "bundle" else [])])
    assert code == (3 if stage == "validate" else 0), (stage, code)
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_same_checkpoint_gives_the_same_bytes_elsewhere_and_later(capsys, monkeypatch, tmp_path, make_run):
    """One training of 20 steps (its certificate fails, so --uncertified); then everything after it twice: here, and in a copy
    of the run directory by another process with another hash seed, time zone, working directory and, of course, time."""
    path = make_run(tmp_path, steps=20, warmup_steps=2, validate_every=20, checkpoint_every=20, ranks=1)
    monkeypatch.chdir(tmp_path)
    for stage in ("shard", "tokenizer", "tokenize", "train"):
        assert main([stage, str(path)]) == 0, capsys.readouterr().err
    other = tmp_path / "copies" / "other"
    shutil.copytree(tmp_path / "run", other)
    merge_log(tmp_path / "mlflow.db")
    shutil.copy(tmp_path / "mlflow.db", other.parent)  # with its store: else it would be refused as a copy
    settings = ["post.max_format_loss=0.1", "post.register_as=null", "post.key_rank={max_loss: 0.01}"]
    moved = [f"run_dir={other}"]
    environment = {**os.environ, "PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo"}
    for weight_format in ("int8", "fp32"):
        learner = f"post.with_metric_learner={str(weight_format == 'fp32').lower()}"
        words = [sys.executable, "-c", AGAIN, str(path), *settings, f"post.weight_format={weight_format}", learner]
        for cwd, extra, env in ((tmp_path, [], os.environ), (other, moved, environment)):
            done = subprocess.run([*words, *extra], cwd=cwd, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        first, second = (folder / "bundle" for folder in (tmp_path / "run", other))
        names = sorted(p.name for p in first.iterdir())
        assert MANIFEST in names and names == sorted(p.name for p in second.iterdir())
        for name in names:
            data = (first / name).read_bytes()
            assert data == (second / name).read_bytes(), name
            assert str(tmp_path).encode() not in data, name
        capsys.readouterr()
        assert main(["bundle", "verify", str(second), "--json"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["certified"] is False and result["weight_format"] == weight_format
        assert result["metric_learner"] is (weight_format == "fp32") and result["numbers_per_key"] > 0
