"""Orders of sub-series against loops written from their definition."""

from __future__ import annotations

import numpy as np
import pytest

from megahp.series.order import ORDERS, Order, permutation, window_order


def by_loops(length: int, k: int, order: Order) -> list[int]:
    offsets = range(k) if order.startswith("regular") else range(k - 1, -1, -1)
    steps = range(length // k)
    if order.endswith("alternating"):
        return [step * k + offset for step in steps for offset in offsets]
    return [step * k + offset for offset in offsets for step in steps]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("k", [1, 2, 3, 6, 12])
@pytest.mark.parametrize("steps", [0, 1, 4, 7])
def test_definition(order: Order, k: int, steps: int) -> None:
    found = permutation(steps * k, k, order)
    assert found.dtype == np.int64 and found.tolist() == by_loops(steps * k, k, order)


@pytest.mark.parametrize("length", range(0, 66, 6))
def test_six_sub_series(length: int) -> None:
    """Check 38: split and merge give every series back; each sub-series has N/K values; backfill is reversed."""
    series = np.random.default_rng(length).normal(size=length)
    split = {order: series[permutation(length, 6, order)] for order in ORDERS}
    for order, values in split.items():
        merged = np.empty(length)
        merged[permutation(length, 6, order)] = values
        assert merged.tolist() == series.tolist()
    sub_series = split["regular"].reshape(6, length // 6)
    assert all(each.tolist() == series[k::6].tolist() for k, each in enumerate(sub_series))
    assert split["backfill"].reshape(6, -1 if length else 0).tolist() == sub_series[::-1].tolist()
    assert split["regular-alternating"].tolist() == series.tolist()
    groups = series.reshape(-1, 6)[:, ::-1]
    assert split["backfill-alternating"].tolist() == groups.reshape(-1).tolist()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("given", "horizon", "k"), [(7, 6, 3), (12, 6, 6), (2, 4, 4), (5, 3, 1)])
def test_windows(order: Order, given: int, horizon: int, k: int) -> None:
    """What is given comes first; a rest that K does not divide stays in front."""
    rest = given % k
    found = window_order(given, horizon, k, order).tolist()
    assert found[:rest] == list(range(rest))
    assert [time - rest for time in found[rest:given]] == by_loops(given - rest, k, order)
    assert [time - given for time in found[given:]] == by_loops(horizon, k, order)
