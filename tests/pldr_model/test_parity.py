"""Ours against the reference implementation's own numbers."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from pldr_model.parity import parity

NUMBERS = [
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


@pytest.mark.parametrize("case", ["tiny_f64", "padded_f64"])
def test_fp64_case_agrees_in_everything(golden, case):
    result = parity(golden / case)
    assert {name: result[name] for name in NUMBERS if not result[name] <= 1e-9} == {}
    assert result["greedy_equal"] is True and result["failed"] == []


def test_fp32_case_agrees_in_logits_and_tokens(golden):
    result = parity(golden / "base_f32")
    assert result["logits"] <= 2e-5
    assert result["cached_logits"] <= 2e-5
    assert result["loss"] <= 1e-6
    assert result["greedy_equal"] is True and result["failed"] == []


def test_reference_overflow_is_named_and_left_out(golden):
    assert parity(golden / "tiny_f64")["dag_overflowed_in_reference"] == ["A_P", "G_LM"]
    assert parity(golden / "padded_f64")["dag_overflowed_in_reference"] == []


def test_a_wrong_weight_is_seen(golden, tmp_path):
    """Parity would be worthless if it passed with other weights or other tokens."""
    case = shutil.copytree(golden / "padded_f64", tmp_path / "case")
    state = load_file(case / "state_dict.safetensors")
    state["decoder.dec_layers.1.mha1.plgatt_layer.balst"] += 1e-6
    save_file(state, case / "state_dict.safetensors")
    generation = json.loads((case / "generation.json").read_text())
    generation["greedy_with_kv_and_g_cache"][3] += 1
    (case / "generation.json").write_text(json.dumps(generation))
    result = parity(case)
    assert result["G_LM"] == pytest.approx(1e-6, rel=1e-3)
    assert result["logits"] > 1e-9
    assert result["greedy_equal"] is False and {"G_LM", "logits", "greedy_equal"} <= set(result["failed"])


def test_a_folder_that_is_no_case_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        parity(tmp_path)
