"""An export in stock transformers, from its directory: each way to run it gives our greedy tokens."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.inference.runtime import Bundle
from pipeline.inference.source import open_model
from pipeline.network import free_port
from pldr_model.model import PLDRModel
from tests.helpers.expected import Case, cases_of, logprobs
from tests.helpers.exports import write_export

transformers = pytest.importorskip("transformers")
NEW = 16  # tokens after each prompt; the context is 32
TOLERANCE = 1e-5  # of log-probabilities in fp32


@pytest.fixture(scope="module")
def bundle(bundle_folder: Path) -> Bundle:
    return Bundle.load(bundle_folder)


@pytest.fixture(scope="module")
def export(bundle_folder: Path) -> Path:
    return write_export(bundle_folder, bundle_folder.parent / "export")


@pytest.fixture(scope="module")
def cases(bundle: Bundle) -> list[Case]:
    cases = cases_of(bundle, count=6, new=NEW)
    assert len({len(case.prompt) for case in cases}) > 2 and len({tuple(case.new) for case in cases}) > 3
    return cases


def load(folder: Path, **settings: Any) -> Any:
    """Stock transformers with the directory's own code."""
    settings = {"dtype": torch.float32, **settings}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()


@pytest.fixture(scope="module")
def model(export: Path) -> Any:
    return load(export)


def continued(model: Any, case: Case, **settings: Any) -> list[int]:
    """The new tokens, greedy unless the settings say otherwise."""
    ids = torch.tensor([case.prompt])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **settings)
    return out[0, len(case.prompt) :].tolist()


@pytest.fixture(scope="module")
def exact(bundle: Bundle) -> PLDRModel:
    """Our model in fp64."""
    return copy.deepcopy(bundle.model).double()


def test_the_code_is_the_directorys(model: Any, export: Path) -> None:
    code = Path(sys.modules[type(model).__module__].__file__ or "")
    assert type(model).__module__.startswith("transformers_modules.") and code.name == "modeling_pldr.py"
    assert code.read_bytes() == (export / "modeling_pldr.py").read_bytes()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention(export: Path, exact: PLDRModel, cases: list[Case], attention: str) -> None:
    model = load(export, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert [continued(model, case) for case in cases] == [case.new for case in cases], "dynamic cache"
    model = model.double()
    for case in cases:
        ids = torch.tensor([case.prompt + case.new])
        with torch.inference_mode():
            torch.testing.assert_close(model(ids).logits, exact(ids, padded=False), atol=1e-10, rtol=0)


def test_it_opens_as_the_bundle_that_it_was_made_from(export: Path, bundle: Bundle) -> None:
    opened, ours = open_model(export), bundle.opened
    assert (opened.kind, opened.name, opened.certified) == ("hf", "export", True)
    assert (opened.sha256, opened.certificate, opened.generation) == (ours.sha256, ours.certificate, ours.generation)
    state = opened.model.state_dict()
    assert state.keys() == ours.model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.model.state_dict().items())


def test_without_a_cache(model: Any, cases: list[Case]) -> None:
    assert continued(model, cases[0], use_cache=False) == cases[0].new


def test_static_cache(model: Any, cases: list[Case]) -> None:
    for case in cases:
        assert continued(model, case, cache_implementation="static") == case.new


def test_assisted_also_when_the_draft_is_wrong(export: Path, model: Any, cases: list[Case]) -> None:
    draft = load(export)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3 * parameter.std())
    assert any(continued(draft, case) != case.new for case in cases), "the draft is another model"
    for case in cases:
        assert continued(model, case, assistant_model=draft) == case.new
        assert continued(model, case, prompt_lookup_num_tokens=3) == case.new


