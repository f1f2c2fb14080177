"""The data report: everything in the indexes, safe against hostile documents."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.data.documents.read import DocumentIndex, read_removed
from pipeline.data.documents.shard import shard_documents
from pipeline.data.inspect.report import headline, write_report
from pipeline.data.tokens.tokenize import tokenize_documents
from pipeline.errors import UserError
from pipeline.report.links import DATA, links, mlflow_link
from tests.helpers.html_page import Page, browser, too_wide

MakeConfig = Callable[..., RunConfig]
EVIL = "<script>alert(1)</script>"
PROSE = (
    "The sea was calm that morning, and nobody on the pier spoke of <b>storms</b> & {{ 7 * 7 }} or of the {} before. "
)


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig, finished: tuple[RunConfig, RunPaths]
) -> RunConfig:
    """A corpus of hostile texts in hostile files with bad lines and copies, cleaned, and made tokens of."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "in").mkdir()
    texts = [f"{EVIL}\x1b[31m{PROSE * (1 + i % 7)}\n\nNumber {i} of them.\u202e" for i in range(90)]
    texts += [texts[i] for i in range(30)] + ["short"] * 3
    lines = [json.dumps({"text": text}) for text in texts]
    lines[17:17] = ["not json " + EVIL]
    (folder / "in" / "<img src=x onerror=alert(1)>.jsonl").write_text("\n".join(lines) + "\n")
    config = make_config(
        folder / "run",
        [{"url": f"{folder}/in/*.jsonl", "license": '"><script>', "weight": 1.5}],
        data={"on_bad_input": "skip", "min_characters": 20, "clean": {"exact_duplicates": True}, "workers": 1},
        tokens={"workers": 1},
    )
    paths = RunPaths(config.run_dir)
    shard_documents(config, paths)
    shutil.copytree(finished[1].tokenizer.parent, paths.tokenizer.parent)
    return config


def test_the_page_without_and_with_tokens(run: RunConfig, tmp_path: Path) -> None:
    paths = RunPaths(run.run_dir)
    before = write_report("run", str(paths.documents), str(paths.tokens), tmp_path / "a.html")
    assert before["tokens"] is None and "No tokens yet" in Page((tmp_path / "a.html").read_text()).text
    tokenize_documents(run, paths)
    after = write_report("run", str(paths.documents), str(paths.tokens), tmp_path / "b.html")
    page = Page((tmp_path / "b.html").read_text())
    assert "No tokens yet" not in page.text and "end of document" in page.text and page.tags.count("svg") >= 4
    index = DocumentIndex.load(paths.documents)
    assert after["documents"] == index.tree["counts"]["documents_written"] > 90
    assert after["bytes_per_token"] == pytest.approx(after["text_bytes"] / (after["tokens"]), rel=0.05)
    assert after["fertility"] > 1
    write_report("run", str(paths.documents), str(paths.tokens), tmp_path / "c.html")
    assert (tmp_path / "b.html").read_bytes() == (tmp_path / "c.html").read_bytes()


