"""What `pldr check` finds before anything starts."""

import http.server
import json
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from launch.cli import main
from pipeline.config.load import load_config
from pipeline.config.rank_memory import activation_bytes, state_bytes
from pipeline.config.schedule import invariance_budget
from pipeline.io import storage
from pipeline.stages import preflight as module
from pipeline.stages.preflight import FIXED_PIECES, preflight
from pipeline.tokenizer import SPECIAL_IDS


@pytest.fixture
def check(tmp_path, monkeypatch, make_run):
    """`check(*overrides)`: about -> finding."""
    monkeypatch.chdir(tmp_path)
    yaml = make_run(tmp_path)

    def found(*overrides, done=None, begins=None):
        findings = preflight(load_config(yaml, list(overrides)), done=done, begins=begins)
        return {finding.about: finding for finding in findings}

    found.yaml = yaml
    return found


def test_a_run_that_can_start_has_no_failure(check):
    found = check()
    assert list(found) == ["sources", "tokenizer", "batch", "memory", "budget", "disk", "MLflow"]
    assert {finding.status for finding in found.values()} == {"ok"}
    assert (
        "1 file," in found["sources"].text and "8 sequences a step: 2 ranks x micro batch 4 x 1" in found["batch"].text
    )


def test_all_mistakes_are_told_at_once_each_with_its_fix(check, capsys):
    wrong = ["data.sources=gone.jsonl", "tokenizer.model=gone.model", "train.ranks=3"]
    found = check(*wrong)
    assert {about for about, finding in found.items() if finding.status == "FAIL"} == {"sources", "tokenizer", "batch"}
    assert "fix the path or glob" in found["sources"].text and "set train.micro_batch" in found["batch"].text
    for verb in ("check", "run"):
        assert main([verb, str(check.yaml), *wrong]) == 2
        out, errors = capsys.readouterr()
        assert "3 things would fail later: sources, tokenizer, batch" in errors and errors.count("\n") == 1
        assert "gone.jsonl" in out and "gone.model" in out
    assert not (check.yaml.parent / "run" / "stages").exists()


def test_weights_to_begin_with_are_looked_at_before_the_data_are_made(check):
    found = check("train.init_from=gone")["init_from"]
    assert found.status == "FAIL" and "name a run directory where `pldr consolidate` has run" in found.text
    config = load_config(check.yaml, ["train.init_from=gone"])
    assert "init_from" not in {finding.about for finding in preflight(config, goes_on=True)}


def test_files_of_more_prompts_are_looked_at_before_training(check):
    (check.yaml.parent / "code.txt").write_text("a = 1\n\nb = 2\n")
    assert check("post.extra_prompts={code: code.txt}")["prompts"].text == "2 of kind code"
    found = check("post.extra_prompts={code: gone.txt}")["prompts"]
    assert found.status == "FAIL" and found.text.startswith("post.extra_prompts.code: gone.txt: no such file")


def test_what_evaluations_during_training_need_is_looked_at(check, monkeypatch):
    evaluate = "train.evaluate={every: 100, tasks: [arc_easy, piqa], data: eval}"
    assert "no such folder" in check(evaluate)["evaluate"].text
    folder = check.yaml.parent / "eval"
    folder.mkdir()
    (folder / "arc_easy.jsonl").write_text("{}\n")
    found = check(evaluate)["evaluate"]
    assert found.status == "FAIL" and "piqa: no documents; looked for eval/piqa.jsonl" in found.text
    (folder / "piqa.jsonl").write_text("{}\n")
    assert check(evaluate)["evaluate"].text == "2 tasks every 100 steps, documents of eval"
    assert "evaluate" not in check(evaluate, done={"train": {}})
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    found = check(evaluate)["evaluate"]
    assert (found.status, found.text) == (
        "FAIL", "train.evaluate: lm_eval is not installed; pip install 'pldr[eval]'"
    )  # fmt: skip
    assert "evaluate" not in check() and check()["MLflow"].status == "ok"


def test_one_mistake_is_the_error_itself(check, capsys):
    assert main(["check", str(check.yaml), "train.ranks=3", "--json"]) == 2
    out, errors = capsys.readouterr()
    assert "train.global_batch 8 is not a multiple of micro_batch 4 x 3 ranks" in errors
    status = {finding["about"]: finding["status"] for finding in json.loads(out.splitlines()[-1])["findings"]}
    assert status["batch"] == "FAIL" and status["sources"] == "ok"  # for programs, all of them


def test_what_a_finished_stage_needed_is_not_asked_for(check):
    found = check("data.sources=gone.jsonl", done={name: {} for name in ("shard", "tokenizer", "tokenize", "train")})
    assert set(found) == {"disk", "MLflow"} and {finding.status for finding in found.values()} == {"ok"}


def test_a_small_budget_is_a_warning(check):
    assert check("train.metric_weight_decay=1")["budget"].status == "warn"
    assert "budget" not in check("model.g_source=identity")


