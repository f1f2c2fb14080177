"""`pldr bench decode` measures what it says it does, at any size. No timing is checked here."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from launch.cli import main
from pipeline.bench import decode
from pipeline.bench.blocks import Caches
from pipeline.bench.decode_contenders import FULL, LIVE, LOW_RANK, TWIN, make_contenders
from pipeline.bench.decode_loop import cyclic_model
from pipeline.bench.decode_table import table
from pldr_model.config import ModelConfig
from pldr_model.decode.decoder import Decoder
from pldr_model.generation import generate

TINY = ModelConfig(
    vocab_size=96, num_layers=2, num_heads=2, head_dim=16, context_length=64, d_ff=40, A_dff=8, num_reslayerA=1
)
ALL = ["sdpa", "bundle", "live", "low_rank", "bf16", "int8", "int4"]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    lines: list[str] = []
    found = decode.bench(TINY, batch=[1, 2], prompt=[8, 60, 512], cached=[80], tokens=3, rounds=2, report=lines.append)
    return {**found, "lines": lines}


def test_every_form_at_every_batch_and_prompt(result: dict[str, Any]) -> None:
    assert result["by_batch"].keys() == {"1", "2"}
    for by_prompt in result["by_batch"].values():
        assert by_prompt.keys() == {"8", "60"}
        for cell in by_prompt.values():
            assert list(cell) == ALL
            assert all(one["tokens_per_second"] > 0 and one["share_of_floor"] > 0 for one in cell.values())
            assert cell[TWIN]["ratio_to_sdpa"] == cell[TWIN]["cpu_ratio_to_sdpa"] == 1
    assert result["left_out"] == ["prompt 512: the context is 64"]
    assert list(result["cached"]["80"]) == [FULL, LOW_RANK] and result["cached"]["80"][FULL]["ratio_to_full"] == 1


def test_the_ratios_at_batch_1_stand_at_the_top(result: dict[str, Any]) -> None:
    cell = result["by_batch"]["1"]["8"]
    assert result["decode_ratio_to_sdpa"] == cell[FULL]["ratio_to_sdpa"]
    for name in ("bf16", "int8", "int4", "low_rank", "live"):
        assert result[f"{name}_ratio_to_sdpa"] == cell[name]["ratio_to_sdpa"]
    speeds = [result["by_batch"][size]["8"][FULL]["tokens_per_second"] for size in ("1", "2")]
    assert result["batch_speedup"] == speeds[1] / speeds[0] and result["largest_batch"] == 2


def test_generation_and_machine_are_reported(result: dict[str, Any]) -> None:
    assert result["huge_pages_gain"] is None  # weights this small stay where they are
    assert result["sampling"].keys() == {"1", "2"} and result["speculation"].keys() == {"repeating", "other"}
    assert all(ratio > 0 for ratio in result["speculation"].values())
    assert {"date", "device", "cores", "threads", "load_average", "torch"} <= result["machine"].keys()
    assert result["machine"]["threads"] == 1 and result["bandwidth"].keys() == {"read", "copy"}
    assert result["weights_mb"]["int8"] < 0.5 * result["weights_mb"]["sdpa"]


def test_the_table_is_markdown_with_a_row_for_each(result: dict[str, Any]) -> None:
    lines = result["lines"]
    assert lines == list(table(result)) and "left out: prompt 512: the context is 64" in lines
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + len(ALL) + 2 + 2 and {row.count("|") for row in rows[: 2 + len(ALL)]} == {9}
    assert rows[0].split(" | ")[2:6] == ["1 x 8", "1 x 60", "2 x 8", "2 x 60"]


def test_a_block_is_steps_of_the_decoder_and_repeats_itself() -> None:
    contenders = make_contenders(TINY, 4, 64)
    one = contenders[FULL]
    seen: list[torch.Tensor] = []

    def step(ids_B: torch.Tensor, cache: Any) -> torch.Tensor:
        seen.append(one.decoder.step(ids_B, cache))
        return seen[-1]

    with torch.inference_mode():
        block = one.block(2, 5, 3, Caches(), step)
        block(3)
        block(3)
    assert len(seen) == 6
    for before, after in zip(seen[:3], seen[3:], strict=True):
        assert before.equal(after)


def test_forms_that_keep_the_same_of_a_token_share_a_cache() -> None:
    contenders = make_contenders(TINY, 4, 64)
    caches = Caches()
    made = {name: caches.filled(one.decoder, 2, 5, 3) for name, one in contenders.items()}
    assert made[TWIN] is made[FULL] is made["int8"]
    assert made[LOW_RANK] is not made[FULL] and made[LIVE] is not made[FULL]
    assert all(cache.lengths == [5, 5] and cache.length_B.tolist() == [5, 5] for cache in made.values())
    live = made[LIVE].g
    assert live is not None and all(g.abs().min() > 0 for g in live)


def test_bytes_of_a_step_are_counted_by_hand() -> None:
    """fp32: every weight but the embedding's other rows, G, and of each cached token 2 L H K numbers."""
    L, H, K, V = TINY.num_layers, TINY.num_heads, TINY.head_dim, TINY.vocab_size
    numbers = TINY.sdpa_twin().num_parameters()["total"] - V * H * K
    contenders = make_contenders(TINY, 4, 64)
    twin = 4 * (numbers + 3 * H * K + 3 * 10 * 2 * L * H * K)
    assert contenders[TWIN].bytes_of_step(3, 10) == twin
    assert contenders[FULL].bytes_of_step(3, 10) == twin + 4 * L * H * K * K
    assert contenders[LIVE].bytes_of_step(3, 10) == twin + 3 * 4 * L * H * K * K
    kept = contenders[FULL].bytes_of_step(3, 10) - contenders[LOW_RANK].bytes_of_step(3, 10)
    assert kept == 4 * 3 * 10 * L * H * (K - 4)


