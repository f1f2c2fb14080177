"""`pldr bench data` runs all of its parts, on real shards, and reports its numbers. No timing is checked here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.bench import data as benches
from pipeline.bench.data import bench, in_turn, line
from pipeline.bench.data_input import generated, read_text, write_documents, write_tokens
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.data.documents.read import DocumentIndex, read_shard
from pipeline.data.tokens.index import TokenIndex
from pipeline.errors import UserError
from pipeline.stages import still

KEYS = (
    *("tokenize_ratio_to_sentencepiece", "tokenize_scaling_2", "loader_tokens_per_second", "loader_flat_shards"),
    *("loader_flat_sequences", "loader_startup_seconds_64_shards", "order_bytes", "order_bytes_1e3"),
)


def test_every_measurement_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, finished: tuple[RunConfig, RunPaths]
) -> None:
    monkeypatch.setattr(benches, "ROUNDS", 1)
    monkeypatch.setattr(benches, "RATIO_ROUNDS", 2)
    monkeypatch.setattr(benches, "SHARDS", 2)
    monkeypatch.setattr(still, "TELL_S", 0.05)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": part}) + "\n" for part in generated(300_000)))
    said: list[str] = []
    result = bench(text=str(text), tokenizer=str(finished[1].tokenizer), report=said.append, megabytes=1, shards=64)
    assert all(result[key] > 0 for key in KEYS)
    assert 1_000_000 <= result["tokenize_text_bytes"] < 1_500_000, "the small file is repeated"
    assert result["order_bytes"] < 2_000_000
    assert all(key in "\n".join(said) for key in KEYS)
    assert any(text.startswith("  measuring: ") for text in said), "what takes a minute is heard of"


def test_a_line_shows_whether_the_target_is_met() -> None:
    assert line("tokenize_scaling_2", 1.71).endswith("1.710   target at least 1.7: met")
    assert line("tokenize_scaling_2", 1.69).endswith("target at least 1.7: NOT met")
    assert line("loader_startup_seconds_2000_shards", 1.0).endswith("target below 1: NOT met")
    assert line("loader_tokens_per_second", 21.04e6).endswith("21.0 M   target at least 20 M: met")


def test_text_is_generated_the_same_everywhere() -> None:
    texts = generated(50_000)
    assert texts == generated(50_000) != generated(50_000, seed=1) and sum(map(len, texts)) >= 50_000
    assert texts[0][:38] == generated(10)[0][:38]
    assert len({word for text in texts for word in text.split()}) > 2000


def test_its_folders_are_like_those_of_the_stages(tmp_path: Path) -> None:
    """The loader and the readers accept these folders, and every checksum matches."""
    texts = generated(20_000)
    write_documents(tmp_path / "documents", texts, 3)
    index = DocumentIndex.load(tmp_path / "documents")
    found = [[document.text for document in read_shard(index.folder, shard)] for shard in index.shards]
    assert found == [texts[number::3] for number in range(3)]
    write_tokens(tmp_path / "tokens", shards=3, sequences=10, context_length=7, block_sequences=4)
    tokens = TokenIndex.load(tmp_path / "tokens")
    tokens.verify()
    assert tokens.num_sequences("train") == 30 and [len(shard.offsets) for shard in tokens.shards] == [3, 3, 3]


def test_a_file_without_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(UserError, match="a.jsonl"):
        read_text(str(tmp_path / "a.jsonl"), 100)


def test_parts_take_turns() -> None:
    order: list[str] = []
    parts: list[Callable[[], None]] = [lambda: order.append("a"), lambda: order.append("b")]
    seconds = in_turn(*parts, rounds=3)
    assert "".join(order) == "abbaab" and [len(part) for part in seconds] == [3, 3]
    slept, worked = in_turn(lambda: time.sleep(0.05), lambda: sum(range(10**6)), rounds=1)
    assert slept[0].wall >= 0.05 > slept[0].cpu and worked[0].cpu > slept[0].cpu
