"""An export certifies itself, says what it is, and comes back bit for bit; what is damaged or foreign is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.cli import main
from pipeline.bundle.weights import load_weights
from pipeline.errors import UserError
from pipeline.inference.hf import export as export_module
from pipeline.inference.hf.expectation import EMBEDDING, EXACT, expect
from pipeline.inference.hf.export import export_hf
from pipeline.inference.hf.imported import read_directory
from pipeline.inference.hf.load import build, read_export
from pipeline.inference.hf.selfcheck import _problem, check_export, measure
from pipeline.inference.hf.texts import checked_texts
from pipeline.inference.opened import OpenModel
from pipeline.inference.source import open_model
from pipeline.io.storage import render_json
from pldr_model.config import ModelConfig
from pldr_model.convert import from_reference
from tests.helpers.exports import write_export

pytest.importorskip("transformers")
GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "tiny_f64"
FILES = {
    *(
        "README.md",
        "certificate.json",
        "config.json",
        "configuration_pldr.py",
        "generation_config.json",
        "model.safetensors",
    ),
    *("modeling_pldr.py", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "MANIFEST.json"),
}


@pytest.fixture(scope="module")
def bundle(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of its own: tests here aim at it."""
    return Path(shutil.copytree(bundle_folder, tmp_path_factory.mktemp("export") / "bundle"))


@pytest.fixture(scope="module")
def opened(bundle: Path) -> OpenModel:
    return open_model(bundle)


@pytest.fixture(scope="module")
def written(bundle: Path) -> Path:
    return write_export(bundle, bundle.parent / "written")