def test_no_document_becomes_markup(run: RunConfig, tmp_path: Path) -> None:
    paths = RunPaths(run.run_dir)
    write_report(EVIL, str(paths.documents), str(paths.tokens), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert not page.faults and not {"script", "img", "link", "iframe", "object", "b onmouseover"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(EVIL) == 12, "title, heading and ten excerpts are to be read as they are"
    assert "<img src=x onerror=alert(1)>.jsonl" in page.text and '"><script>' in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)


def test_the_page_loads_nothing(run: RunConfig, tmp_path: Path) -> None:
    write_report("run", str(RunPaths(run.run_dir).documents), None, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    addresses = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert addresses and all(value is not None and value.startswith("#") for value in addresses)
    assert "url(" not in page.text and "@import" not in page.text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_removed_documents_are_counted_with_ten_examples(run: RunConfig, tmp_path: Path) -> None:
    paths = RunPaths(run.run_dir)
    write_report("run", str(paths.documents), None, tmp_path / "page.html")
    text = Page((tmp_path / "page.html").read_text()).text
    index = DocumentIndex.load(paths.documents)
    removed = {reason: n for step in index.tree["steps"] for reason, n in step["removed"].items()}
    assert removed == {"too_short": 3, "exact_duplicate": 30} and index.tree["rejected"] == {"not_json": 1}
    assert re.search(r"exact_duplicate · 30\s+\S 10 examples", text) and re.search(
        r"too_short · 3\s+\S 3 examples", text
    )
    records = [record for record in read_removed(index) if record["reason"] == "exact_duplicate"]
    assert len(records) == 30
    assert all(record["id"] in text and record["keeper"] in text for record in records[:10])
    (bad,) = [record for record in read_removed(index) if record["reason"] == "not_json"]
    assert "line 18" in bad["message"] and bad["message"] in text


def test_headline_numbers_by_hand(run: RunConfig) -> None:
    index = DocumentIndex.load(RunPaths(run.run_dir).documents)
    numbers = headline(index, None)
    assert numbers["text_bytes"] == sum(shard["text_bytes"] for shard in index.shards)
    assert numbers["words"] == sum(shard["words"] for shard in index.shards) and numbers["fertility"] is None


def test_without_documents_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `pldr shard` first"):
        write_report("run", str(tmp_path), None, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_documents_that_a_step_checked_in_part_are_on_the_page(tmp_path: Path, make_config: MakeConfig) -> None:
    lines = [json.dumps({"text": f"{number}" + "\u6f22\u5b57\u6587\u66f8" * 40}) for number in range(60)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    config = make_config(
        tmp_path / "run", str(tmp_path / "in.jsonl"), data={"clean": {"quality": {"repetition": False}}, "workers": 1}
    )
    paths = RunPaths(config.run_dir)
    shard_documents(config, paths)
    write_report("run", str(paths.documents), str(paths.tokens), tmp_path / "page.html")
    assert "60 documents were checked in part" in " ".join(Page((tmp_path / "page.html").read_text()).text.split())


def test_the_other_pages_of_the_run_are_linked_and_words_explained(run: RunConfig, tmp_path: Path) -> None:
    pages = links(tmp_path / DATA, tmp_path, mlflow=mlflow_link("http://host", "abc"))
    write_report("run", str(RunPaths(run.run_dir).documents), None, tmp_path / DATA, pages)
    page = Page((tmp_path / DATA).read_text())
    assert (
        page.links["Certificate"] == "../certificate/certificate.html" and page.links["Run report"] == "training.html"
    )
    assert "not made yet: pldr validate CONFIG" in page.words() and page.links["MLflow"] == "http://host/#/runs/abc"
    assert (
        "share of documents" in page.text
        and "length in characters" in page.text
        and "a hash of everything" in page.text
    )


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium")
@pytest.mark.parametrize("width", [420, 1280])
def test_nothing_is_wider_than_its_place(tmp_path: Path, make_config: MakeConfig, width: int) -> None:
    long = "a_long_word" * 20
    lines = [json.dumps({"text": f"{number} {long * (2 + number % 9)}"}) for number in range(60)] + ["bad " + long]
    sources = []
    for number in range(40):
        (tmp_path / f"{long}-{number}.jsonl").write_text("\n".join(lines) + "\n")
        sources.append({"url": f"{tmp_path}/{long}-{number}.jsonl", "license": long})
    data = {"on_bad_input": "skip", "min_characters": 1000, "clean": {"exact_duplicates": True}, "workers": 1}
    config = make_config(tmp_path / "run", sources, data=data)
    paths = RunPaths(config.run_dir)
    shard_documents(config, paths)
    write_report(long, str(paths.documents), str(paths.tokens), tmp_path / "page.html")
    assert too_wide(tmp_path / "page.html", width, tmp_path) == "none"
