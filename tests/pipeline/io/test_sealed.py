"""JSON with a digest of its own content: one digit changed is damage."""

import json

import pytest

from pipeline.errors import UserError
from pipeline.io.sealed import publish_sealed, read_sealed
from pipeline.io.storage import parse_json, publish_json, sha256_json

RECORD = {"schema_version": 1, "loss": 2.5, "tags": {"a": "1"}, "outputs": {"x": [1, 2]}}


def test_a_changed_digit_is_damage(tmp_path):
    file = tmp_path / "record.json"
    publish_sealed(file, RECORD)
    assert read_sealed(file, schema_version=1) == RECORD
    file.write_text(file.read_text().replace("2.5", "3.5"))
    with pytest.raises(UserError, match=r"record.json: is not as it was written"):
        read_sealed(file)


def test_free_keys_may_change_and_old_files_have_no_digest(tmp_path):
    file = tmp_path / "record.json"
    publish_sealed(file, RECORD, free=("outputs",))
    file.write_text(json.dumps({**json.loads(file.read_bytes()), "outputs": {}}))
    assert read_sealed(file, free=("outputs",)) == {**RECORD, "outputs": {}}
    publish_json(file, RECORD)
    assert read_sealed(file) == RECORD


@pytest.mark.parametrize("text", [b"[" * 100_000, b"NaN", b'{"a": -Infinity}', b"\xff", b"9" * 5000, b""])
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_any_value_that_can_be_read_has_a_digest():
    deep = json.loads("[" * 900 + "]" * 900)
    assert len({sha256_json(value) for value in ("\ud800", deep, None)}) == 3
