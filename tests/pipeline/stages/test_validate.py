"""Stage `validate`: the SDPA twin that its page shows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.config.run import RunConfig
from pipeline.io.storage import publish_json
from pipeline.stages.validate import _twin


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
