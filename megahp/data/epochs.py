"""The order of one epoch: documents are shuffled and concatenated to a stream, which is cut into windows, which are
shuffled. There are two orders: a keyed one, computed where it is asked for, and the drawn one of earlier runs, stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from megahp.data.cache import read_numbers, write_numbers
from megahp.data.permutation import Permutation, mix, words_of
from megahp.data.split import Documents

GROUP = 1024  # documents that are shuffled together, and whose lengths are summed up for one entry of an index
MOST_BLOCKS, LARGEST_BLOCK = 1 << 22, 16  # the index costs 0.1 us a block, at the start of every epoch
BLOCKS_AT_A_TIME = 1 << 16  # in the processor's cache
GROUPS_KEPT = 256  # of 24 KiB: all of a small corpus, so that each is computed once an epoch


# Documents that are not empty, in order: ids, tokens, and where each ends in the stream (int64).
Group = tuple[np.ndarray, np.ndarray, np.ndarray]


class Epoch(Protocol):
    """The order of one epoch."""

    def window(self, place: int) -> int:
        """Return which window of the stream comes at this place of the epoch."""
        ...

    def prepare(self, starts: np.ndarray) -> None:
        """Look up what `read` needs at these tokens of the stream (int64 [n]), in less time than one by one."""
        ...

    def read(self, start: int) -> Iterator[tuple[int, int, int]]:
        """Yield the documents of the stream from its token `start` on: id, the first token there, and how many the
        document has."""
        ...


class KeyedEpoch:
    """An order that is a function of the number of documents and of a name alone, so that no process stores it.

    Documents are permuted in blocks of neighbours, and shuffled again among GROUP of them, whose sum of tokens is one
    entry of an index. Up to twice MOST_BLOCKS documents a block is one document, and no test tells the order from a
    random one. Beyond, documents of a block stay within GROUP documents of the stream; their windows are shuffled like
    all others.

    Memory: 8 bytes for each GROUP documents of the corpus, and GROUPS_KEPT groups.
    """

    def __init__(self, documents: Documents, windows: int, name: str) -> None:
        self._documents, self._total = documents, documents.dataset.documents
        self._block = min(LARGEST_BLOCK, max(1, self._total // MOST_BLOCKS))
        self._blocks = Permutation(-(-self._total // self._block), f"{name} documents")
        self.window = lru_cache(maxsize=1 << 12)(Permutation(windows, f"{name} windows").at)
        (self._key,) = words_of(f"{name} groups", 1)
        self._ends = np.cumsum(self._group_tokens())
        self._groups: dict[int, Group] = {}  # the oldest first

    def prepare(self, starts: np.ndarray) -> None:
        groups = np.unique(np.searchsorted(self._ends, starts, side="right")).tolist()
        if new := [group for group in groups if group not in self._groups]:
            self._load(new[:GROUPS_KEPT])

    def read(self, start: int) -> Iterator[tuple[int, int, int]]:
        for group in range(int(np.searchsorted(self._ends, start, side="right")), len(self._ends)):
            ids, lengths, ends = self._groups.get(group) or self._load([group])[group]
            for place in range(int(np.searchsorted(ends, start, side="right")), len(ids)):
                tokens = int(lengths[place])
                yield int(ids[place]), max(0, start - int(ends[place]) + tokens), tokens

    def _group_tokens(self) -> np.ndarray:
        """Return how many tokens each group has (int64)."""
        dataset, block, total = self._documents.dataset, self._block, self._total
        blocks, is_training = -(-total // block), self._documents.part == "training"
        tokens = np.zeros(-(-blocks // (GROUP // block)), np.int64)
        # in the order of the corpus, so that its index is read once from beginning to end
        for first in range(0, blocks if is_training else 0, BLOCKS_AT_A_TIME):
            edges = np.arange(first, min(first + BLOCKS_AT_A_TIME, blocks) + 1)
            of_blocks = np.diff(dataset.document_starts(np.minimum(edges * block, total)))
            np.add.at(tokens, self._groups_of(edges[:-1]), of_blocks)
        for ids, lengths in self._documents.held_out():
            np.add.at(tokens, self._groups_of(ids // block), -lengths if is_training else lengths)
        return tokens

    def _groups_of(self, blocks: np.ndarray) -> np.ndarray:
        return self._blocks.places(blocks.astype(np.uint32)) // (GROUP // self._block)

    def _load(self, groups: Sequence[int]) -> dict[int, Group]:
        """Look up groups, and keep them in place of the oldest ones."""
        new = np.array(groups, np.uint32)[:, None]
        per_group, blocks = GROUP // self._block, -(-self._total // self._block)
        places = new * per_group + np.arange(per_group, dtype=np.uint32)
        first = self._blocks.at(np.minimum(places, blocks - 1)).astype(np.int64) * self._block
        first[places >= blocks] = self._total  # of the last group, which has fewer
        edges = np.minimum(first[:, :, None] + np.arange(self._block + 1), self._total)
        lengths = np.diff(self._documents.dataset.document_starts(edges)).reshape(len(new), -1)
        ids = edges[:, :, :-1].reshape(len(new), -1)
        lengths *= self._documents.contain(np.minimum(ids, self._total - 1))
        # hashes of different numbers differ, so that no sort is free to choose between two
        orders = np.argsort(mix(np.arange(ids.shape[1], dtype=np.uint32) ^ mix(new ^ self._key)))
        found: dict[int, Group] = {}
        for group, order, own_ids, own_lengths in zip(groups, orders, ids, lengths, strict=True):
            order = order[own_lengths[order] > 0]
            ends = np.cumsum(own_lengths[order]) + (self._ends[group - 1] if group else 0)
            found[group] = own_ids[order], own_lengths[order], ends
        self._groups |= found
        for group in [*self._groups][:-GROUPS_KEPT]:
            self._groups.pop(group, None)  # another thread may have been faster
        return found


class DrawnEpoch:
    """The order that numpy's RandomState draws, whose stream never changes: that of runs which began before there was
    the keyed one.

    It is kept in a file of 8 bytes for each window and 16 for each document, which several processes may build at once.
    """

    def __init__(self, documents: Documents, windows: int, seed: int, number: int, path: Path) -> None:
        self._dataset = documents.dataset
        numbers = read_numbers(path, 2 * len(documents) + windows)
        if numbers is None:
            # A 256-bit seed; hashed, so that (seed, epoch + 1) and (seed + 1, epoch) have nothing in common.
            words = np.frombuffer(hashlib.sha256(f"{seed} {number}".encode()).digest(), dtype="<u4")
            random = np.random.RandomState(words)
            # Documents first, then windows: another order of the draws would be another sample order.
            order = random.permutation(documents.ids())
            ends = np.cumsum(self._dataset.document_tokens(order))
            numbers = np.concatenate((order, ends, random.permutation(windows)))
            write_numbers(path, numbers)
        self._order, self._ends, self._windows = np.split(numbers, [len(documents), 2 * len(documents)])

    def window(self, place: int) -> int:
        return int(self._windows[place])

    def prepare(self, starts: np.ndarray) -> None:
        pass  # all is at hand

    def read(self, start: int) -> Iterator[tuple[int, int, int]]:
        for place in range(int(np.searchsorted(self._ends, start, side="right")), len(self._order)):
            tokens = int(self._ends[place]) - (int(self._ends[place - 1]) if place else 0)
            yield int(self._order[place]), max(0, start - int(self._ends[place]) + tokens), tokens
