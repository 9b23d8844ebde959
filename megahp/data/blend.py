"""Which source the i-th sample comes from, at every i as close to the weights as whole samples allow."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megahp.errors import UserError


@dataclass(frozen=True)
class _Split:
    """Of the samples that reach it, `fraction` goes to `first`, the rest to `second`: sources or further
    splits."""

    fraction: float
    first: _Split | int
    second: _Split | int


class Blend:
    """Deals samples to sources by `weights` (only their ratios matter; a source of weight 0 gets none).

    A Huffman tree of two-way splits: of the first n samples that reach a split, round(fraction * n) go one
    way. So the source of sample i is a function of i alone. After any i samples the count of a source
    differs from its share w * i by at most w/2 * sum(1/w_a) over itself and its ancestors below the root:
    by 1 with up to three sources, and by less than 1.7 with any number, because weights in a Huffman tree
    grow upwards like Fibonacci numbers.

    Raises UserError when no weight is above 0, or one is negative or not finite.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        for weight in weights:
            if not 0 <= weight < float("inf"):
                raise UserError(f"data weight {weight} is not a share: give one that is positive, or 0")
        if not any(weights):
            raise UserError("data has no source of a weight above 0: name at least one")
        self._sources = len(weights)
        self._tree = _huffman(weights)

    def locate(self, i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sample i (int64 [n], below 2^40), and its number j = 0, 1, 2... within that
        source."""
        source, j = np.empty_like(i, np.int64), np.empty_like(i, np.int64)
        reached = [(self._tree, np.arange(len(i)), np.asarray(i, np.int64))]
        while reached:
            node, rows, n = reached.pop()
            if not len(rows):  # most of the tree, where sources are many
                continue
            if isinstance(node, int):
                source[rows], j[rows] = node, n
                continue
            before = _share(node.fraction, n)
            first = _share(node.fraction, n + 1) > before
            reached += [(node.first, rows[first], before[first]), (node.second, rows[~first], (n - before)[~first])]
        return source, j

    def counts(self, n: int) -> list[int]:
        """How many of the first n samples each source gets."""
        counts, reached = [0] * self._sources, [(self._tree, n)]
        while reached:
            node, samples = reached.pop()
            if isinstance(node, int):
                counts[node] = samples
                continue
            first = int(_share(node.fraction, np.int64(samples)))
            reached += [(node.first, first), (node.second, samples - first)]
        return counts


def _share(fraction: float, n: np.ndarray | np.int64) -> np.ndarray:
    return np.floor(fraction * n + 0.5).astype(np.int64)


def _huffman(weights: Sequence[float]) -> _Split | int:
    nodes: list[tuple[float, int, _Split | int]] = [(weight, k, k) for k, weight in enumerate(weights) if weight]
    heapq.heapify(nodes)
    for order in range(len(weights), len(weights) + len(nodes) - 1):
        light, _, first = heapq.heappop(nodes)
        heavy, _, second = heapq.heappop(nodes)
        heapq.heappush(nodes, (light + heavy, order, _Split(light / (light + heavy), first, second)))
    return nodes[0][2]
