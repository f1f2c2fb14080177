"""Ours against the reference implementation's own numbers."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pldr_model import parity as module
from pldr_model.convert import to_reference
from pldr_model.model import PLDRModel
from pldr_model.parity import NUMBERS, parity


@pytest.fixture(scope="module")
def found(golden):
    """The results of the cases that are used several times."""
    return {name: parity(golden / name) for name in ("tiny_f64", "padded_f64")}


@pytest.mark.parametrize("case", ["tiny_f64", "padded_f64"])
def test_these_fp64_cases_agree_in_everything(found, case):
    result = found[case]
    assert {name: result[name] for name in NUMBERS if not result[name] <= 1e-9} == {}
    assert result["greedy_equal"] is True and result["failed"] == [] and result["ill_conditioned"] == []
    assert all(result["spread"][name] < 1e-8 for name in NUMBERS)
    # A mean may round to the same number.
    assert all(result["spread"][name] > 0 for name in NUMBERS if "loss" not in name)


def test_fp32_case_agrees_in_logits_and_tokens(golden):
    result = parity(golden / "base_f32")
    assert {"gradients", "trajectory", "A_P"} < set(result["not_judged"])
    assert result["A"] <= 3e-6  # rounding, of which A_LM ** P makes ten times as much in G_LM
    assert result["logits"] <= 1e-4
    assert result["cached_logits"] <= 2e-5
    assert result["loss"] <= 1e-6
    assert result["greedy_equal"] is True and result["failed"] == []


def test_reference_overflow_is_named_and_left_out(found):
    assert found["tiny_f64"]["dag_overflowed_in_reference"] == ["A_P", "G_LM"]
    assert found["padded_f64"]["dag_overflowed_in_reference"] == []


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


@pytest.fixture(scope="module")
def rounded(golden, tmp_path_factory):
    """A case with an ill-conditioned trajectory: padded_f64 with other weights and larger steps. Its "reference" is our own
    code with weights that differ in the last bits."""
    case = shutil.copytree(golden / "padded_f64", tmp_path_factory.mktemp("parity") / "case")
    files = module._read(case)
    torch.manual_seed(6)
    state = PLDRModel(files.config).double().state_dict()
    weights = {key: weight.contiguous() for key, weight in to_reference(state, files.config).items()}
    for step in files.trajectory["steps"]:
        step["lr"] *= 3
    numbers = module._run(files, module._perturb(weights, 9e-16, seed=99))
    trajectory = numbers.pop("trajectory")
    for index, step in enumerate(files.trajectory["steps"]):
        step |= {key: float(trajectory[f"step{index}.{key}"]) for key in ("loss", "total_loss")}
    expected = {"ids": files.expected["ids"]}
    for of_one in numbers.values():
        expected |= {key: tensor.contiguous() for key, tensor in of_one.items()}
    (greedy,) = module.generate(files.model(weights), [files.generation["prompt"]], max_new_tokens=8)
    save_file(expected, case / "expected.safetensors")
    save_file(weights, case / "state_dict.safetensors")
    (case / "trajectory.json").write_text(json.dumps(files.trajectory))
    (case / "generation.json").write_text(
        json.dumps({"prompt": files.generation["prompt"], "greedy_with_kv_and_g_cache": greedy})
    )
    return case


def test_a_difference_that_rounding_explains_is_marked_and_one_that_it_does_not_fails(rounded, tmp_path):
    result = parity(rounded)
    assert 1e-9 < result["trajectory"] <= 5 * result["spread"]["trajectory"]
    assert result["ill_conditioned"] == ["trajectory"] and result["failed"] == []
    case = shutil.copytree(rounded, tmp_path / "case")
    trajectory = json.loads((case / "trajectory.json").read_text())
    trajectory["optimizer"]["betas"][1] = 0.951  # another optimizer
    (case / "trajectory.json").write_text(json.dumps(trajectory))
    result = parity(case)
    assert result["failed"] == ["trajectory"] and result["ill_conditioned"] == []


def test_no_spread_explains_a_large_difference(rounded, monkeypatch):
    monkeypatch.setattr(module, "EXPLAINED", math.inf)
    monkeypatch.setattr(module, "CEILING", 1e-12)
    assert parity(rounded)["failed"] == ["trajectory"]


def test_a_folder_that_is_no_case_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        parity(tmp_path)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("trajectory.json", lambda data: data.update(steps=[]), "trajectory.json has no steps"),
        ("generation.json", lambda data: data.update(prompt=[]), "RuntimeError"),
        ("generation.json", lambda data: data.clear(), "KeyError: "),
        ("expected.safetensors", lambda tensors: tensors.pop("logits"), "KeyError: 'logits'"),
        ("expected.safetensors", lambda tensors: tensors.update(logits=torch.zeros(2)), "another shape"),
        ("state_dict.safetensors", lambda tensors: tensors.pop("final_layer.weight"), "KeyError: 'final_layer.weight'"),
    ],
)
def test_a_damaged_case_is_no_agreement_and_no_traceback(golden, tmp_path, name, damage, message):
    file = shutil.copytree(golden / "tiny_f64", tmp_path / "case") / name
    if name.endswith(".json"):
        damage(data := json.loads(file.read_text()))
        file.write_text(json.dumps(data))
    else:
        damage(tensors := load_file(file))
        save_file(tensors, file)
    with pytest.raises(ValueError, match="not a whole golden case") as caught:
        parity(file.parent)
    assert message in str(caught.value) and "\n" not in str(caught.value) and str(file.parent) in str(caught.value)