def test_a_left_padded_batch(model: Any, export: Path, cases: list[Case]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    tokenizer.padding_side = "left"
    batch = tokenizer.pad({"input_ids": [case.prompt for case in cases]}, return_tensors="pt")
    assert (batch["attention_mask"] == 0).any()
    with torch.inference_mode():
        out = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    for row, case in zip(out[:, batch["input_ids"].shape[1] :].tolist(), cases, strict=True):
        assert row[: len(case.new)] == case.new


def test_beams_find_what_our_logits_rate_higher(model: Any, bundle: Bundle, cases: list[Case]) -> None:
    better = 0
    for case in cases:
        ids = torch.tensor([case.prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False, num_beams=4,
            length_penalty=0.0, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        assert out.sequences.shape[1] == len(case.prompt) + 8
        score = sum(logprobs(bundle, out.sequences[0].tolist())[len(case.prompt) :])
        assert out.sequences_scores[0].item() == pytest.approx(score, abs=1e-4)
        if len(case.new) < 8:
            continue  # its greedy tokens end with eos, which the beams may not take
        one = sum(case.logprobs[len(case.prompt) : len(case.prompt) + 8])
        assert score >= one - 0.5, "beams may lose the best beginning, but not by much"
        better += score > one + 1e-4
    assert better, "four beams find more than one"


def test_generate_batch(model: Any, cases: list[Case]) -> None:
    """Continuous batching: a paged cache, requests of different lengths in one forward pass."""
    generation = transformers.GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=model.generation_config.eos_token_id
    )
    small = transformers.ContinuousBatchingConfig(
        page_size=16, num_blocks=16, max_batch_tokens=64, return_logprobs=True
    )  # the defaults take all the memory there is
    implementation = model.config._attn_implementation
    try:
        results = model.generate_batch(
            [case.prompt for case in cases], generation_config=generation, continuous_batching_config=small
        )
    finally:
        model.set_attn_implementation(implementation)
    assert [result.generated_tokens for result in results.values()] == [case.new for case in cases]
    for result, case in zip(results.values(), cases, strict=True):
        assert result.logprobs == pytest.approx(case.logprobs[len(case.prompt) :], abs=TOLERANCE, rel=1e-6)


def test_device_map(export: Path, cases: list[Case], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    assert continued(load(export, device_map="auto"), cases[0]) == cases[0].new
    parts = {"model.embed_tokens": "cpu", "model.embed_norm": "cpu", "model.layers.0": "cpu",
             "model.layers.1": "disk", "lm_head": "cpu"}  # fmt: skip
    model = load(export, device_map=parts, offload_folder=str(tmp_path / "offloaded"))
    assert model.model.layers[1].self_attn.g_lm.device.type == "meta", "a layer lies on disk until it runs"
    assert [continued(model, case) for case in cases] == [case.new for case in cases]


def test_torch_export_gives_a_graph_for_every_length(model: Any, bundle: Bundle, cases: list[Case]) -> None:
    tokens = torch.export.Dim("tokens", min=2, max=bundle.config.context_length)
    with torch.no_grad():
        program = torch.export.export(
            model,
            (),
            {"input_ids": torch.tensor([cases[0].prompt]), "use_cache": False},
            dynamic_shapes={"input_ids": {1: tokens}, "use_cache": None},
        )
        run = program.module()
        for case in cases:
            ids = case.prompt + case.new
            got = run(input_ids=torch.tensor([ids]), use_cache=False).logits
            torch.testing.assert_close(got, model(torch.tensor([ids])).logits, atol=1e-5, rtol=1e-5)


def test_saved_again_it_is_a_directory_that_loads(model: Any, export: Path, cases: list[Case], tmp_path: Path) -> None:
    again = tmp_path / "again"
    model.save_pretrained(again)
    transformers.AutoTokenizer.from_pretrained(export).save_pretrained(again)
    loaded = load(again)
    state = model.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert [continued(loaded, case) for case in cases] == [case.new for case in cases]
    text = "the lazy dog"
    tokenizers = [transformers.AutoTokenizer.from_pretrained(folder) for folder in (export, again)]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]


@pytest.mark.slow
def test_tensor_parallel_on_two_ranks(export: Path, bundle: Bundle, cases: list[Case], tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps([case.prompt for case in cases]))
    worker = Path(__file__).with_name("tensor_parallel.py")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
         "--master-port", str(free_port()), str(worker), str(export), str(tmp_path / "prompts.json"), str(tmp_path), str(NEW)],
        check=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    for rank in range(2):
        result = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert result["heads"] == bundle.config.num_heads // 2, "each rank has its own heads"
        assert result["new"] == [case.new for case in cases]
