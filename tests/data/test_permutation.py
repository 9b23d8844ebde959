import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from megahp.data.permutation import SMALL, Permutation, mix


def whole(n, name="x"):
    return Permutation(n, name).at(np.arange(n, dtype=np.uint32))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 10, 99, 100, 101, 4096, 65_535, SMALL, SMALL + 1, 100_003])
def test_every_element_has_one_place(n):
    order = whole(n)
    assert order.dtype == np.uint32 and np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(Permutation(n, "x").places(order), np.arange(n))


@pytest.mark.parametrize("n", [2, 101, 100_003, 3_999_999_999])
def test_numbers_and_arrays_agree(n):
    permutation = Permutation(n, "x")
    places = [0, 1, n // 3, n - 1]
    elements = permutation.at(np.array(places, np.uint32))
    assert [permutation.at(i) for i in places] == elements.tolist()
    assert permutation.places(elements).tolist() == places


def test_far_more_elements_than_an_array_holds():
    permutation = Permutation(10**13, "x")
    elements = {permutation.at(i) for i in range(1000)}
    assert len(elements) == 1000 and min(elements) < 10**11 and max(elements) > 9.9e12 and max(elements) < 10**13


def test_permutations_are_pinned():
    """Runs rely on these numbers: another permutation is another order of their data."""
    assert whole(7, "a").tolist() == [1, 2, 6, 3, 5, 4, 0]
    assert [Permutation(10**6, "1 0 windows").at(i) for i in range(4)] == [741643, 564677, 444051, 694876]
    large = Permutation(10**12, "b")
    assert [large.at(i) for i in (0, 1, 10**12 - 1)] == [266123644098, 35901358655, 408089540625]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_all_orders_of_a_few_are_equally_likely(n):
    draws = 2000
    counts = Counter(tuple(Permutation(n, str(name)).at(i) for i in range(n)) for name in range(draws))
    expected, freedom = draws / math.factorial(n), math.factorial(n) - 1
    chi2 = sum((counts[order] - expected) ** 2 / expected for order in permutations(range(n)))
    assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [100, SMALL, SMALL + 1, 1_000_000])
def test_elements_are_spread_evenly_over_places(n):
    """Every tenth of the places holds as much of every tenth of the elements as a random order would, also among the
    first places alone, and over names."""
    tenths = np.zeros((10, 10))
    for name in range(200 if n == 100 else 3):
        order = whole(n, f"spread {name}")
        np.add.at(tenths, (np.arange(n) * 10 // n, order.astype(np.int64) * 10 // n), 1)
    expected = tenths.sum() / 100
    chi2 = ((tenths - expected) ** 2 / expected).sum()
    assert abs(chi2 - 81) < 5 * math.sqrt(2 * 81)


@pytest.mark.parametrize("n", [1000, SMALL + 1, 1_000_000])
@pytest.mark.parametrize("lag", [1, 2, 7, 256, 999])
def test_neighbours_are_not_correlated(n, lag):
    order = whole(n, "neighbours").astype(np.float64)
    correlation = np.corrcoef(order[:-lag], order[lag:])[0, 1] if n - lag > 1 else 0.0
    assert abs(correlation) < 4.5 / math.sqrt(n - lag)
    steps = np.diff(order.astype(np.int64))  # no step is frequent, as in a linear congruence
    assert np.unique(steps, return_counts=True)[1].max() < 20


def test_pairs_of_neighbours_go_anywhere():
    """Of the fewest elements that have the fewest rounds; places of one row of the network, and of one column."""
    n = SMALL + 6
    for pair in ((0, 1), (0, 33)):
        counts = np.zeros((8, 8))
        for name in range(4000):
            permutation = Permutation(n, f"pair {name}")
            counts[tuple(permutation.at(place) * 8 // n for place in pair)] += 1
        chi2 = ((counts - 4000 / 64) ** 2 / (4000 / 64)).sum()
        assert abs(chi2 - 63) < 4.5 * math.sqrt(2 * 63)


def test_names_and_sizes_give_other_orders():
    """An element is at its place in another order as often as chance would have it: once."""
    same = [int((whole(1000, "a") == whole(1000, f"b{name}")).sum()) for name in range(50)]
    assert 30 < sum(same) < 75
    fixed = [int((whole(1000, f"c{name}") == np.arange(1000)).sum()) for name in range(50)]
    assert 30 < sum(fixed) < 75


def test_mix_is_one_to_one():
    assert len(np.unique(mix(np.arange(1 << 18, dtype=np.uint32) << 9))) == 1 << 18
    assert mix(0xFFFFFFFF) == int(mix(np.array([0xFFFFFFFF], np.uint32))[0]) < 1 << 32
