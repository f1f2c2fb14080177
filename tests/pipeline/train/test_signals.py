"""pipeline/train/signals.py: how ranks on other hosts get the launching process's signals, and its end."""

import json
import signal
import threading
import time

from pipeline.train import signals


def test_ranks_get_signals_and_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "BEAT_S", 0.02)
    noted, failed, ended = [], [], threading.Event()
    with signals.Head(tmp_path / "head.json") as head:
        signals.follow(head.file, patience_s=0.5, note=noted.append, fail=lambda why: (failed.append(why), ended.set()))
        head.pass_on(signal.SIGUSR1)
        time.sleep(0.7)  # longer than the patience: it lives
        assert noted == [signal.SIGUSR1] and not failed
    assert ended.wait(5) and "ended by the process that started it" in failed[0]


def test_ranks_end_when_the_file_stops_changing(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "BEAT_S", 0.02)
    file = tmp_path / "head.json"
    file.write_text(json.dumps({"token": "a", "beat": 3, "signals": [], "over": False}))
    failed, ended = [], threading.Event()
    signals.follow(file, patience_s=0.2, note=failed.append, fail=lambda why: (failed.append(why), ended.set()))
    assert ended.wait(5) and "no sign of life" in failed[0]
