"""Our log-likelihoods are those of `lm_eval --model hf` on the export, within 1e-4 an item."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from pipeline.errors import UserError
from pipeline.inference.grouping import windows
from pipeline.inference.hf.export import export_hf
from pipeline.inference.runtime import Bundle
from pipeline.inference.source import open_model
from pldr_model.model import PLDRModel
from tests.helpers.exports import write_bundle

pytest.importorskip("lm_eval")
TOLERANCE = 1e-4
ITEMS = """
{"context": "the quick brown fox", "choices": [" jumps", " sleeps over the lazy dog", " jumps over", " dog"]}
{"context": "the quick brown fox ", "choices": ["jumps", "sleeps"]}
{"context": "", "choices": ["the", "pack my box", "the end of the line"]}
{"context": "pack my box with five dozen jugs of wine. how vexingly quick daft zebras jump!", "choices": [" sphinx", " end"]}
{"context": "said she.", "choices": [" the end of the line is near, said she", " A", " \u20ac"]}
"""  # the last but one is longer than the context, which its beginning does not fit


def hflm(pretrained: Any, tokenizer: Any, **settings: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=pretrained, tokenizer=tokenizer, batch_size=3, device="cpu", **settings)


def loglikelihoods(lm: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    found: list[tuple[float, bool]] = lm.loglikelihood(asked, disable_tqdm=True)
    return found


def rolling(lm: Any, texts: Sequence[str]) -> list[float]:
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(texts)]
    found: list[float] = lm.loglikelihood_rolling(asked, disable_tqdm=True)
    return found


def assert_equal(lm: Any, model: Bundle, items: Sequence[dict[str, Any]]) -> float:
    """Every choice of every item; returns the largest difference."""
    pairs = [(item["context"], choice) for item in items for choice in item["choices"]]
    theirs = loglikelihoods(lm, pairs)
    ours = [one for item in items for one in model.score(item["context"], item["choices"])]
    differences = [abs(one.logprob - logprob) for one, (logprob, _) in zip(ours, theirs, strict=True)]
    assert max(differences) <= TOLERANCE, pairs[differences.index(max(differences))]
    assert [one.greedy for one in ours] == [greedy for _, greedy in theirs]
    return max(differences)


@pytest.fixture(scope="module")
def model(
    invariant: PLDRModel,
    text: torch.Tensor,
    certificate: dict[str, Any],
    tokenizer_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    folder = tmp_path_factory.mktemp("parity") / "bundle"
    return Bundle.load(write_bundle(folder, invariant, text, certificate, tokenizer_path))


@pytest.fixture(scope="module")
def lm(model: Bundle) -> Any:
    from pipeline.inference.hf.load import build

    return hflm(*build(model.opened))


def test_items_of_all_kinds_agree(lm: Any, model: Bundle) -> None:
    items = [json.loads(line) for line in ITEMS.strip().splitlines()]
    longest = max(len(model.tokenizer.encode(item["context"])) for item in items)
    assert longest > model.config.context_length, "none is cut"
    assert_equal(lm, model, items)


def test_texts_of_any_length_agree_token_by_token(lm: Any, model: Bundle) -> None:
    texts = ["the quick", "the end of the line is near. " * 12, "a"]
    ours = [sum(model.logprobs(text)["logprobs"]) for text in texts]
    assert ours == pytest.approx(rolling(lm, texts), abs=TOLERANCE)


@given(st.integers(0, 60), st.integers(1, 17))
def test_windows_are_lm_evals(length: int, context_length: int) -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = list(range(length))
    theirs = get_rolling_token_windows(ids, prefix_token=99, max_seq_len=context_length, context_len=1)
    assert windows(ids, first=99, context_length=context_length) == [make_disjoint_window(pair) for pair in theirs]


def test_context_and_continuation_are_tokenized_as_lm_eval_does(lm: Any, model: Bundle) -> None:
    """White space at the end of the context, pieces across the border, and what the tokenizer does not know."""
    for context, answer in (
        ("the  ", "dog"),
        ("the qu", "ick"),
        ("fox\n", " jumps"),
        ("\u20ac", "\u20ac dog"),
        ("a", "b\n"),
    ):
        theirs = lm._encode_pair(context, answer)
        start = model.tokenizer.encode(context.rstrip())
        assert theirs == (start, model.tokenizer.encode(context + answer)[len(start) :])
        assert_equal(lm, model, [{"context": context, "choices": [answer]}])


DATA = Path("/work/shared/data/eval_jsonl.tar.xz")


def questions(archive: tarfile.TarFile, name: str, count: int) -> Iterator[dict[str, Any]]:
    """The prompts of lm-eval's task over the first documents."""
    file = archive.extractfile(f"data_eval/{name}.jsonl")
    assert file is not None
    for _, line in zip(range(count), file, strict=False):
        doc = json.loads(line)
        choices = [doc["sol1"], doc["sol2"]] if name == "piqa" else doc["choices"]["text"]
        question = doc["goal"] if name == "piqa" else doc["question"]
        yield {"context": f"Question: {question}\nAnswer:", "choices": [f" {choice}" for choice in choices]}


def fits(model: Bundle, item: dict[str, Any]) -> bool:
    """Whether every choice has a score: one longer than the context is an assertion in `hf`, and a UserError here."""
    try:
        model.score(item["context"], item["choices"])
    except UserError as error:
        assert "longer than the context" in str(error)
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not DATA.is_file(), reason=f"needs {DATA}")
def test_real_questions_agree_on_the_export_of_a_trained_model(repository: Path, tmp_path: Path) -> None:
    """PIQA and ARC-Easy, 60 questions each, by stock `hf` on the folder that `pldr export hf` writes."""
    bundle = Path(os.environ.get("PLDR_BUNDLE", repository / "runs" / "quickstart" / "bundle"))
    if not bundle.is_dir():
        pytest.skip(f"{bundle}: no trained bundle (make quickstart), or set PLDR_BUNDLE")
    export_hf(open_model(bundle), tmp_path / "export")
    lm = hflm(str(tmp_path / "export"), None, trust_remote_code=True, dtype="float32")
    model = Bundle.load(bundle)
    with tarfile.open(DATA) as archive:
        for name in ("piqa", "arc_easy"):
            items = [item for item in questions(archive, name, 80) if fits(model, item)][:60]
            assert len(items) == 60
            largest = assert_equal(lm, model, items)
            print(f"{name}: {sum(len(item['choices']) for item in items)} log-likelihoods within {largest:.1e}")
