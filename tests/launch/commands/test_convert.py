"""The verbs that need no training: exchange with the reference, parity, bench, plan, and what wrong use looks like."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.cli import main

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_reference_checkpoint_goes_in_and_out_bit_equal(capsys, tmp_path):
    source = GOLDEN / "tiny_f64" / "state_dict.safetensors"
    code, _, errors = run(capsys, "import", source, tmp_path / "ours", "--context-length", 48)
    assert code == 0, errors
    for name in ("out.safetensors", "out.pth"):
        assert run(capsys, "export", tmp_path / "ours", tmp_path / name)[0] == 0
    original = load_file(source)
    exported = [
        load_file(tmp_path / "out.safetensors"),
        torch.load(tmp_path / "out.pth", weights_only=True)["model_state_dict"],
    ]
    for state in exported:
        assert state.keys() == original.keys()
        assert all(torch.equal(state[key], original[key]) for key in original)
    damaged = tmp_path / "ours" / "model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(bytes(data))
    code, _, errors = run(capsys, "export", tmp_path / "ours", tmp_path / "again.pth")
    assert code == 1 and "sha256 differs" in errors and not (tmp_path / "again.pth").exists()


def test_a_checkpoint_of_another_shape_names_the_key(capsys, tmp_path):
    source = GOLDEN / "tiny_f64" / "state_dict.safetensors"
    code, _, errors = run(capsys, "import", source, tmp_path / "x", "--model", GOLDEN / "padded_f64" / "config.json")
    assert code == 1 and "decoder." in errors and "shape" in errors and errors.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("case", "limit"), [("tiny_f64", 1e-9), ("padded_f64", 1e-9)])
def test_parity_as_json(capsys, case, limit):
    code, out, _ = run(capsys, "parity", GOLDEN / case, "--json")
    result = json.loads(out.splitlines()[-1])
    keys = [
        "logits",
        "A",
        "A_LM",
        "A_P",
        "G_LM",
        "loss",
        "total_loss",
        "dag",
        "gradients",
        "trajectory",
        "cached_logits",
    ]
    assert code == 0 and result["greedy_equal"] is True
    assert all(result[key] <= limit for key in keys)


def test_bench_keys(capsys, repository):
    code, out, _ = run(
        capsys, "bench", repository / "configs" / "quickstart.yaml", "--steps", 1, "--batch", 1, "--json"
    )
    result = json.loads(out.splitlines()[-1])
    keys = "train_tokens_per_second train_ratio_to_sdpa decode_tokens_per_second decode_ratio_to_sdpa peak_rss_mb"
    assert code == 0 and set(keys.split()) <= result.keys()


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
