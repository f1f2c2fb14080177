"""`pldr import`, `export` and `parity`: checkpoints of the reference implementation in and out."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from launch.cli import main
from pldr_model import parity
from pldr_model.parity import NUMBERS

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
    (plain := tmp_path / "plain").touch()
    for file in ("ours/model.safetensors", "out.safetensors", "out.pth"):  # others may read them, as any file
        assert (tmp_path / file).stat().st_mode == plain.stat().st_mode
    damaged = tmp_path / "ours" / "model.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(bytes(data))
    code, _, errors = run(capsys, "export", tmp_path / "ours", tmp_path / "again.pth")
    assert code == 1 and "sha256 differs" in errors and not (tmp_path / "again.pth").exists()


def test_a_folder_called_hf_is_exported_as_any_other(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = GOLDEN / "tiny_f64" / "state_dict.safetensors"
    assert run(capsys, "import", source, "hf", "--context-length", 48)[0] == 0
    assert run(capsys, "export", "hf", "out.safetensors")[0] == 0
    assert load_file("out.safetensors").keys() == load_file(source).keys()


def test_a_checkpoint_of_another_shape_names_the_key(capsys, tmp_path):
    source = GOLDEN / "tiny_f64" / "state_dict.safetensors"
    code, _, errors = run(capsys, "import", source, tmp_path / "x", "--model", GOLDEN / "padded_f64" / "config.json")
    assert code == 1 and "decoder." in errors and "shape" in errors and errors.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_parity_of_several_cases_ends_with_a_verdict(capsys, tmp_path):
    code, out, _ = run(capsys, "parity", GOLDEN / "tiny_f64", GOLDEN / "padded_f64", "--json")
    assert code == 0 and "2 of 2 cases agree with the reference" in out
    cases = json.loads(out.splitlines()[-1])["cases"]
    for case in ("tiny_f64", "padded_f64"):
        result = cases[str(GOLDEN / case)]
        assert result["greedy_equal"] is True and all(result[key] <= 1e-9 for key in NUMBERS)
    other = shutil.copytree(GOLDEN / "tiny_f64", tmp_path / "other")
    generation = json.loads((other / "generation.json").read_text())
    generation["greedy_with_kv_and_g_cache"][0] += 1
    (other / "generation.json").write_text(json.dumps(generation))
    code, out, errors = run(capsys, "parity", GOLDEN / "padded_f64", other)
    assert code == 1 and f"{other}: ours and the reference's numbers differ" in errors
    assert "DIFFERS in greedy_equal" in out


def test_parity_prints_the_spread_beside_each_number_and_names_what_rounding_decides(capsys, monkeypatch):
    real = parity.parity

    def ill_conditioned(case):
        return real(case) | {"trajectory": 3.6e-4, "ill_conditioned": ["trajectory"]}

    case = GOLDEN / "padded_f64"
    code, out, _ = run(capsys, "parity", case)
    assert code == 0 and "weights perturbed by 9e-16" in out and "ill-conditioned" not in out
    lines = [line.split() for line in out.splitlines() if line.strip().split(" ")[0] in NUMBERS]
    spreads = {words[0]: float(words[2]) for words in lines}
    assert spreads.keys() == set(NUMBERS) and all(0 <= spread < 1e-8 for spread in spreads.values())
    assert all(
        spread > 0 for name, spread in spreads.items() if "loss" not in name
    )  # a mean may round to the same number
    monkeypatch.setattr(parity, "parity", ill_conditioned)
    code, out, _ = run(capsys, "parity", case)
    assert code == 0 and "except that rounding decides: trajectory (0.00036, spread" in out
    assert f"no evidence below their spread: numbers of {case}" in out
