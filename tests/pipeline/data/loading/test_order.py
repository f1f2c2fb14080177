"""The data order: a permutation of each epoch, batches that depend only on `start` and `size`, bounded windows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.loading.order import WINDOW_BLOCKS, Order, permute

relaxed = settings(deadline=None, max_examples=40)  # a slow machine is not a failure
orders = st.builds(
    Order,
    num_sequences=st.integers(1, 3000),
    block_sequences=st.integers(1, 70),
    fingerprint=st.sampled_from(["a", "b"]),
    seed=st.integers(0, 2**63),
)


@relaxed
@given(orders, st.integers(0, 10**6))
def test_an_epoch_is_a_permutation(order: Order, epoch: int) -> None:
    ids = order.sequences(epoch, np.arange(order.num_sequences))
    assert np.array_equal(np.sort(ids), np.arange(order.num_sequences))


@relaxed
@given(orders, st.data())
def test_single_positions_agree_with_the_full_epoch(order: Order, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, order.num_sequences - 1))
    assert order.sequences(3, [position])[0] == order.sequences(3, np.arange(order.num_sequences))[position]


@relaxed
@given(orders, st.integers(0, 9000), st.integers(0, 2000), st.integers(0, 2000))
def test_batches_join_without_gap_across_epoch_ends(order: Order, start: int, first: int, second: int) -> None:
    first, second = first % (3 * order.num_sequences), second % (3 * order.num_sequences)
    joined = np.concatenate([order.global_batch(start, first), order.global_batch(start + first, second)])
    assert np.array_equal(joined, order.global_batch(start, first + second))


@relaxed
@given(orders)
def test_consecutive_batches_cover_two_epochs_exactly_twice(order: Order) -> None:
    ids = order.global_batch(0, 2 * order.num_sequences)
    assert np.array_equal(np.bincount(ids, minlength=order.num_sequences), np.full(order.num_sequences, 2))


@pytest.mark.parametrize("change", [{"seed": 2}, {"fingerprint": "other"}])
def test_seed_and_fingerprint_change_the_order(change: dict[str, object]) -> None:
    same = {"num_sequences": 1000, "block_sequences": 16, "fingerprint": "x", "seed": 1}
    one, other = Order(**same), Order(**{**same, **change})  # type: ignore[arg-type]
    assert (one.global_batch(0, 1000) != other.global_batch(0, 1000)).mean() > 0.95


def test_epochs_differ_and_look_random() -> None:
    order = Order(num_sequences=4096, block_sequences=16, fingerprint="x", seed=1)
    first, second = (order.sequences(epoch, np.arange(4096)).astype(float) for epoch in (0, 1))
    assert (first != second).mean() > 0.99
    for one, two in ((first, second), (first, np.arange(4096.0)), (first[1:], first[:-1])):
        assert abs(np.corrcoef(one, two)[0, 1]) < 0.1  # 1/sqrt(4096) = 0.016 is one standard deviation


@relaxed
@given(st.integers(1, 20_000), st.integers(4, 64))
def test_a_window_touches_few_blocks(num_sequences: int, block_sequences: int) -> None:
    """Any run of positions inside a window reads at most WINDOW_BLOCKS blocks (one more with the short one)."""
    order = Order(num_sequences=num_sequences, block_sequences=block_sequences, fingerprint="x", seed=1)
    window = WINDOW_BLOCKS * block_sequences
    for start in range(0, num_sequences, window):
        ids = order.sequences(0, np.arange(start, min(start + window, num_sequences)))
        assert len(np.unique(ids // block_sequences)) <= WINDOW_BLOCKS + 1


def test_memory_does_not_depend_on_the_number_of_sequences() -> None:
    order = Order(num_sequences=10**12 + 3, block_sequences=256, fingerprint="x", seed=1)
    ids = order.global_batch(10**12 - 5, 64)  # runs over the epoch's end
    assert len(set(ids.tolist())) == 64 and ids.min() >= 0 and ids.max() < 10**12 + 3


def test_the_order_never_changes() -> None:
    """Golden: a change here changes every run's data; then VERSION must change too."""
    order = Order(num_sequences=1000, block_sequences=16, fingerprint="x", seed=1)
    assert order.global_batch(995, 10).tolist() == [383, 271, 23, 257, 209, 88, 398, 192, 743, 458]


@relaxed
@given(st.integers(1, 500), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection_for_every_key(size: int, key: int) -> None:
    image = permute(np.arange(size), size, np.full(size, key, dtype=np.uint64))
    assert np.array_equal(np.sort(image), np.arange(size))


def test_an_empty_split_has_no_order() -> None:
    with pytest.raises(ValueError, match="num_sequences >= 1"):
        Order(num_sequences=0, block_sequences=1, fingerprint="x", seed=1)
