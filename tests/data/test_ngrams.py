import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from megahp.data.ngrams import count_bigrams, kneser_ney, unigram_and_bigram

VOCABULARY = 23


def markov_rows(rows, seed, length=16):
    """Rows of a first-order chain with a skewed transition matrix."""
    random = np.random.RandomState(seed)
    transitions = np.random.RandomState(0).pareto(1.0, (VOCABULARY, VOCABULARY)) + 1e-3
    transitions /= transitions.sum(1, keepdims=True)
    chain = np.empty((rows, length), np.int64)
    chain[:, 0] = random.randint(VOCABULARY, size=rows)
    cumulative = transitions.cumsum(1)
    for t in range(1, length):
        draws = random.random_sample((rows, 1)) * cumulative[chain[:, t - 1], -1:]
        chain[:, t] = (draws > cumulative[chain[:, t - 1]]).sum(1)
    return chain


def losses_by_dictionary(train, validation, vocab_size):
    """The same two models, token by token."""
    pairs = Counter((int(a), int(b)) for row in train for a, b in zip(row, row[1:], strict=False))
    unigrams, contexts = Counter(), Counter()
    before, after = defaultdict(set), defaultdict(set)
    for (a, b), n in pairs.items():
        unigrams[b] += n
        contexts[a] += n
        before[b].add(a)
        after[a].add(b)

    def discounts(counts):
        n = Counter(counts)
        y = n[1] / max(n[1] + 2 * n[2], 1)
        by_count = {k: k - (k + 1) * y * n[k + 1] / max(n[k], 1) for k in (1, 2, 3)}
        return {0: 0, **{k: min(max(d, 0.1), k - 0.1) for k, d in by_count.items()}}

    def taken(discounts, count):
        return discounts[min(count, 3)]

    bigram_discounts = discounts(pairs.values())
    lower_discounts = discounts(len(contexts) for contexts in before.values())
    spread = sum(taken(lower_discounts, len(contexts)) for contexts in before.values()) / vocab_size

    def lower(b):
        kinds = len(before.get(b, ()))
        return (kinds - taken(lower_discounts, kinds) + spread) / len(pairs) if pairs else 1 / vocab_size

    def bigram(a, b):
        if not contexts[a]:
            return lower(b)
        freed = sum(taken(bigram_discounts, pairs[a, follower]) for follower in after[a])
        return (pairs[a, b] - taken(bigram_discounts, pairs[a, b]) + freed * lower(b)) / contexts[a]

    targets = [(int(a), int(b)) for row in validation for a, b in zip(row, row[1:], strict=False)]
    total = sum(unigrams.values())
    return (
        -sum(math.log((unigrams[b] + 1) / (total + vocab_size)) for _, b in targets) / len(targets),
        -sum(math.log(bigram(a, b)) for a, b in targets) / len(targets),
    )


@pytest.mark.parametrize("rows", [0, 1, 3, 40, 400])
def test_losses_are_those_of_a_dictionary(rows):
    train, validation = markov_rows(rows, seed=1), markov_rows(30, seed=2)
    expected = losses_by_dictionary(train, validation, VOCABULARY)
    assert unigram_and_bigram(iter([train]), validation, VOCABULARY) == pytest.approx(expected, rel=1e-12)
    assert unigram_and_bigram(list(train), torch.from_numpy(validation), VOCABULARY) == pytest.approx(
        expected, rel=1e-12
    ), "neither the cut into chunks nor the kind of array matters"


def test_bigram_probabilities_sum_to_one():
    pairs, counts = count_bigrams([markov_rows(5, seed=1)], VOCABULARY)
    for context in range(VOCABULARY):
        contexts = np.full(VOCABULARY, context)
        assert kneser_ney(pairs, counts, VOCABULARY, contexts, np.arange(VOCABULARY)).sum() == pytest.approx(1)


def test_bigram_approaches_the_entropy_of_a_chain():
    train, validation = markov_rows(8000, seed=1), markov_rows(500, seed=2)
    transitions = np.random.RandomState(0).pareto(1.0, (VOCABULARY, VOCABULARY)) + 1e-3
    transitions /= transitions.sum(1, keepdims=True)
    truth = -np.log(transitions[validation[:, :-1], validation[:, 1:]]).mean()
    unigram, bigram = unigram_and_bigram([train], validation, VOCABULARY)
    assert truth - 0.01 < bigram < truth + 0.01 < unigram - 0.1


def test_a_large_vocabulary_stays_sparse():
    vocab_size = 60_000
    train = np.random.RandomState(0).zipf(1.3, (50, 1000)) % vocab_size
    unigram, bigram = unigram_and_bigram(np.split(train, 10), train[:5], vocab_size)
    assert 0 < bigram < unigram < math.log(vocab_size)


def test_counts_merge_across_chunks():
    chunks = [np.array([1, 2, 3]), np.array([1, 2]), np.array([[2, 3], [2, 3]], np.uint16), np.array([5])]
    pairs, counts = count_bigrams(chunks, 10)
    assert (pairs.tolist(), counts.tolist()) == ([12, 23], [2, 3])