def test_the_budget_of_a_run_that_goes_on_is_what_was_spent_and_what_is_added(check, tmp_path):
    def commit(folder, budget):
        checkpoint = folder / "checkpoints" / "step-000300"
        state = {"schema_version": 2, "step": 300, "budget": budget, "config": load_config(check.yaml).as_dict()}
        storage.publish_json(checkpoint / "state.json", state)
        (checkpoint / "COMMITTED").write_text("x")

    added = invariance_budget(load_config(check.yaml).train) - invariance_budget(load_config(check.yaml).train, 300)
    commit(tmp_path / "old", 1.0)
    found = check(begins=tmp_path / "old")["budget"]
    assert found.status == "warn" and f"invariance budget {1 + added:.2f}" in found.text
    commit(tmp_path / "run", 20.0)  # its own checkpoint is where it goes on
    found = check(begins=tmp_path / "old")["budget"]
    assert found.status == "ok" and f"invariance budget {20 + added:.2f}" in found.text


def test_the_data_of_another_run_must_be_there(check):
    found = check("data.of=nowhere", done={name: {} for name in ("shard", "tokenizer", "tokenize")})["data"]
    assert found.status == "FAIL" and "nowhere: has no finished documents" in found.text


def test_a_full_disk_and_little_memory_are_found(check, monkeypatch):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(total=1_000_000))
    found = check()
    assert found["disk"].status == "FAIL" and "free some space or set" in found["disk"].text
    assert found["memory"].status == "FAIL" and "train.activation_checkpointing=layer" in found["memory"].text


def test_a_stage_that_muon_cannot_have_is_no_advice(check, monkeypatch):
    """In memory that stage 0 does not leave enough of, and a higher one would."""
    for optimizer, advised in (("adamw", True), ("muon", False)):
        keys = ["train.zero_stage=0", f"train.optimizer={optimizer}"]
        config = load_config(check.yaml, keys)
        needed = 2 * (state_bytes(config, 0, 2) + activation_bytes(config, "cpu"))
        memory = SimpleNamespace(total=int(needed / 0.8) - 100)
        monkeypatch.setattr(module.psutil, "virtual_memory", lambda memory=memory: memory)
        found = check(*keys)["memory"]
        assert found.status == "warn" and "train.activation_checkpointing=layer" in found.text
        assert ("train.zero_stage=1" in found.text) is advised


def test_each_stage_needs_space_on_the_disk_that_it_writes_to(check, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "require_space", lambda needs: asked.extend((n.folder, n.what, n.bytes) for n in needs))
    check(f"data.output={tmp_path}/d", f"tokens.output={tmp_path}/t", f"train.staging={tmp_path}/s")
    where = {what: folder for folder, what, _ in asked}
    run = tmp_path / "run"
    assert where["documents"] == tmp_path / "d" and where["tokens"] == tmp_path / "t"
    assert where["a checkpoint in train.staging"].parent == tmp_path / "s"
    assert {where[what] for what in ("checkpoints", "weights", "the bundle")} == {run}
    assert all(size > 0 for *_, size in asked)
    asked.clear()
    check(done={"shard": {"splits": {"train": {"text_bytes": 9000}, "val": {"text_bytes": 1000}}}})
    assert ("tokens", 8000) in [(what, size) for _, what, size in asked]  # of what `shard` wrote, not of the sources


def test_a_damaged_mlflow_file_is_found(check, tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    found = check(f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")["MLflow"]
    assert found.status == "FAIL" and "a backup, or what `sqlite3" in found.text


def test_sources_that_are_gone_do_not_hide_the_other_findings(check, capsys):
    """Also where an earlier start has read them."""
    assert main(["shard", str(check.yaml)]) == 0
    wrong = ["data.sources=gone.jsonl", "train.ranks=3"]
    assert main(["check", str(check.yaml), *wrong]) == 2
    assert "2 things would fail later: sources, batch" in capsys.readouterr().err


def test_a_check_does_not_wait_for_large_imports(check):
    """It is the first act of `pldr run`; torch alone takes 1.5 s to import."""
    code = (
        "import sys; from launch.cli import main; code = main(sys.argv[1:]);"
        "print([name for name in ('torch', 'deepspeed', 'mlflow', 'datatrove') if name in sys.modules], code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "check", str(check.yaml)], capture_output=True, text=True, timeout=600
    )
    assert done.stdout.splitlines()[-1] == "[] 0", done


def test_mlflow_is_asked_whether_it_answers(check):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(401)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        assert check(f"tracking.uri={uri}")["MLflow"].text == f"{uri} answers"  # it wants a login
        server.shutdown()
    gone = check(f"tracking.uri={uri}")["MLflow"]
    assert gone.status == "warn" and "pldr track replay" in gone.text


@pytest.mark.parametrize(("uri", "status"), [("ftp://x/y", "FAIL"), ("postgresql+psycopg2://host/db", "ok")])
def test_a_kind_of_store_that_mlflow_does_not_know_is_found(check, uri, status):
    assert check(f"tracking.uri={uri}")["MLflow"].status == status


def test_a_tokenizer_larger_than_the_model_is_refused_before_the_corpus_is_read(check, larger_tokenizer):
    found = check(f"tokenizer.model={larger_tokenizer}", "model.vocab_size=50")["tokenizer"]
    assert found.status == "FAIL" and "set model.vocab_size=" in found.text


def test_a_vocabulary_smaller_than_the_pieces_that_are_always_there_is_refused_before_the_corpus_is_read(check):
    assert 256 + len(SPECIAL_IDS) == FIXED_PIECES
    found = check(f"model.vocab_size={FIXED_PIECES}")["tokenizer"]
    assert found.status == "FAIL" and "set it to 400 or more" in found.text
    assert check(f"model.vocab_size={FIXED_PIECES + 1}")["tokenizer"].status == "ok"
