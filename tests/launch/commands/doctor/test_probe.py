"""launch/commands/doctor/probe.py: the facts about this machine."""

from launch.commands.doctor.probe import facts, token_file


def test_a_probe_looks_for_the_asking_hosts_file(tmp_path):
    question = {"run_dir": str(tmp_path / "run"), "token": "abc", "urls": [f"file://{tmp_path}/store"], "mlflow": None,
                "remote_tokens": False, "staging": str(tmp_path / "staging" / "run")}  # fmt: skip
    assert "is another directory here" in facts(question)["run_dir"]
    token_file(tmp_path / "run", "abc").touch()
    found = facts(question)
    assert found["staging"] is None and found["staging_free"] > 0 and not (tmp_path / "staging").exists()
    assert found["run_dir"] is None and found["urls"] == {f"file://{tmp_path}/store": None}
    assert list((tmp_path / "store").iterdir()) == [] and not (tmp_path / "run").exists()