@pytest.mark.parametrize("cycle", [5, 96])
def test_the_cyclic_model_says_its_cycle(cycle: int) -> None:
    decoder = Decoder.of(cyclic_model(TINY, cycle))
    assert generate(decoder, [[2, 3]], max_new_tokens=12) == [[(4 + i) % cycle for i in range(12)]]


def test_a_model_without_a_learned_g_has_no_live_form() -> None:
    assert LIVE not in make_contenders(replace(TINY, g_source="random"), 4, 64)


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="key_rank: 17 is over the head size of 16"):
        decode.bench(TINY, key_rank=17, threads=before + 1)
    assert torch.get_num_threads() == before


def test_the_command_takes_sizes_and_prints_json(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "{vocab_size: 64, num_layers: 1, num_heads: 2, head_dim: 8, context_length: 32, d_ff: 16}"
    config = tmp_path / "small.yaml"
    config.write_text(f"name: small\nrun_dir: {tmp_path}/run\ndata: {{sources: [{{url: x.txt}}]}}\nmodel: {sizes}\n")
    words = ["bench", "decode", config, "model.num_layers=2", "--batch", 1, "--prompt", 4, "--cached", "--rounds", 1]
    assert main([str(word) for word in [*words, "--tokens", 2, "--json"]]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"decode_ratio_to_sdpa", "int8_ratio_to_sdpa", "bf16_ratio_to_sdpa"} <= found.keys()
    assert found["by_batch"]["1"].keys() == {"4"} and found["cached"] == {}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["decode"], "bench decode: name one YAML"),
        (["decode", "quickstart", "--batch", "0"], "--batch 0: at least 1"),
        (["decode", "quickstart", "--batch", "1", "-2"], "--batch 1 -2: at least 1"),
        (["decode", "quickstart", "--prompt", "200"], "prompt: 200 cached tokens and 1 new ones are over the context"),
        (["decode", "quickstart", "--key-rank", "17"], "key_rank: 17 is over the head size of 16"),
        (["decode", "quickstart", "--clients", "2"], "bench decode: takes no clients"),
        (["quickstart", "--rounds", "2"], "takes no rounds; that is for `pldr bench decode`"),
        (["quickstart", "--batch", "1", "2"], "--batch takes one number; several are for `pldr bench decode`"),
    ],
)
def test_wrong_use_is_one_line(
    words: list[str], part: str, repository: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(repository / "configs" / "quickstart.yaml")
    assert main(["bench", *(config if word == "quickstart" else word for word in words)]) == 2
    errors = capsys.readouterr().err
    assert part in errors and errors.count("\n") == 1
