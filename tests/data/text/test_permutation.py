"""The order of rows: a bijection, different for each seed and epoch, without structure."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deepseek.data.text.loader import permute


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 100))
def test_every_epoch_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    order = permute(np.arange(size), size, seed, epoch)
    assert sorted(order.tolist()) == list(range(size))


@given(st.integers(1, 3000), st.integers(0, 2**63), st.data())
def test_any_part_can_be_asked_for_alone(size: int, seed: int, data: st.DataObject) -> None:
    chosen = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), dtype=np.int64)
    assert (permute(chosen, size, seed, 3) == permute(np.arange(size), size, seed, 3)[chosen]).all()


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    orders = [permute(np.arange(1000), 1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for index, left in enumerate(orders):
        for right in orders[:index]:
            assert (left == right).sum() < 10  # random orders agree in one place on average


def test_the_order_has_no_trend_and_no_neighbours() -> None:
    order = permute(np.arange(10_000), 10_000, 7, 0)
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05
    assert (np.abs(np.diff(order)) == 1).sum() < 20
