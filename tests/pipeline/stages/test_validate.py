"""Stage `validate`: the SDPA twin that its page shows, and its ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.io.storage import publish_json
from pipeline.stages.trained import HeldOut
from pipeline.stages.validate import _twin, judge
from pipeline.tokenizer import Tokenizer
from pldr_model.model import PLDRModel


def test_the_twin_is_shown_and_marked_when_its_prompts_differ(
    tiny: SimpleNamespace, certificate: dict[str, Any], tmp_path: Path
) -> None:
    def twin(**post: Any) -> dict[str, Any]:
        tree = {"name": "x", "run_dir": "r", "data": {"sources": [{"url": "x"}]}, "model": tiny.config.to_dict()}
        return _twin(RunConfig.model_validate({**tree, "post": post}), certificate)

    assert twin() == {"loss": None, "note": None}
    assert "no such file" in twin(twin=str(tmp_path))["note"]
    target = tmp_path / "certificate" / "certificate.json"
    publish_json(target, certificate)
    found = twin(twin=str(tmp_path))
    assert found["loss"] == certificate["measures"]["losses"]["block"] and "over the same prompts" in found["note"]
    publish_json(target, {**certificate, "prompts": {**certificate["prompts"], "sha256": "0" * 64}})
    assert "cannot be compared" in twin(twin=str(tmp_path))["note"]


def test_what_the_run_knows_of_its_prompts_is_handed_on(
    tiny: SimpleNamespace,
    invariant: PLDRModel,
    text: torch.Tensor,
    tokenizer_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {}
    for name, value in {
        "pipeline.bundle.weights.load_weights": (invariant, {}),
        "pipeline.bundle.extracted.load_g": SimpleNamespace(g_lm=None),
        "pipeline.stages.trained.require_same": None,
        "pipeline.stages.trained.held_out": HeldOut(text, 11),
    }.items():
        monkeypatch.setattr(name, lambda *_, value=value, **__: value)
    monkeypatch.setattr("pipeline.stages.trained.as_trained", lambda config, *_: config)
    monkeypatch.setattr("pipeline.post.validate.validate", lambda *_, **options: given.update(options) or options)
    run, code = RunPaths(tmp_path / "run"), tmp_path / "code.txt"
    run.tokenizer.parent.mkdir(parents=True)
    run.tokenizer.write_bytes(tokenizer_path.read_bytes())
    code.write_text("the dog\n\nthe fox and the dog\n")
    tree = {"name": "x", "run_dir": str(run.root), "data": {"sources": [{"url": "x"}]}, "model": tiny.config}
    judge(RunConfig.model_validate({**tree, "post": {"extra_prompts": {"code": str(code)}}}), run)
    tokenizer = Tokenizer.load(tokenizer_path)
    assert given["documents"] == 11 and list(given["extra"]) == ["code"]
    assert given["extra"]["code"][1].tolist() == tokenizer.encode("the fox and the dog")
    assert given["piece"](17) == tokenizer.piece(17) and given["piece"](10_000) == "no piece"


def test_a_rank_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """It waits for a second rank that never comes; killed, its parent would leave it to write the certificate later."""
    config = {"name": "x", "run_dir": str(tmp_path), "data": {"sources": ["x.txt"]},
              "model": {"vocab_size": 9, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8}}  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps({"schema_version": 1, "config": config}))
    command = [sys.executable, "-m", "pipeline.stages.validate", str(tmp_path / "job.json")]
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(60)
        port = str(other.getsockname()[1])
        environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **environment, "PLDR_PARENT_PIPE": "1"}
        with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as rank:
            try:
                connection, _ = other.accept()  # it has come as far as the rendezvous
                with connection:
                    assert rank.poll() is None and rank.stdin is not None
                    rank.stdin.close()
                    assert rank.wait(60) == 1
            finally:
                rank.kill()
