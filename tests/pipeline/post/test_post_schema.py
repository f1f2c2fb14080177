"""The certificate's schema: written down, kept, and not to be talked round by an edit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.post.schema import Certificate, read_certificate


def schema_text() -> str:
    return json.dumps(Certificate.model_json_schema(by_alias=True), indent=1, sort_keys=True) + "\n"


def test_the_written_schema_is_the_one_in_force(repository: Path) -> None:
    """After a change: `python tests/pipeline/post/test_post_schema.py` writes it anew; raise SCHEMA_VERSION."""
    assert (repository / "docs" / "certificate.schema.json").read_text() == schema_text()


def read(certificate: dict[str, Any], folder: Path) -> dict[str, Any]:
    (folder / "certificate.json").write_text(json.dumps(certificate))
    return read_certificate(folder / "certificate.json")


def test_a_certificate_is_read_back(certificate: dict[str, Any], tmp_path: Path) -> None:
    assert read(certificate, tmp_path) == certificate
    assert read({**certificate, "packaged": "certified"}, tmp_path)["packaged"] == "certified"


def edited(certificate: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(certificate)
    node: Any = changed
    *parents, last = path.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 1, "schema_version 1, this program reads 2"),
        ("schema_version", 3, "schema_version 3, this program reads 2"),
        ("schema_version", None, "schema_version None"),
        ("verdict", "failed", "does not follow from the checks"),
        ("verdict", "excellent", "verdict"),
        ("checks.2.value", 0.5, "relative_deviation_g: 0.5 against <= 1e-05 is not True"),
        ("checks.2.value", None, "relative_deviation_g"),
        ("checks.2.passed", False, "relative_deviation_g"),
        ("checks", [], "checks"),
        ("failed", [{"measure": "kl", "value": 1.0, "threshold": 0.0, "mend": ""}], "`failed` does not name"),
        ("files", {"model.safetensors": "0" * 64}, "files.g_lm.safetensors"),
        ("surprise", 1, "surprise: Extra inputs"),
        ("measures.losses.block", "4.2", "measures.losses"),
    ],
)
def test_what_does_not_follow_or_is_unknown_is_refused_in_one_line(
    certificate: dict[str, Any], tmp_path: Path, path: str, value: Any, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        read(edited(certificate, path, value), tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "certificate.json" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", '{"schema_version": 2}', '{"schema_version": 2, "verdict": NaN}']
)
def test_what_is_no_certificate_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "certificate.json").write_text(text)
    with pytest.raises(UserError, match=r"certificate\.json"):
        read_certificate(tmp_path / "certificate.json")
    with pytest.raises(UserError, match="no such file"):
        read_certificate(tmp_path / "none.json")


if __name__ == "__main__":
    (Path(__file__).resolve().parents[3] / "docs" / "certificate.schema.json").write_text(schema_text())
