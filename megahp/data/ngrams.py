"""Unigram and bigram baselines: the validation losses of models that only count."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def unigram_and_bigram(
    train_chunks: Iterable[np.ndarray], validation: np.ndarray | torch.Tensor, vocab_size: int
) -> tuple[float, float]:
    """Return the cross-entropies, in nats per token, of the validation targets under unigram and bigram models.

    train_chunks: integers [S + 1] or [n, S + 1]; each row is a stretch of text, whose first token is only a context.
    validation: int64 [n, S + 1]; the targets are all but the first column.

    The unigram model adds one to every count. The bigram model is interpolated Kneser-Ney with the modified discounts
    of Chen and Goodman. Memory grows with the distinct bigrams, not with the square of the vocabulary.
    """
    pairs, counts = count_bigrams(train_chunks, vocab_size)
    rows = np.asarray(validation, dtype=np.int64)
    contexts, targets = rows[:, :-1].ravel(), rows[:, 1:].ravel()
    unigrams = np.bincount(pairs % vocab_size, weights=counts, minlength=vocab_size)
    unigram = (unigrams + 1) / (counts.sum() + vocab_size)
    bigram = kneser_ney(pairs, counts, vocab_size, contexts, targets)
    return float(-np.log(unigram[targets]).mean()), float(-np.log(bigram).mean())


def count_bigrams(chunks: Iterable[np.ndarray], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct bigrams, as ascending int64 context * vocab_size + target, and their counts."""
    pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    pending: list[tuple[np.ndarray, np.ndarray]] = []
    for chunk in chunks:
        wide = np.asarray(chunk, dtype=np.int64)
        pending.append(np.unique(wide[..., :-1] * vocab_size + wide[..., 1:], return_counts=True))
        # Merging only when the pending bigrams outnumber the merged ones keeps the total cost near linear.
        if sum(len(keys) for keys, _ in pending) > len(pairs):
            pairs, counts = _merge([(pairs, counts), *pending])
            pending = []
    return _merge([(pairs, counts), *pending])


def kneser_ney(
    pairs: np.ndarray, counts: np.ndarray, vocab_size: int, contexts: np.ndarray, targets: np.ndarray
) -> np.ndarray:
    """Return the probability of each target after its context, float64 [n].

    The mass that discounting takes from a context's bigrams is distributed over tokens by the number of contexts that
    each follows (the lower-order model); what discounting takes from those numbers is spread evenly. After an unseen
    context, the lower-order model predicts alone.
    """
    followed = np.bincount(pairs % vocab_size, minlength=vocab_size)  # contexts before each token
    discounts = _discounts(followed)
    spread = (discounts.sum() if len(pairs) else 1) / vocab_size
    lower = (followed - discounts + spread) / max(len(pairs), 1)

    discounts = _discounts(counts)
    totals = np.bincount(pairs // vocab_size, weights=counts, minlength=vocab_size)[contexts]
    freed = np.bincount(pairs // vocab_size, weights=discounts, minlength=vocab_size)[contexts]
    kept = np.zeros(len(targets), np.int64)
    if len(pairs):
        keys = contexts * vocab_size + targets
        index = np.minimum(np.searchsorted(pairs, keys), len(pairs) - 1)
        kept = np.where(pairs[index] == keys, (counts - discounts)[index], 0)
    known = np.maximum(totals, 1)
    return kept / known + np.where(totals > 0, freed / known, 1) * lower[targets]


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Return the discount of each count: 0 for 0, D1 for 1, D2 for 2, D3 from 3 on (Chen and Goodman's estimates).

    With few counts the estimates can reach the edges 0 and k, where an unseen or a once-seen event would get no
    probability, so they are clipped to stay 0.1 inside.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6)
    y = n[1] / max(n[1] + 2 * n[2], 1)
    discounts = [np.clip(k - (k + 1) * y * n[k + 1] / max(n[k], 1), 0.1, k - 0.1) for k in (1, 2, 3)]
    return np.array([0.0, *discounts])[np.minimum(counts, 3)]


def _merge(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    pairs, index = np.unique(np.concatenate([keys for keys, _ in parts]), return_inverse=True)
    counts = np.bincount(index, weights=np.concatenate([count for _, count in parts]), minlength=len(pairs))
    return pairs, counts.astype(np.int64)
