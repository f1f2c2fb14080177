"""`from pldr import load`: what README and docs/bundle.md say of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pldr import Caution, UserError, load
from pldr_model.generation import generate


def test_the_lines_in_the_readme_run(
    make_bundle: Callable[..., Path], repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = re.search(
        r"^    from pldr import load\n(?:    .*\n)+", (repository / "README.md").read_text(), re.MULTILINE
    )
    assert lines is not None and lines[0].count("\n") == 3
    code = lines[0].replace("    ", "").replace("runs/quickstart/bundle", str(make_bundle()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Caution)
        exec(code, {})
    assert "Scored(logprob=-" in capsys.readouterr().out


def test_a_run_loads_with_overrides_and_live(
    make_finished: Callable[..., Path], text: torch.Tensor, tiny: Any, tmp_path: Path
) -> None:
    model = tiny.make_model(gain=1.0)
    path = make_finished(model)
    (tmp_path / "finished").rename(tmp_path / "moved")
    overrides = [f"run_dir={tmp_path / 'moved'}"]
    with pytest.warns(Caution, match="UNCERTIFIED run .no certificate."):
        cached, live = load(path, overrides), load(path, overrides, live=True)
    prompt = "the quick brown"
    ids = live.tokenizer.encode(prompt)
    expected = generate(model, [ids], max_new_tokens=8, use_cache=False, eos_id=3)
    assert live.generate([prompt], max_new_tokens=8) == [live._decode(expected[0])]
    assert "".join(live.stream(prompt, max_new_tokens=8)) == live._decode(expected[0])
    scores = [one.score(prompt, [" fox", " dog"]) for one in (cached, live)]
    assert scores[0] != scores[1]
    whole = live.tokenizer.encode(prompt + " fox")
    with torch.inference_mode():
        logprobs = model(torch.tensor([whole[:-1]]))[0].log_softmax(dim=-1)
    own = [float(logprobs[i - 1, whole[i]]) for i in range(len(ids), len(whole))]
    assert scores[1][0].logprob == pytest.approx(sum(own), abs=1e-4)
    assert live.live and not cached.live


def test_a_caution_names_the_line_that_loaded(make_bundle: Callable[..., Path]) -> None:
    bundle = make_bundle(uncertified=True)
    with pytest.warns(Caution, match="UNCERTIFIED bundle") as caught:
        model = load(bundle)
    assert caught[0].filename == __file__ and not model.certified
    assert model.certificate is not None and model.certificate["packaged"] == "uncertified"


def test_what_is_no_model_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        load(tmp_path / "none")
