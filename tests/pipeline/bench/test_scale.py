"""Two ranks over a cable: the bytes that cross it are those of `pldr plan`'s model, at every ZeRO stage.

Bytes do not depend on how busy the machine is; times are measured by `python -m pipeline.bench.scale`. Needs root and iproute2.
"""

import os

import pytest

from pipeline.bench.scale.compare import compare, traffic
from pipeline.bench.scale.hosts import TwoHosts
from pipeline.bench.scale.ranks import Ranks, Sizes
from pipeline.config.load import load_config
from pipeline.errors import UserError

SIZES = Sizes(vocabulary=8192, context=8, layers=1, heads=2, head_dim=32)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    try:
        with TwoHosts() as hosts:
            yield Ranks(hosts, tmp_path_factory.mktemp("scale"), SIZES, steps=3)
    except UserError as error:
        pytest.skip(f"this machine is not allowed to make network namespaces ({error})")


@pytest.mark.multinode
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_bytes_on_the_cable_are_those_of_the_plan(ranks, stage):
    found = ranks.together(stage, [1000.0], port=29600 + stage)
    config = load_config(str(SIZES.write(ranks.folder)), SIZES.overrides(stage, 2))
    for operation, (nbytes, calls, seen, seen_calls) in traffic(config, found[0]).items():
        # What is sharded is padded to a multiple of the ranks (at most 3 elements a call).
        assert 0 <= seen - nbytes <= 12 * max(calls, 1) and seen_calls == calls, operation
    alone = [{"rates": {"None": {"steps": [{"seconds": 0.1, "payload": 0}]}}}] * 2
    # The rest are gloo's own headers, a message or two of each collective: 163 a step at stage 3.
    case = compare(config, alone, found, "1000.0")
    assert case["measured_bytes"] == pytest.approx(case["predicted_bytes"], rel=5e-3, abs=163 * 400)
    assert case["measured_bytes"] >= case["predicted_bytes"]
