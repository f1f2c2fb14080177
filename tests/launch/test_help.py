"""What `pldr` says of itself."""

import os
import subprocess
import sys

import pytest

from launch.cli import GROUPS, build_parser, main


def test_every_verb_is_in_one_group():
    shown = [name for names in GROUPS.values() for name in names]
    assert len(shown) == len(set(shown))
    assert set(shown) == set(build_parser().verbs.helps) - {"bundle verify"}  # the long name of verify


def test_pldr_alone_shows_the_verbs_in_groups(capsys):
    with pytest.raises(SystemExit) as exit:
        main([])
    out = capsys.readouterr().out
    assert exit.value.code == 2
    found = [out.index(text) for text in ("data:", "tokenize ", "prove:", "validate ", "options:")]
    assert found == sorted(found)


@pytest.mark.parametrize(
    "words", [["verify"], ["bundle", "verify"], ["data", "report"], ["export"], ["export", "hf"], ["import", "hf"]]
)
def test_a_verbs_help_shows_its_own_name(capsys, words):
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: pldr {' '.join(words)} ")


def test_the_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out.startswith("pldr 0.")


@pytest.mark.parametrize(
    ("line", "expected"),
    [("pldr tok", {"tokenizer", "tokenize"}), ("pldr plan x.yaml train.warm", {"train.warmup_steps="})],
)
def test_a_shell_completes_verbs_and_keys(tmp_path, line, expected):
    answer = tmp_path / "answer"
    environment = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_IFS": "\n",
    }
    environment |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    subprocess.run([sys.executable, "-m", "launch.cli"], env=environment, capture_output=True, check=False)
    assert {word.strip() for word in answer.read_text().splitlines()} == expected
