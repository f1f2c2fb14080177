"""What `python -m pipeline.bench.projected` says of a run: losses with parts of its G, against a computation of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.bench import projected
from pipeline.bundle.extracted import save_g
from pipeline.bundle.weights import save_weights
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.io.sealed import publish_sealed
from pipeline.post.extract import extract_g
from pipeline.stages.trained import held_out
from pldr_model.model import PLDRModel
from pldr_model.rotary_part import rotary_part
from tests.helpers.stages import make_in

SIZES = ("model.num_layers=2", "model.num_heads=2", "model.head_dim=8", "model.A_dff=6", "model.num_reslayerA=2")
VARIANTS = {
    "learned": ("model.rope_style=half",),
    "constant": ("model.g_source=constant", "model.g_constraint=low_rank", "model.g_rank=2"),
}


def finish(config: RunConfig) -> PLDRModel:
    """As if the run had been trained: random weights whose G is neither rotary nor of full rank, and its G extracted."""
    paths = RunPaths(config.run_dir)
    torch.manual_seed(0)
    model = PLDRModel(config.model).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.output.weight.mul_(5)
            for name, parameter in layer.attention.plga.named_parameters():
                parameter += torch.randn_like(parameter) * (name in ("V", "b_a"))
    save_weights(model.state_dict(), config.model, paths.weights, source={"step": 4})
    ids = held_out(config, paths, half=0).sequences_NT[:, :-1]
    save_g(extract_g(model, ids, "mean"), paths.g_lm)
    publish_sealed(
        paths.logs / "job.json",
        {"schema_version": 1, "config": config.as_dict(), "run_id": "local-1", "resume_from": None},
    )
    return model


@pytest.fixture(scope="module", params=list(VARIANTS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, PLDRModel]:
    make = make_in(tmp_path_factory.mktemp("projected"))
    pipeline, _ = make(*SIZES, *VARIANTS[request.param])
    for stage in ("shard", "tokenizer", "tokenize"):
        pipeline.stage(stage)
    return pipeline.config, finish(pipeline.config)


def test_losses_are_those_of_the_model_with_that_g(
    run: tuple[RunConfig, PLDRModel], capsys: pytest.CaptureFixture[str]
) -> None:
    config, model = run
    assert projected.main([config.run_dir, "--sequences", "12"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    result: dict[str, Any] = json.loads(last)
    assert (result["step"], result["sequences"], result["tokens"]) == (4, 12, 12 * 16)
    assert result["g_source"] == config.model.g_source

    ids = held_out(config, RunPaths(config.run_dir), half=1, limit=12).sequences_NT
    prompts = held_out(config, RunPaths(config.run_dir), half=0).sequences_NT[:, :-1]
    g = extract_g(model, prompts, "mean").g_lm
    U, S, Vh = torch.linalg.svd(g.double())
    eye, part = torch.eye(8).expand_as(g), rotary_part(g, config.model)
    kept = (S.square().cumsum(-1) - S.square()) < 0.9 * S.square().sum(
        -1, keepdim=True
    )  # what is before it is too little
    wanted = {
        "full": g,
        "rotary": part,
        "nonrotary": eye + g - part,
        "rank-1e-01": ((U * (S * kept).unsqueeze(-2)) @ Vh).float(),
        "identity": eye,
    }
    nll = {
        name: model(ids[:, :-1], g_lm=each, targets=ids[:, 1:]).nll_BS.double().mean(-1)
        for name, each in wanted.items()
    }
    for name, nll_N in nll.items():
        found, cost_N = result["losses"][name], nll_N - nll["full"]
        assert found["loss"] == pytest.approx(float(nll_N.mean()), abs=1e-5)
        assert found["cost"] == pytest.approx(float(cost_N.mean()), abs=1e-5)
        assert found["standard_error"] == pytest.approx(float(cost_N.std()) / 12**0.5, abs=1e-5)
        assert name == "full" or abs(found["cost"]) > 1e-4  # each is another model
    assert list(result["losses"]) == [
        "full",
        "rotary",
        "nonrotary",
        "rank-1e-01",
        "rank-1e-02",
        "rank-1e-03",
        "identity",
    ]
    assert result["per_layer"]["rank-1e-01"] == pytest.approx(kept.sum(-1).double().mean(-1).tolist())
    share = part.double().square().sum((-2, -1)) / g.double().square().sum((-2, -1))
    assert result["per_layer"]["rotary_share"] == pytest.approx(share.mean(-1).tolist(), rel=1e-5)
    assert len(lines) == 1 + 7 + 1 + 2 and f"{result['losses']['rotary']['loss']:.4f}" in lines[2]


def test_a_run_that_lacks_a_part_is_one_line(
    run: tuple[RunConfig, PLDRModel], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    paths = RunPaths(run[0].run_dir)
    assert projected.main([str(tmp_path)]) == 1
    assert projected.main([run[0].run_dir, "--sequences", "1"]) == 1
    paths.g_lm.rename(tmp_path / "g_lm")
    assert projected.main([run[0].run_dir]) == 1
    (tmp_path / "g_lm").rename(paths.g_lm)
    first, second, third = capsys.readouterr().err.splitlines()
    assert "logs/job.json: missing; name the run directory" in first
    assert "--sequences 1: a standard error needs 2 or more" in second
    assert "g_lm: missing; the run is not finished: `pldr extract CONFIG` makes it" in third
