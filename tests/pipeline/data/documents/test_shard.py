"""Stage shard: every document is counted, results are byte-identical for any number of workers, other tools can read them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import webdataset

from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.data.documents.read import DocumentIndex, read_removed, read_shard
from pipeline.data.documents.shard import shard_documents, stage_inputs
from pipeline.data.documents.spool import split_key
from pipeline.data.documents.write import copies, split_of
from pipeline.errors import UserError

MakeConfig = Callable[..., RunConfig]
Contents = Callable[[Path], dict[str, bytes]]


def run(config: RunConfig) -> tuple[dict[str, Any], RunPaths]:
    paths = RunPaths(config.run_dir)
    return shard_documents(config, paths), paths


def texts_of(paths: RunPaths) -> dict[str, str]:
    """text -> split, of every document."""
    index = DocumentIndex.load(paths.documents)
    return {d.text: d.meta["split"] for shard in index.shards for d in read_shard(paths.documents, shard)}


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def test_every_document_is_written_once_with_its_metadata(corpus: Path, finished: tuple[RunConfig, RunPaths]) -> None:
    _, paths = finished
    lines = [line for file in corpus.iterdir() for line in file.read_text(encoding="utf-8").splitlines()]
    written = [json.loads(line)["text"] for line in lines]
    index = DocumentIndex.load(paths.documents)
    read = [document for shard in index.shards for document in read_shard(paths.documents, shard)]
    assert sorted(document.text for document in read) == sorted(written)
    for document in read:
        sha256 = hashlib.sha256(document.text.encode()).hexdigest()
        split = split_of(split_key(document.text), val_fraction=0.1, test_fraction=0.05)
        assert document.meta["sha256"] == sha256 and document.meta["split"] == split
        file, _, line = document.meta["source"].removeprefix(f"{corpus.name}/").partition("#")
        assert json.loads((corpus / file).read_text().splitlines()[int(line) - 1])["text"] == document.text
    counts = index.tree["counts"]
    assert counts["documents_read"] == counts["documents_kept"] == counts["documents_written"] == len(written) == 160
    assert index.tree["rejected"] == {} and index.tree["removed"] == []
    assert sum(sum(split["length_histogram"]) for split in index.splits.values()) == 160
    assert index.splits["train"]["words"] == sum(len(d.text.split()) for d in read if d.meta["split"] == "train")
    assert {split: index.splits[split]["documents"] > 0 for split in ("train", "val", "test")}


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_do_not_depend_on_workers_or_on_the_run(
    workers: int,
    tmp_path: Path,
    corpus: Path,
    make_config: MakeConfig,
    finished: tuple[RunConfig, RunPaths],
    contents: Contents,
) -> None:
    _, paths = run(make_config(tmp_path, f"{corpus}/*.jsonl", data={"workers": workers}))
    assert contents(paths.documents) == contents(finished[1].documents)


def test_stock_webdataset_reads_document_tars(
    finished: tuple[RunConfig, RunPaths], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webdataset.utils, "enforce_security", True)
    paths = finished[1]
    shards = DocumentIndex.load(paths.documents).of_split("train")
    urls = [str(paths.documents / shard["name"]) for shard in shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode())
    ours = [document for shard in shards for document in read_shard(paths.documents, shard)]
    assert [(s["__key__"], s["txt"], s["json"]) for s in samples] == [(d.key, d.text, d.meta) for d in ours]


def test_splits_depend_only_on_the_text(tmp_path: Path, make_config: MakeConfig) -> None:
    texts = [f"document {n}" for n in range(120)]
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", texts)
    _, one = run(make_config(tmp_path / "one", str(tmp_path / "in")))
    write_jsonl(tmp_path / "in" / "0.jsonl", ["new " + text for text in texts] + texts[:3])
    _, two = run(make_config(tmp_path / "two", str(tmp_path / "in"), data={"tasks": 5, "test_fraction": 0.3}))
    before, after = texts_of(one), texts_of(two)
    assert set(before) < set(after) and set(before.values()) == {"train", "val", "test"}
    assert all(after[text] == split or (split, after[text]) == ("train", "test") for text, split in before.items())


def test_dropped_documents_are_counted_by_reason(tmp_path: Path, make_config: MakeConfig) -> None:
    lines = [json.dumps({"text": f"long enough, number {n}"}) for n in range(50)]
    bad = ["not json", json.dumps({"text": 5}), json.dumps({"text": "   short   "}), json.dumps({"text": ""})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines + bad))
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    settings = {"on_bad_input": "skip", "min_characters": 8}
    sources = [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.txt"]
    result, paths = run(make_config(tmp_path / "run", sources, data=settings))
    assert result["rejected"] == {"no_text": 1, "not_json": 1, "not_utf8": 1} and result["removed"] == {"too_short": 2}
    index = DocumentIndex.load(paths.documents)
    counts = index.tree["counts"]
    removed = {record["id"].partition("/")[2]: record for record in read_removed(index)}
    assert set(removed) == {"a.jsonl#51", "a.jsonl#52", "a.jsonl#53", "a.jsonl#54", "b.txt"}
    assert "a.jsonl, line 51: not JSON" in removed["a.jsonl#51"]["message"]
    assert removed["a.jsonl#53"]["reason"] == "too_short" and removed["a.jsonl#53"]["excerpt"] == "   short   "
    assert counts["documents_read"] == 52 and counts["documents_kept"] == result["documents"] == 50


def test_bad_input_stops_with_its_place_and_leaves_no_index(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: not JSON .*on_bad_input=skip") as caught:
        run(make_config(tmp_path / "run", f"{tmp_path}/a.jsonl"))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1
    with pytest.raises(UserError, match="no finished documents"):
        DocumentIndex.load(tmp_path / "run" / "documents")


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ([""], {}, "no document is left.*1 too_short"),
        (["a", "b"], {"min_characters": 5}, "2 too_short.*or data.min_characters"),
        (["a", "b", "c"], {"val_fraction": 0.0}, r"the val split is empty: .*set data.val_fraction to 0\.\d+"),
        (["a", "b", "c"], {"val_fraction": 0.94}, "the train split is empty"),
    ],
)
def test_an_empty_corpus_or_split(
    texts: list[str], settings: dict[str, Any], message: str, tmp_path: Path, make_config: MakeConfig
) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(UserError, match=message):
        run(make_config(tmp_path / "run", f"{tmp_path}/a.jsonl", data=settings))


def test_the_suggested_val_fraction_works(tmp_path: Path, make_config: MakeConfig) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"text {n}" for n in range(20)])
    with pytest.raises(UserError) as caught:
        run(make_config(tmp_path / "run", f"{tmp_path}/a.jsonl", data={"val_fraction": 0.0001}))
    fraction = float(str(caught.value).split("set data.val_fraction to ")[1].split()[0])
    result, _ = run(make_config(tmp_path / "run", f"{tmp_path}/a.jsonl", data={"val_fraction": fraction}))
    assert result["splits"]["val"]["documents"] >= 1


def test_changed_inputs_never_meet_old_work(tmp_path: Path, make_config: MakeConfig, contents: Contents) -> None:
    for number in range(3):
        write_jsonl(tmp_path / f"{number}.jsonl", [f"file {number} text {n}" for n in range(30)])
    config = make_config(tmp_path / "run", f"{tmp_path}/*.jsonl", data={"tasks": 3})
    first, paths = run(config)
    write_jsonl(tmp_path / "1.jsonl", [f"file 1 TEXT {n}" for n in range(30)])  # the same size
    second, _ = run(config)
    assert first["fingerprint"] != second["fingerprint"] and "file 1 TEXT 7" in texts_of(paths)
    (tmp_path / "2.jsonl").unlink()
    run(make_config(tmp_path / "run", f"{tmp_path}/*.jsonl", data={"tasks": 1}))  # fewer shards than before
    _, fresh = run(make_config(tmp_path / "fresh", f"{tmp_path}/*.jsonl", data={"tasks": 1}))
    assert contents(paths.documents) == contents(fresh.documents)


def test_finished_work_is_kept_and_damage_is_repaired(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, contents: Contents
) -> None:
    config = make_config(tmp_path, f"{corpus}/*.jsonl")
    _, paths = run(config)
    before = contents(paths.documents)
    stamps = {path.name: path.stat().st_mtime_ns for path in paths.documents.glob("*.tar")}
    damaged = paths.documents / "train-000001.tar"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    (paths.documents / ".train-000000.tar.1.ab.spool.tmp").write_bytes(b"half")  # of a killed run
    run(config)
    assert contents(paths.documents) == before
    again = {path.name: path.stat().st_mtime_ns for path in paths.documents.glob("*.tar")}
    assert {name for name in stamps if stamps[name] == again[name]} == {name for name in stamps if "000000" in name}


def test_damaged_documents_are_named(finished: tuple[RunConfig, RunPaths], tmp_path: Path) -> None:
    shutil.copytree(finished[1].documents, tmp_path / "documents")
    index = DocumentIndex.load(tmp_path / "documents")
    path = tmp_path / "documents" / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train-000000\.tar: its sha256 is not the one"):
        next(read_shard(index.folder, index.of_split("train")[0]))
    tree = (tmp_path / "documents" / "index.json").read_text()
    (tmp_path / "documents" / "index.json").write_text(tree.replace('"documents": ', '"documents": 1', 1))
    with pytest.raises(UserError, match="fingerprint does not match"):
        DocumentIndex.load(tmp_path / "documents")


def test_too_little_disk_is_reported_before_anything_is_written(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="free some space or set run_dir"):
        run(make_config(tmp_path / "run", f"{corpus}/*.jsonl"))
    assert not (tmp_path / "run" / "documents").exists()


def test_the_fingerprint_does_not_depend_on_the_location_of_the_corpus(
    tmp_path: Path, make_config: MakeConfig, contents: Contents
) -> None:
    for place in ("here", "there/deep"):
        (tmp_path / place / "books").mkdir(parents=True)
        write_jsonl(tmp_path / place / "books" / "a.jsonl", [f"a text, number {n}" for n in range(60)])
    _, one = run(make_config(tmp_path / "one", f"{tmp_path}/here/books/*.jsonl"))
    _, two = run(make_config(tmp_path / "two", f"{tmp_path}/there/deep/books"))
    assert contents(one.documents) == contents(two.documents)


def words(number: int, count: int = 60) -> str:
    """Text that shares no run of words with that of another number."""
    return " ".join(f"w{hashlib.sha256(f'{number} {n}'.encode()).hexdigest()[:6]}" for n in range(count))


def test_duplicates_are_removed_whatever_the_tasks_and_never_straddle_a_split(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    plain = [words(n) for n in range(60)]
    shared = "This paragraph, which is long enough to be looked at, stands in two documents. " + words(1000, 20)
    loud = [f"  {text.upper()}\n" for text in plain[:20]]
    near = [text.replace(text.split()[30], "other", 1) for text in (words(n, 300) for n in range(2000, 2010))]
    far = [words(n, 300) for n in range(2000, 2010)]
    cut = [f"{words(3000 + n)}\n\n{shared}\n\n{words(4000 + n)}" for n in range(3)]
    write_jsonl(tmp_path / "a.jsonl", [*plain, *far, cut[0]])
    write_jsonl(tmp_path / "b.jsonl", [*loud, *near, *cut[1:]])
    write_jsonl(tmp_path / "c.jsonl", plain[:5])
    sources = [f"{tmp_path}/{name}.jsonl" for name in "abc"]
    splits = {}
    for texts in (texts_of(run(make_config(tmp_path / "all", sources, data={"tasks": 2}))[1]),):
        splits = {text: texts[text] for text in [*plain, *loud]}
    assert all(splits[plain[n]] == splits[loud[n]] for n in range(20)) and len(set(splits.values())) > 1
    clean = {"exact_duplicates": True, "near_duplicates": True, "paragraph_duplicates": True}
    results = []
    for tasks in (1, 3):
        result, paths = run(make_config(tmp_path / str(tasks), sources, data={"tasks": tasks, "clean": clean}))
        assert result["removed"] == {"exact_duplicate": 25, "near_duplicate": 10}
        removed = list(read_removed(DocumentIndex.load(paths.documents)))
        results.append((texts_of(paths), {(r["id"], r["reason"], r["keeper"]) for r in removed}))
    assert results[0] == results[1]
    texts, removed_ids = results[0]
    assert set(texts) == {*plain, *far, cut[0], *(text.replace(shared + "\n\n", "") for text in cut[1:])}
    assert ("c/c.jsonl#1", "exact_duplicate", "a/a.jsonl#1") in removed_ids
    assert ("b/b.jsonl#21", "near_duplicate", "a/a.jsonl#61") in removed_ids
    assert ("b/b.jsonl#31", "paragraph_duplicate", "a/a.jsonl#71") in removed_ids


def test_weights_repeat_training_documents_exactly(tmp_path: Path, make_config: MakeConfig) -> None:
    for name in ("much", "some", "once"):
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {n}" for n in range(300)])
    weights = {"much": 2.5, "some": 0.4, "once": 1.0}
    sources = [{"url": f"{tmp_path}/{name}.jsonl", "weight": weight} for name, weight in weights.items()]
    result, paths = run(make_config(tmp_path / "run", sources, data={"tasks": 2}))
    index = DocumentIndex.load(paths.documents)
    found: dict[str, list[dict[str, Any]]] = {}
    for shard in index.shards:
        for document in read_shard(paths.documents, shard):
            found.setdefault(document.text, []).append(document.meta)
    for name, weight in weights.items():
        for text in (f"{name} {n}" for n in range(300)):
            metas = found.get(text, [])
            expected = copies(split_key(text), weight)
            train = split_of(split_key(text), val_fraction=0.1, test_fraction=0.05) == "train"
            assert len(metas) == (expected if train else min(expected, 1)), text
            assert [meta.get("repeat") for meta in metas] == [None, *range(1, len(metas))][: len(metas)]
            assert {meta["split"] for meta in metas} <= {
                split_of(split_key(text), val_fraction=0.1, test_fraction=0.05)
            }
    assert {copies(split_key(f"much {n}"), 2.5) for n in range(300)} == {2, 3}
    counts = index.tree["counts"]
    assert counts["documents_kept"] == 900 and counts["documents_written"] == result["documents"]
    thinned = sum(not copies(split_key(f"some {n}"), 0.4) for n in range(300))
    assert counts["left_out_by_weight"] == thinned and 150 < thinned < 210


def test_parts_of_a_long_document_stay_together(tmp_path: Path, make_config: MakeConfig) -> None:
    texts = ["\n\n".join(words(100 * n + p, 20) for p in range(10)) for n in range(30)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    clean = {"split_long": {"max_characters": 500}}
    result, paths = run(make_config(tmp_path / "run", f"{tmp_path}/a.jsonl", data={"clean": clean}))
    index = DocumentIndex.load(paths.documents)
    together: dict[str, list[Any]] = {}
    for shard in index.shards:
        for document in read_shard(paths.documents, shard):
            assert len(document.text) <= 500
            together.setdefault(document.meta["source"].rpartition("/")[0], []).append(document)
    assert sorted("".join(d.text for d in parts) for parts in together.values()) == sorted(texts)
    assert all(len({d.meta["split"] for d in parts}) == 1 for parts in together.values())
    assert index.tree["counts"]["documents_kept"] == 30 < result["documents"]


def test_nothing_is_printed(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    run(make_config(tmp_path, f"{corpus}/*.jsonl"))
    assert capfd.readouterr() == ("", "")
    assert "Processing done" in next((tmp_path / "logs").glob("shard-*/write/logs/task_00000.log")).read_text()


def test_a_corpus_in_memory_is_read_where_it_is(
    tmp_path: Path, corpus: Path, make_config: MakeConfig, contents: Contents
) -> None:
    """memory:// is visible to one process only."""
    memory = fsspec.filesystem("memory")
    for file in corpus.glob("*.jsonl"):
        memory.pipe(f"/shard/{corpus.name}/{file.name}", file.read_bytes())
    _, here = run(make_config(tmp_path / "here", f"{corpus}/*.jsonl"))
    config = make_config(
        tmp_path / "there", f"memory://shard/{corpus.name}/*.jsonl", data={"output": "memory://shard/documents"}
    )
    run(config)
    found = {name.rpartition("/")[2]: memory.cat_file(name) for name in memory.find("/shard/documents")}
    assert found == {name: data for name, data in contents(here.documents).items() if not name.startswith(".")}
    with pytest.raises(UserError, match="visible to one process only"):
        run(make_config(tmp_path / "ray", "memory://shard/x.txt", data={"executor": "ray"}))


def test_a_package_that_is_installed_again_is_the_same_input(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another venv its files have other paths and times."""
    inputs = []
    for venv, text in (("one", "a text"), ("two", "a text"), ("three", "b text")):
        package = tmp_path / venv / "packaged_texts"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "a.txt").write_text(text)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(package.parent)
            config = make_config(tmp_path / "run", [{"url": "package://packaged_texts/*.txt"}])
            inputs.append(stage_inputs(config))
    assert inputs[0] == inputs[1] != inputs[2]
