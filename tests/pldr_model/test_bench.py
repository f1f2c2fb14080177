"""The bench measures what it reports, on a model that takes milliseconds. Timings themselves are never tested."""

from dataclasses import replace

import pytest

from pldr_model import bench as bench_module
from pldr_model.bench import bench


def test_bench_reports_model_and_twin(tiny):
    result = bench(tiny, batch_size=2, steps=1, decode_tokens=1)  # one round each: its ratio is the medians'
    for phase in ("train", "decode"):
        ratio = result[f"{phase}_tokens_per_second"] / result[f"{phase}_tokens_per_second_sdpa"]
        assert result[f"{phase}_ratio_to_sdpa"] == pytest.approx(ratio)
        assert ratio > 0
    assert result["train_ratio_to_sdpa_frozen"] > 0 and result["train_ratio_to_sdpa_shared"] > 0
    assert result["train_ratio_to_sdpa_modules"] > 0
    assert not [key for key in result if key.endswith("_compiled")]
    assert 0 < result["peak_rss_mb"] <= result["peak_rss_steady_mb"] <= result["peak_rss_with_twin_mb"]
    assert result["loss_ratio_to_whole_logits"] > 0
    assert result["parameters"] == tiny.num_parameters()["total"]


def test_both_are_run_in_turn_and_the_medians_count(monkeypatch):
    """A clock that advances by what each run is set to take: the medians, and that of the ratios, in alternating order."""
    now, order = [0.0], []

    def run(name, costs):
        def step():
            order.append(name)
            now[0] += costs.pop(0)

        return step

    monkeypatch.setattr(bench_module.time, "perf_counter", lambda: now[0])
    medians = bench_module.in_turn(
        run("model", [5.0, 1.0, 9.0]), run("twin", [2.0, 2.0, 40.0]), 3, bench_module.torch.device("cpu")
    )
    assert medians == (5.0, 2.0, 0.5)
    assert order == ["model", "twin", "twin", "model", "model", "twin"]


def test_bench_shares_no_g_where_there_is_none_to_share(tiny):
    result = bench(tiny.sdpa_twin(), batch_size=2, steps=1, decode_tokens=1)
    assert "train_ratio_to_sdpa_shared" not in result


def test_bench_compiles_the_layers_of_model_and_twin(tiny, monkeypatch):
    compiled = []
    monkeypatch.setattr(bench_module.torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    result = bench(tiny, batch_size=2, steps=1, decode_tokens=1, compiled=True)
    assert result["train_ratio_to_sdpa_compiled"] > 0 and result["train_ratio_to_sdpa_shared_compiled"] > 0
    assert compiled == ["DecoderLayer"] * 2 * tiny.num_layers


def test_bench_trains_with_the_dag_regularizer(tiny):
    result = bench(replace(tiny, dag_coefficients=(0.01, 0.01, 0.01)), batch_size=1, steps=1, decode_tokens=2)
    assert result["train_tokens_per_second"] > 0


def test_bench_refuses_more_tokens_than_the_context(tiny):
    with pytest.raises(ValueError, match=r"decode_tokens: 16 \+ 64 tokens are over the context_length of 48"):
        bench(tiny, decode_tokens=64)
