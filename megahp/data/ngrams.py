"""What counting alone predicts: the unigram and bigram losses a language model has to beat."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def unigram_and_bigram(
    train_chunks: Iterable[np.ndarray], validation: np.ndarray | torch.Tensor, vocab_size: int
) -> tuple[float, float]:
    """Cross-entropies, in nats per token, of the validation targets under two models of the training tokens.

    train_chunks: integers [S + 1] or [n, S + 1]; each row is a stretch of text, its first token only a
    context.
    validation: int64 [n, S + 1]; the targets are all but the first column.

    The unigram model adds one to every count. The bigram model is interpolated Kneser-Ney with one
    discount, n1 / (n1 + 2 n2), estimated from the counts of counts. Memory grows with the distinct bigrams,
    not with the square of the vocabulary.
    """
    pairs, counts = count_bigrams(train_chunks, vocab_size)
    rows = np.asarray(validation, dtype=np.int64)
    contexts, targets = rows[:, :-1].ravel(), rows[:, 1:].ravel()
    unigrams = np.bincount(pairs % vocab_size, weights=counts, minlength=vocab_size)
    unigram = (unigrams + 1) / (counts.sum() + vocab_size)
    bigram = kneser_ney(pairs, counts, vocab_size, contexts, targets)
    return float(-np.log(unigram[targets]).mean()), float(-np.log(bigram).mean())


def count_bigrams(chunks: Iterable[np.ndarray], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct bigrams, as ascending int64 context * vocab_size + target, and how often each occurs."""
    pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    for chunk in chunks:
        wide = np.asarray(chunk, dtype=np.int64)
        waiting.append(np.unique(wide[..., :-1] * vocab_size + wide[..., 1:], return_counts=True))
        # Merging only when as much waits as is merged keeps the whole near linear.
        if sum(len(keys) for keys, _ in waiting) > len(pairs):
            pairs, counts = _merged([(pairs, counts), *waiting])
            waiting = []
    return _merged([(pairs, counts), *waiting])


def kneser_ney(
    pairs: np.ndarray, counts: np.ndarray, vocab_size: int, contexts: np.ndarray, targets: np.ndarray
) -> np.ndarray:
    """Probability of each target after its context, float64 [n].

    What the discounts take from a context's bigrams goes to the tokens by the number of contexts each
    follows; what they take from those numbers is spread evenly. A context never seen leaves all to them.
    """
    followed = np.bincount(pairs % vocab_size, minlength=vocab_size)
    taken = _taken(followed)
    spread = (taken.sum() if len(pairs) else 1) / vocab_size
    lower = (followed - taken + spread) / max(len(pairs), 1)

    taken = _taken(counts)
    totals = np.bincount(pairs // vocab_size, weights=counts, minlength=vocab_size)[contexts]
    freed = np.bincount(pairs // vocab_size, weights=taken, minlength=vocab_size)[contexts]
    kept = _lookup(pairs, counts - taken, contexts * vocab_size + targets)
    known = np.maximum(totals, 1)
    return kept / known + np.where(totals > 0, freed / known, 1) * lower[targets]


def _taken(counts: np.ndarray) -> np.ndarray:
    """What each count is discounted by: 0 for 0, D1, D2, D3 from 3 on (Chen and Goodman's estimates).

    The estimates need many counts; few can drive them to an edge, where an unseen or a once-seen event
    would get nothing, so they are kept off it.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6)
    y = n[1] / max(n[1] + 2 * n[2], 1)
    discounts = [np.clip(k - (k + 1) * y * n[k + 1] / max(n[k], 1), 0.1, k - 0.1) for k in (1, 2, 3)]
    return np.array([0.0, *discounts])[np.minimum(counts, 3)]


def _merged(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    pairs, place = np.unique(np.concatenate([keys for keys, _ in parts]), return_inverse=True)
    counts = np.bincount(place, weights=np.concatenate([count for _, count in parts]), minlength=len(pairs))
    return pairs, counts.astype(np.int64)


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where `keys` (ascending) has none."""
    if len(keys) == 0:
        return np.zeros(len(wanted), np.int64)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
