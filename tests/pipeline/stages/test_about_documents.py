"""What training says of document masks and losses by source when it starts."""

from types import SimpleNamespace

import pytest

from pipeline.config.load import parse_config
from pipeline.stages.train import _about_documents


@pytest.mark.parametrize(
    ("masks", "source", "stored", "said"),
    [
        (True, "learned", ("a", "b"), ["a learned G_LM sums over all documents of a sequence"]),
        (True, "constant", ("a", "b"), []),
        (False, "learned", ("a", "b"), []),
        (False, "learned", (), ["val/loss/SOURCE is not logged: these tokens are of a single source"]),
    ],
)
def test_what_masks_and_sources_do_not_do_is_said(masks, source, stored, said):
    sizes = {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8}
    tree = {
        "name": "t",
        "run_dir": "runs/t",
        "data": {"sources": ["x.txt"]},
        "tokens": {"boundaries": True, "sources": True},
        "model": {**sizes, "g_source": source},
        "train": {"document_masks": masks},
    }
    lines = _about_documents(parse_config(tree, where="test"), SimpleNamespace(sources=stored))
    assert len(lines) == len(said) and all(text in line for text, line in zip(said, lines, strict=True))
