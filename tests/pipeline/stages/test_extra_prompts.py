"""Kinds of prompts from files: read, tokenized and cut; a file that cannot be used is named with its key."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.load import parse_config
from pipeline.errors import ConfigError
from pipeline.post.measure.prompts import END
from pipeline.stages import extra_prompts
from pipeline.stages.extra_prompts import extra_files, read_extra
from pipeline.stages.table import stage_named
from pipeline.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_path)


def read(tokenizer: Tokenizer, path: Path, *, limit: int = 10) -> list[list[int]]:
    kinds = read_extra({"code": str(path)}, tokenizer, context_length=12, limit=limit)
    assert list(kinds) == ["code"]
    return [[token for token in row if token != END] for row in kinds["code"].tolist()]


def test_paragraphs_and_json_lines_are_prompts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["the dog", "  a fox\nand so on and so on and so on", "wine"]
    plain, lines = tmp_path / "code.txt", tmp_path / "code.jsonl"
    plain.write_text("\r\n\r\n" + "\r\n \r\n".join(texts).replace("on\nand", "on\r\nand") + "\r\n\r\n\r\n", newline="")
    lines.write_text("\ufeff" + "\n\n".join(f'{{"text": {json.dumps(text)}}}' for text in texts))
    expected = [ids[:12] for ids in tokenizer.encode_batch(texts)]
    assert read(tokenizer, plain) == read(tokenizer, lines) == expected
    assert max(map(len, expected)) == 12 and min(map(len, expected)) < 12
    assert read_extra({}, tokenizer, context_length=12, limit=5) == {}


def test_of_many_prompts_some_are_taken_from_all_over_the_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "many.txt"
    file.write_text("\n\n".join("fox " * n for n in range(1, 9)))
    assert read(tokenizer, file, limit=4) == [
        ids[:12] for ids in tokenizer.encode_batch(["fox " * n for n in (1, 3, 5, 7)])
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", None, "no such file; name a text file or a .jsonl"),
        ("x.txt", b"", "no text in it; write a prompt into each paragraph"),
        ("x.txt", b" \n\n\t\n", "no text in it"),
        ("x.txt", b"abc\xff", "not UTF-8 at byte 3; save it as UTF-8"),
        ("x.txt", b"a" * 100, "larger than 0 MB; name a file of fewer prompts"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": 3}\n', ', line 3: not {"text": "..."}; write one such object a line'),
        ("x.jsonl", b"[1]", ", line 1: not"),
        ("x.jsonl", b'{"body": "a"}', ", line 1: not"),
        ("x.jsonl", b"{", ", line 1: not"),
        ("x.jsonl", b"[" * 90, ", line 1: not"),
        ("x.jsonl", b'{"text": ""}', "no text in it"),
        ("x.jsonl", rb'{"text": "a\ud800"}', r", line 1: half a character (\ud800) in `text`; remove it"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_key(
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes | None,
    message: str,
) -> None:
    monkeypatch.setattr(extra_prompts, "MOST_BYTES", 99)
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_extra({"code": str(file)}, tokenizer, context_length=12, limit=5)
    assert str(caught.value).startswith(f"post.extra_prompts.code: {file}") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_files_are_known_by_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "code.txt"
    file.write_text("a fox")
    before = extra_files({"code": str(file)})
    monkeypatch.chdir(tmp_path)
    assert extra_files({"code": "code.txt"}) == before  # relative to where pldr is called, as other paths are
    file.write_text("a dog")
    assert extra_files({"code": "code.txt"}) != before and extra_files({}) == {}
    for name in ("gone.txt", "."):
        with pytest.raises(ConfigError, match=rf"post.extra_prompts.code: {name}: no such file; name a text file"):
            extra_files({"code": name})


def test_other_files_are_other_inputs_of_the_stage(tiny: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "code.txt"

    def inputs(**post: Any) -> dict[str, Any]:
        tree = {"name": "x", "run_dir": "x", "data": {"sources": [{"url": "x"}]}, "model": tiny.config, "post": post}
        return stage_named("validate").inputs(parse_config(tree, where="x.yaml"))

    file.write_text("a fox")
    before = inputs(extra_prompts={"code": str(file)})
    assert before == inputs(extra_prompts={"code": str(file)})
    file.write_text("a dog")
    assert before != inputs(extra_prompts={"code": str(file)})
    assert "extra_prompts" not in inputs()  # what was validated without them stays
    with pytest.raises(ConfigError, match=r"^x.yaml: post.extra_prompts.*Extra:Code") as caught:
        inputs(extra_prompts={"Extra:Code": str(file)})
    assert "\n" not in str(caught.value)
