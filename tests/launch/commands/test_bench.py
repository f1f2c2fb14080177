"""`pldr bench`: its keys, and options that go with another benchmark."""

import json

import pytest

from launch.cli import main


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_bench_keys(capsys, repository):
    code, out, _ = run(
        capsys, "bench", repository / "configs" / "quickstart.yaml", "--steps", 1, "--batch", 1, "--json"
    )
    result = json.loads(out.splitlines()[-1])
    keys = "train_tokens_per_second train_ratio_to_sdpa decode_tokens_per_second decode_ratio_to_sdpa peak_rss_mb"
    assert code == 0 and set(keys.split()) <= result.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "--steps", "3"], "bench data: takes no steps; that is for `pldr bench CONFIG`"),
        (["data", "seed=3"], "bench data: takes no overrides"),
        (["tiny.yaml", "--text", "x.txt"], "takes no text; that is for `pldr bench data`"),
        (["validate", "--steps", "3"], "bench validate: takes no steps; that is for `pldr bench CONFIG`"),
        (["tiny.yaml", "--prompts", "3"], "takes no prompts; that is for `pldr bench validate`"),
        (["validate", "--prompts", "0"], "--prompts 0: at least 1"),
        (["validate", "seed=3"], "bench validate: name one YAML or none"),
        (["startup", "--batch", "3"], "bench startup: takes no batch"),
        (["startup", "--repeats", "0"], "--repeats 0: at least 1"),
    ],
)
def test_an_option_of_another_benchmark_is_refused(capsys, arguments, message):
    code, _, errors = run(capsys, "bench", *arguments)
    assert code == 2 and message in errors and errors.count("\n") == 1


@pytest.mark.slow
def test_startup_times_every_command(capsys):
    code, out, errors = run(capsys, "bench", "startup", "--repeats", "1", "--json")
    assert code == 0, errors
    result = json.loads(out.splitlines()[-1])
    assert list(result) == ["help", "wrong_key", "check", "runs"]
    assert all(row["seconds"] > 0 and row["limit_s"] > 0 for row in result.values())