@pytest.fixture
def export(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(written, tmp_path / "export")


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of this test take the numbers of an earlier self-check: what it does is tested elsewhere."""
    monkeypatch.setattr(export_module, "checked_texts", lambda _: (["a"], "one text"))
    found = {
        "logits": {"difference": 0.0, "largest": 1.0, "top1": 1.0, "finite": True},
        "exact": 0.0,
        "rounding": 0.0,
        "greedy": {"prompts": 20, "equal": 20, "tokens": 640, "gap": 0.0},
        "tokenizer": {"texts": 1, "other_ids": 0, "other_text": 0, "first": None},
        "versions": {"transformers": "0"},
    }
    native = {"native": found["logits"]}
    monkeypatch.setattr(
        export_module,
        "check_export",
        lambda *_, rounded: json.loads(json.dumps({**found, **(native if rounded else {})})),
    )


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, **changes: Any) -> None:
    path.write_bytes(render_json({**json.loads(path.read_bytes()), **changes}))


def test_a_certified_bundle_is_written_checked_and_marked(written: Path, opened: OpenModel) -> None:
    assert {path.name for path in written.iterdir()} == FILES
    assert len({path.stat().st_mode for path in written.iterdir()}) == 1  # whoever reads one reads all
    manifest = read_export(written).manifest
    assert manifest["kind"] == "pldr-hf-export" and manifest["certified"] is True
    assert manifest["bundle_sha256"] == opened.sha256 and manifest["files"].keys() == FILES - {"MANIFEST.json"}
    check = manifest["selfcheck"]
    assert check["logits"]["difference"] <= 1e-5 * max(1, check["logits"]["largest"])
    assert check["greedy"]["prompts"] == check["greedy"]["equal"] == 20 and check["greedy"]["tokens"] > 100
    assert check["tokenizer"]["texts"] > 1000 and check["tokenizer"]["other_ids"] <= check["tokenizer"]["texts"] / 1000
    config, card = json.loads((written / "config.json").read_bytes()), (written / "README.md").read_text()
    assert config["uncertified"] is None and config["bos_token_id"] is None and config["head_dim"] == 32
    assert "certified: G_LM may be cached" in card and "UNCERTIFIED" not in card
    assert opened.certificate is not None and opened.certificate["statement"] in card
    assert "greedy tokens: equal for 20 of 20 prompts" in card
    assert json.loads((written / "certificate.json").read_bytes()) == opened.certificate


def test_it_comes_back_bit_for_bit(written: Path, opened: OpenModel, tmp_path: Path) -> None:
    parts = read_export(written)
    state = opened.model.state_dict()
    assert parts.config == opened.config and parts.tokenizer.sha256 == opened.tokenizer.sha256
    assert parts.weights.keys() == state.keys() and all(torch.equal(parts.weights[name], state[name]) for name in state)
    assert main(["import", "hf", str(written), str(tmp_path / "folder")]) == 0
    model, source = load_weights(tmp_path / "folder")
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    assert torch.equal(load_file(tmp_path / "folder" / "g_lm.safetensors")["g_lm"], opened.g_lm)
    assert source == {"imported_from": "written", "sha256": opened.sha256}
    again = open_model(written)
    assert again.certified and again.kind == "hf" and torch.equal(again.g_lm, opened.g_lm)


def test_a_model_in_memory_is_the_same(opened: OpenModel, written: Path) -> None:
    model, tokenizer = build(opened)
    state = load_file(written / "model.safetensors")
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert tokenizer("the lazy dog")["input_ids"] == opened.tokenizer.encode("the lazy dog")


def test_the_check_counts_what_differs_and_judges_it(written: Path, opened: OpenModel) -> None:
    expected, logits = expect(opened.model, opened.tokenizer, seed="x", texts=checked_texts(None)[0])
    values = {**expected.to_dict(), "rounded": False}
    right = measure(str(written), values, logits)
    assert _problem(right) is None and right["tokenizer"]["texts"] > 1000

    # Vectors of tokens that are in no prompt.
    assert _problem({**right, "embedding": False}) == "vectors of tokens"
    swapped = {**logits, EMBEDDING: logits[EMBEDDING].roll(1, 0)}
    assert right["embedding"] and not measure(str(written), values, swapped)["embedding"]

    # What decoding does by default, and the other attention.
    assert right["settings"] == [] and right["eager"] <= 1e-5
    assert "attention 'eager' by 0.1" in str(_problem({**right, "eager": 0.1}))
    other = {**values, "settings": {**values["settings"], "eos_token_id": [3, 3, 2], "padding_side": "right"}}
    found = measure(str(written), other, logits)
    assert found["settings"] == ["eos_token_id", "padding_side"] and "eos_token_id, padding_side" in str(
        _problem(found)
    )

    logits = {name: tensor.clone() for name, tensor in logits.items()}
    logits["3"][0, 0] += 1
    logits[EXACT][0, 0] += 1e-5
    values["greedy"][7][-1] ^= 1
    allowed = len(values["texts"]) // 1000
    for ids in values["ids"][: allowed + 1]:
        ids.append(9)
    wrong = measure(str(written), values, logits)
    assert wrong["logits"]["difference"] == pytest.approx(1, abs=1e-3)
    assert (
        wrong["greedy"]["equal"] == 19
        and wrong["tokenizer"]["other_ids"] == right["tokenizer"]["other_ids"] + allowed + 1
    )
    assert right["exact"] < 1e-10 and wrong["exact"] == pytest.approx(1e-5, rel=1e-3)
    for part, message in (
        ("logits", "logits by 1"),
        ("exact", "in fp64 by 1e-05"),
        ("greedy", "1 of 20 prompts"),
        ("tokenizer", "the tokenizer on"),
    ):
        assert message in str(_problem({**right, part: wrong[part]}))
    tie = {**wrong["greedy"], "gap": 1e-5}
    assert wrong["greedy"]["gap"] > 0.01 and _problem({**right, "greedy": tie}) is None
    # A model that fp32 itself changes more may differ by twice that.
    assert _problem({**right, "logits": {**right["logits"], "difference": 0.02}, "rounding": 0.01}) is None
    assert _problem({**right, "logits": {**right["logits"], "difference": 0.02}, "rounding": 0.009}) is not None
    assert _problem({**right, "tokenizer": {**right["tokenizer"], "other_ids": allowed, "other_text": allowed}}) is None

    logits["3"][0, 0] = float("nan")
    assert "not finite" in str(_problem(measure(str(written), values, logits)))


@pytest.mark.slow
def test_an_export_that_differs_is_not_published(
    opened: OpenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bias of what is written is wrong; nothing else is touched, and the fresh process finds it."""
    write_shards = export_module.write_shards

    def wrong(tensors: dict[str, torch.Tensor], *arguments: Any, **keywords: Any) -> None:
        write_shards({**tensors, "lm_head.bias": tensors["lm_head.bias"] + 1e-3}, *arguments, **keywords)

    monkeypatch.setattr(export_module, "write_shards", wrong)
    message = refused(lambda: export_hf(opened, tmp_path / "out" / "wrong"))
    assert "the export differs from the model: logits by 0.001" in message
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_an_export_whose_code_fails_is_not_published(written: Path, opened: OpenModel, export: Path) -> None:
    (export / "modeling_pldr.py").write_text("raise RuntimeError('broken')\n")
    expected, logits = expect(opened.model, opened.tokenizer, seed="x", texts=["a"])
    message = refused(lambda: check_export(export, expected, logits))
    assert "does not work in a fresh process" in message and "broken" in message


def test_uncertified_and_rounded_exports_are_marked(
    opened: OpenModel, bundle: Path, make_bundle: Callable[..., Path], certificate: dict[str, Any], tmp_path: Path,
    unchecked: None,
) -> None:  # fmt: skip
    doubtful = open_model(make_bundle(uncertified=True))
    for source, settings in ((doubtful, {}), (opened, {"dtype": "bf16"}), (opened, {"dtype": "fp16"})):
        manifest = export_hf(source, tmp_path / "out", **settings)
        card = (tmp_path / "out" / "README.md").read_text()
        heading = next(line for line in card.splitlines() if line.startswith("#"))
        assert manifest["certified"] is False and "UNCERTIFIED" in heading
        assert json.loads((tmp_path / "out" / "config.json").read_bytes())["uncertified"] in heading
        assert ("not about this directory" in card) == bool(settings)
        assert not open_model(tmp_path / "out").certified


def test_rounded_weights_stay_uncertified_when_they_are_exported_again(
    opened: OpenModel, tmp_path: Path, unchecked: None
) -> None:
    """As fp32 they are not those of the certificate either, and no card says so."""
    export_hf(opened, tmp_path / "bf16", dtype="bf16")
    for source, target in (("bf16", "again"), ("again", "third")):
        rounded = open_model(tmp_path / source)
        assert "weights are rounded" in str(rounded.caution)
        manifest = export_hf(rounded, tmp_path / target)
        card = (tmp_path / target / "README.md").read_text()
        assert (
            not manifest["certified"] and manifest["dtype"] == "fp32" and "rounded weights" in manifest["uncertified"]
        )
        assert "and not about this directory" in card


def test_nothing_is_written_among_verified_files(
    opened: OpenModel, bundle: Path, export: Path, unchecked: None
) -> None:
    for target in (bundle / "hf", bundle / "a" / "b", export / "hf"):
        assert "name another folder" in refused(lambda target=target: export_hf(opened, target))
        assert not target.exists()
    assert main(["import", "hf", str(export), str(bundle)]) == 1  # its files have the names of a bundle's
    assert open_model(bundle).certified
    export_hf(opened, export)  # an export itself is replaced


def test_a_disk_that_is_full_is_one_line(
    opened: OpenModel, tmp_path: Path, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    def full(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")  # what `tokenizers` raises

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    message = refused(lambda: export_hf(opened, tmp_path / "out"))
    assert "the tokenizer cannot be written (No space left" in message and not list(tmp_path.iterdir())


def test_weights_that_are_no_floating_point_numbers_are_refused(export: Path) -> None:
    (export / "MANIFEST.json").unlink()
    tensors = load_file(export / "model.safetensors")
    save_file({name: tensor.to(torch.int32) for name, tensor in tensors.items()}, export / "model.safetensors")
    assert "floating-point" in refused(lambda: read_directory(export))


def test_rounded_weights_come_back_as_they_were_written(opened: OpenModel, tmp_path: Path, unchecked: None) -> None:
    export_hf(opened, tmp_path / "out", dtype="bf16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    state = opened.model.state_dict()
    weights = read_export(tmp_path / "out").weights
    assert all(torch.equal(weights[name], state[name].bfloat16().float()) for name in state)


def test_numbers_that_fp16_cannot_hold_are_refused(opened: OpenModel, tmp_path: Path) -> None:
    bias = opened.model.output.bias
    with torch.no_grad():
        kept, bias[5] = bias[5].item(), 1e6
        message = refused(lambda: export_hf(opened, tmp_path / "out", dtype="fp16"))
        bias[5] = kept
    assert "lm_head.bias" in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("value", "problem"), [(float("nan"), "lm_head.weight holds NaN"), (3e38, "NaN or infinite")])
def test_a_model_without_finite_logits_is_refused(
    opened: OpenModel, tmp_path: Path, value: float, problem: str
) -> None:
    weight = opened.model.output.weight
    with torch.no_grad():
        kept = weight[5].clone()
        weight[5] = value
        message = refused(lambda: export_hf(opened, tmp_path / "out"))
        weight[5] = kept
    assert problem in message and not list(tmp_path.iterdir())


def test_shards(opened: OpenModel, tmp_path: Path, unchecked: None) -> None:
    import transformers

    export_hf(opened, tmp_path / "out", shard_size="20KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 1 and {path.name for path in files} == set(index["weight_map"].values())
    state = opened.model.state_dict()
    weights = read_export(tmp_path / "out").weights
    assert all(torch.equal(weights[name], state[name]) for name in state)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(model.lm_head.weight, state["output.weight"])


@pytest.mark.parametrize("size", ["", "5", "0GB", "-1GB", "5TB", "1e3MB", "GB"])
def test_what_is_no_size_is_refused(opened: OpenModel, tmp_path: Path, size: str) -> None:
    assert "--shard-size" in refused(lambda: export_hf(opened, tmp_path / "out", shard_size=size))


def test_only_an_export_or_an_empty_folder_is_replaced(opened: OpenModel, tmp_path: Path, unchecked: None) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    export_hf(opened, mine)
    export_hf(opened, mine)
    (tmp_path / "link").symlink_to(mine)
    (tmp_path / "file").touch()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").touch()
    for name in ("link", "file", "work"):
        assert "name" in refused(lambda name=name: export_hf(opened, tmp_path / name))
    assert (tmp_path / "work" / "thesis.tex").exists()


def test_a_bundle_has_no_metric_learner_to_export(opened: OpenModel, tmp_path: Path) -> None:
    assert "--live" in refused(lambda: export_hf(opened, tmp_path / "out", live=True))


def test_a_live_export_says_what_it_is_and_comes_back(
    opened: OpenModel, tiny: Any, tmp_path: Path, unchecked: None
) -> None:
    learned = replace(opened, live=tiny.make_model(gain=1.0))
    manifest = export_hf(learned, tmp_path / "out", live=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert manifest["certified"] is False and manifest["live"] is True
    assert "UNCERTIFIED: with its metric learner" in card and "not vLLM" in card and "vllm serve" not in card
    assert main(["import", "hf", str(tmp_path / "out"), str(tmp_path / "folder")]) == 0
    model = load_weights(tmp_path / "folder")[0]
    assert learned.live is not None and model.config == learned.live.config
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in learned.live.state_dict().items())
    assert not (tmp_path / "folder" / "g_lm.safetensors").exists()


@pytest.mark.slow
def test_a_live_export_of_a_model_that_is_not_invariant_is_checked(
    opened: OpenModel, tiny: Any, tmp_path: Path
) -> None:
    learned = replace(opened, live=tiny.make_model(gain=1.0))
    check = export_hf(learned, tmp_path / "out", live=True)["selfcheck"]
    assert check["greedy"]["equal"] == 20 and check["exact"] < 1e-10
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", sorted(FILES - {"MANIFEST.json"}))
def test_a_changed_byte_is_found(export: Path, name: str) -> None:
    data = bytearray((export / name).read_bytes())
    data[len(data) // 2] ^= 1
    (export / name).write_bytes(bytes(data))
    assert f"{name}: sha256 differs" in refused(lambda: read_export(export))
    (export / name).unlink()
    assert f"{name}: missing" in refused(lambda: read_export(export))


def test_a_changed_manifest_is_found(export: Path) -> None:
    edit(export / "MANIFEST.json", certified=False)
    assert "MANIFEST.json" in refused(lambda: read_export(export))


def saved_again(export: Path, **changes: Any) -> Path:
    """As `save_pretrained` leaves it: without our manifest."""
    (export / "MANIFEST.json").unlink()
    if changes:
        edit(export / "config.json", **changes)
    return export


def test_what_save_pretrained_writes_is_imported(export: Path, opened: OpenModel, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert main(["import", "hf", str(tmp_path / "again"), str(tmp_path / "folder")]) == 0
    loaded = load_weights(tmp_path / "folder")[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in opened.model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"num_hidden_layers": 3}, "larger model"),
        ({"num_hidden_layers": 10**12}, "larger model"),
        ({"num_hidden_layers": 1}, "not a tensor"),
        ({"qk_head_dim": 7}, "odd"),
        ({"qk_head_dim": None}, "head_dim"),
        ({"vocab_size": "48"}, "vocab_size"),
        ({"rope_parameters": None}, "config.json"),
        ({"source_rope_style": "spiral"}, "source_rope_style"),
        ({"g_source": "guessed"}, "g_source"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}}, "'yarn'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_size": 20}, "hidden_size"),
        ({"v_head_dim": 4}, "v_head_dim"),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    export: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    code = main(["import", "hf", str(saved_again(export, **changes)), str(tmp_path / "folder")])
    errors = capsys.readouterr().err
    assert code != 0 and problem in errors and errors.count("\n") == 1 and not (tmp_path / "folder").exists()


def make_port(folder: Path, **changes: Any) -> ModelConfig:
    """The golden reference model as the published transformers port stores it, in three files."""
    state = {name: tensor.float() for name, tensor in load_file(GOLDEN / "state_dict.safetensors").items()}
    golden = json.loads((GOLDEN / "config.json").read_bytes())
    folder.mkdir()
    renamed = {"dff": "intermediate_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
               "max_seq_len": "max_position_embeddings", "d_model": "hidden_size", "rope_base": "rope_theta"}  # fmt: skip
    values = {renamed.get(key, key): value for key, value in golden.items() if key != "rope_style"}
    values |= {"model_type": "pldrllm", "reference_rope": True, "custom_G_type": None, "cache_first_G": False}
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    names = sorted(state)
    files = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return ModelConfig.from_transformers(values)


def test_the_published_ports_checkpoints_are_read(tmp_path: Path) -> None:
    config = make_port(tmp_path / "port")
    assert main(["import", "hf", str(tmp_path / "port"), str(tmp_path / "folder")]) == 0
    model, source = load_weights(tmp_path / "folder")
    state = {name: tensor.float() for name, tensor in load_file(GOLDEN / "state_dict.safetensors").items()}
    expected = from_reference(state, config)
    assert model.config == config and source["imported_from"] == "port"
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.items())
    assert not (tmp_path / "folder" / "g_lm.safetensors").exists()


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ({"decoder.embedding.weight": "../port/model-00001-of-00003.safetensors"}, "same folder"),
        ({"decoder.embedding.weight": "/etc/passwd"}, "same folder"),
        ({"decoder.embedding.weight": "weights.bin"}, "no safetensors"),
        ({"decoder.embedding.weight": "other.safetensors"}, "missing"),
        ({"decoder.embedding.weight": "model-00001-of-00003.safetensors"}, "does not list decoder.embedding.weight"),
        ({"more": "model-00001-of-00003.safetensors"}, "does not hold"),
        ({"more": 7}, "weight_map"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, where: dict[str, Any], problem: str
) -> None:
    make_port(tmp_path / "port")
    index = tmp_path / "port" / "model.safetensors.index.json"
    files = json.loads(index.read_bytes())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**files, **where}}))
    assert main(["import", "hf", str(tmp_path / "port"), str(tmp_path / "folder")]) != 0
    errors = capsys.readouterr().err
    assert problem in errors and errors.count("\n") == 1 and not (tmp_path / "folder").exists()


def test_foreign_directories_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, bundle: Path
) -> None:
    make_port(tmp_path / "external", custom_G_type="external")
    make_port(tmp_path / "huge", num_hidden_layers=10**12)
    make_port(tmp_path / "pickle")
    for path in (tmp_path / "pickle").glob("*.safetensors*"):
        path.unlink()
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"\x80")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    problems = {
        "external": "external",
        "huge": "larger model",
        "pickle": "no pickle",
        "empty": "config.json",
        "broken": "JSON",
        "absent": "config.json",
    }
    for name, problem in problems.items():
        assert main(["import", "hf", str(tmp_path / name), str(tmp_path / "folder")]) != 0
        errors = capsys.readouterr().err
        assert problem in errors and errors.count("\n") == 1, name
    assert main(["import", "hf", str(bundle), str(tmp_path / "folder")]) != 0
    assert "a bundle" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()
