"""launch/cli.py: usage, errors in one line and as JSON."""

import json

import pytest

from launch.cli import main


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "absent.yaml"], 2, "no such file"),
        (["plan", "CONFIG", "train.stps=1"], 2, "did you mean train.steps?"),
        (["plan", "CONFIG", "--mfu", "0"], 2, "--mfu is between 0 and 1"),
        (["parity", "/nowhere"], 1, "/nowhere"),
        (["verify", "/nowhere"], 1, "/nowhere"),
        (["generate", "/nowhere", "--prompt", "x"], 1, "/nowhere"),
        (["export", "/nowhere", "x.pth"], 1, "/nowhere"),
        (["bench", "CONFIG", "model.context_length=16"], 2, "bench"),
        (["train", "CONFIG", "--prepare", "0"], 2, "1 or more"),
        (["shard", "CONFIG", "data.sources=[{url: 'pipe:cat /etc/passwd'}]"], 2, "refused"),
        (["shard", "CONFIG", "run_dir=/proc/nowhere"], 2, "set run_dir to a folder that can be written"),
    ],
)
def test_wrong_use_is_one_line(capsys, repository, tmp_path, arguments, code, message):
    words = [str(repository / "configs" / "quickstart.yaml") if a == "CONFIG" else a for a in arguments]
    if "CONFIG" in arguments and not any(a.startswith("run_dir") for a in arguments):
        words.append(f"run_dir={tmp_path}")
    got, _, errors = run(capsys, *words)
    assert got == code and message in errors
    assert errors.startswith("pldr: error: ") and errors.count("\n") == 1


def test_a_failure_is_one_json_object_too(capsys, repository):
    code, out, _ = run(capsys, "plan", repository / "configs" / "quickstart.yaml", "train.stps=1", "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 2 == result["exit_code"] and "did you mean train.steps?" in result["error"]


def test_an_unknown_verb_or_option_is_usage(capsys):
    for arguments in (["fly"], ["plan", "x.yaml", "--fast"], ["generate", "b", "--prompt", "x", "key=value"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    capsys.readouterr()
