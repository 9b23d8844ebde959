import math

import numpy as np
import pytest

from megahp.data import blend
from megahp.data.blend import Blend
from megahp.errors import UserError

BLENDS = [
    [1.0],
    [0.5, 0.5],
    [0.3, 0.7],
    [1e-4, 1],
    [0.2, 0.3, 0.5],
    [3, 1, 1],
    [8, 5, 3, 2, 1, 1],
    [0.98, 0.01, 0.01],
    [1 / 3, 1 / 3, 1 / 3 - 1e-6, 1e-6],
    [1] * 7,
    [math.pi, math.e, math.sqrt(2), 0.1, 0.01, 7],
    list(np.random.RandomState(0).pareto(0.7, 40) + 1e-3),
]


def dealt_one_by_one(weights, samples):
    """The same rule with counters: merge the two lightest nodes until one is left, then let samples fall."""
    nodes = [(weight, k, k) for k, weight in enumerate(weights)]
    while len(nodes) > 1:
        nodes.sort(key=lambda node: node[:2])
        (a, _, first), (b, _, second) = nodes[:2]
        split = {"fraction": a / (a + b), "first": first, "second": second, "arrived": 0, "passed": 0}
        nodes = [*nodes[2:], (a + b, 2 * len(weights) - len(nodes), split)]
    counts, dealt = [0] * len(weights), []
    for _ in range(samples):
        node = nodes[0][2]
        while isinstance(node, dict):
            node["arrived"] += 1
            goes_first = math.floor(node["fraction"] * node["arrived"] + 0.5) > node["passed"]
            node["passed"] += goes_first
            node = node["first" if goes_first else "second"]
        dealt.append((node, counts[node]))
        counts[node] += 1
    return dealt


@pytest.mark.parametrize("weights", BLENDS)
def test_locate_is_the_counting_loop(weights):
    source, j = Blend(weights).locate(np.arange(2000))
    assert (source.dtype, j.dtype) == (np.int64, np.int64)
    assert list(zip(source.tolist(), j.tolist(), strict=True)) == dealt_one_by_one(weights, 2000)


def deviations(weights, samples):
    """Largest |count - w i| of each source over all i."""
    source, _ = Blend(weights).locate(np.arange(samples))
    shares = np.array(weights) / sum(weights)
    i = np.arange(1, samples + 1)
    return np.array([abs(np.cumsum(source == k) - share * i).max() for k, share in enumerate(shares)])


@pytest.mark.parametrize("weights", BLENDS)
def test_counts_stay_within_the_bound(weights):
    bound = 1.0 if len(weights) <= 3 else 1.7
    assert deviations(weights, 30_000).max() <= bound + 1e-9


def test_counts_stay_within_the_bound_for_random_weights():
    random = np.random.RandomState(1)
    for size in [2, 3, 3, 3, 5, 8, 13, 30] * 3:
        weights = np.exp(random.normal(0, 2, size)).tolist()
        assert deviations(weights, 5_000).max() <= (1.0 if size <= 3 else 1.7) + 1e-9


@pytest.mark.parametrize("weights", BLENDS)
def test_each_source_is_read_without_gaps(weights):
    source, j = Blend(weights).locate(np.arange(5000))
    for k in range(len(weights)):
        assert j[source == k].tolist() == list(range((source == k).sum()))


def test_a_sample_does_not_depend_on_the_others_asked_for():
    blend = Blend([5, 2, 2, 1])
    source, j = blend.locate(np.arange(3000))
    some = np.random.RandomState(0).permutation(3000)[:100]
    assert [a.tolist() for a in blend.locate(some)] == [source[some].tolist(), j[some].tolist()]
    late_source, late_j = blend.locate(np.array([10**11, 10**11 + 1]))
    assert (abs(late_j - 10**11 * np.array([5, 2, 2, 1])[late_source] / 10) < 2).all()


def test_only_ratios_of_weights_matter():
    one, ten = Blend([1, 2, 5]).locate(np.arange(1000)), Blend([10, 20, 50]).locate(np.arange(1000))
    assert (one[0] == ten[0]).all() and (one[1] == ten[1]).all()


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [float("nan")], [1, float("inf")]])
def test_bad_weights_are_refused(weights):
    with pytest.raises(UserError):
        Blend(weights)


@pytest.mark.parametrize("weights", BLENDS)
@pytest.mark.parametrize("n", [0, 1, 2, 17, 2000])
def test_counts_are_those_of_the_first_samples(weights, n):
    source, _ = Blend(weights).locate(np.arange(n))
    assert Blend(weights).counts(n) == np.bincount(source, minlength=len(weights)).tolist()


def test_a_source_of_weight_zero_is_as_if_it_were_not_there():
    source, j = Blend([0, 0.3, 0, 0.7]).locate(np.arange(500))
    without, same = Blend([0.3, 0.7]).locate(np.arange(500))
    assert np.array_equal(source, np.array([1, 3])[without]) and np.array_equal(j, same)
    assert Blend([0, 0.3, 0, 0.7]).counts(500)[::2] == [0, 0]


def test_a_batch_costs_its_samples_and_not_the_sources(monkeypatch):
    """Only the splits on the way of four samples are asked, of 5,000 sources."""
    dealt, asked, share = Blend([1.0] * 5000), [], blend._share
    monkeypatch.setattr(blend, "_share", lambda fraction, n: asked.append(n) or share(fraction, n))
    dealt.locate(np.arange(7, 11))
    assert len(asked) <= 2 * 4 * math.ceil(math.log2(5000))
