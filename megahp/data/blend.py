"""Interleave several sources so that every prefix of the sample order is as close to the weights as possible."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megahp.errors import UserError


@dataclass(frozen=True)
class _Split:
    """A node of the tree: of the samples that reach it, `fraction` goes to `first`, the rest to `second`."""

    fraction: float
    first: _Split | int  # a further split, or the index of a source
    second: _Split | int


class Blend:
    """Assigns samples to sources by `weights`; only their ratios matter, and a source of weight 0 gets no samples.

    A Huffman tree of two-way splits: of the first n samples that reach a split, round(fraction * n) go one way. So the
    source of sample i is a function of i alone. After any i samples the count of a source differs from its share w * i
    by at most w/2 * sum(1/w_a) over itself and its ancestors below the root: by 1 with up to three sources, and by less
    than 1.7 with any number, because weights in a Huffman tree grow upwards like Fibonacci numbers.

    Raises UserError if no weight is above 0, or one is negative or not finite.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        for weight in weights:
            if not 0 <= weight < float("inf"):
                raise UserError(f"data weight {weight} is not a share; give a positive number, or 0")
        nodes: list[tuple[float, int, _Split | int]] = [(weight, k, k) for k, weight in enumerate(weights) if weight]
        if not nodes:
            raise UserError("data has no source of a weight above 0; name at least one")
        self._sources = len(weights)
        heapq.heapify(nodes)
        # The order breaks ties between equal weights, so that the tree is the same in every run.
        for order in range(len(weights), len(weights) + len(nodes) - 1):
            light, _, first = heapq.heappop(nodes)
            heavy, _, second = heapq.heappop(nodes)
            heapq.heappush(nodes, (light + heavy, order, _Split(light / (light + heavy), first, second)))
        self._tree = nodes[0][2]

    def locate(self, i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each sample i (int64 [n], below 2^40), and its index j = 0, 1, 2... in that source."""
        source, j = np.empty_like(i, np.int64), np.empty_like(i, np.int64)
        stack = [(self._tree, np.arange(len(i)), np.asarray(i, np.int64))]
        while stack:
            node, rows, n = stack.pop()
            if not len(rows):  # most of the tree, if there are many sources
                continue
            if isinstance(node, int):
                source[rows], j[rows] = node, n
                continue
            # Sample n goes to the first branch if the count of that branch grows from n to n + 1 samples.
            before = _share(node.fraction, n)
            first = _share(node.fraction, n + 1) > before
            stack += [(node.first, rows[first], before[first]), (node.second, rows[~first], (n - before)[~first])]
        return source, j

    def counts(self, n: int) -> list[int]:
        """Return how many of the first n samples each source gets."""
        counts, stack = [0] * self._sources, [(self._tree, n)]
        while stack:
            node, samples = stack.pop()
            if isinstance(node, int):
                counts[node] = samples
                continue
            first = int(_share(node.fraction, np.int64(samples)))
            stack += [(node.first, first), (node.second, samples - first)]
        return counts


def _share(fraction: float, n: np.ndarray | np.int64) -> np.ndarray:
    """Return round(fraction * n), halves up; numpy's rint rounds them to even, which deals unevenly."""
    return np.floor(fraction * n + 0.5).astype(np.int64)
