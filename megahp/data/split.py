"""Which documents of a corpus are held out for validation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from megahp.data.indexed import IndexedDataset
from megahp.errors import UserError

SPLIT_SEED = 20_250_101
BLOCK = 1 << 20  # documents looked at at a time, to bound memory


@dataclass(frozen=True)
class Split:
    """The corpus, cut into equal stretches, of each of which one document is held out.

    documents: in the corpus. within: int32 [stretches], the place in each stretch of the one held out: 4 bytes for each
    is all that a rank holds, since all else is a function of the id.
    """

    documents: int
    within: np.ndarray

    def held_out(self, stretches: np.ndarray) -> np.ndarray:
        """Return the ids (int64) of the documents held out of these stretches (int64)."""
        return stretches * self.documents // max(len(self.within), 1) + self.within[stretches]

    def is_held_out(self, ids: np.ndarray) -> np.ndarray:
        """Return whether each of these documents (int64 [any]) is held out."""
        if not len(self.within):
            return np.zeros(ids.shape, bool)
        # the last stretch that begins at or before the document
        stretches = ((ids + 1) * len(self.within) - 1) // self.documents
        return self.held_out(stretches) == ids


def split_documents(documents: int, validation_fraction: float) -> Split:
    """Split a corpus, the same for every training seed: both parts cover all of it, and neither is empty if
    `validation_fraction` > 0 and there are two documents."""
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}; choose a value in [0, 1)")
    target = 0 if validation_fraction == 0 else max(1, round(documents * validation_fraction))
    count = max(0, min(target, documents - 1))
    # numpy guarantees that RandomState's stream never changes, unlike default_rng's
    random, within = np.random.RandomState(SPLIT_SEED), np.empty(count, np.int32)
    for start in range(0, count, BLOCK):
        edges = np.arange(start, min(start + BLOCK, count) + 1) * documents // count
        within[start : start + BLOCK] = (random.random_sample(len(edges) - 1) * np.diff(edges)).astype(np.int64)
    return Split(documents, within)


@dataclass(frozen=True)
class Documents:
    """Part of the documents of a dataset: those that its split holds out, or all others."""

    dataset: IndexedDataset
    split: Split
    part: Literal["training", "validation"] = "training"

    def __len__(self) -> int:
        held_out = len(self.split.within)
        return held_out if self.part == "validation" else self.split.documents - held_out

    @cached_property
    def tokens(self) -> int:
        held_out = sum(int(lengths.sum()) for _, lengths in self.held_out())
        return held_out if self.part == "validation" else self.dataset.total_tokens - held_out

    def ids(self) -> np.ndarray:
        """Return the ids of all of them (int64, ascending), 8 bytes each."""
        validation = self.split.held_out(np.arange(len(self.split.within)))
        return validation if self.part == "validation" else np.delete(np.arange(self.split.documents), validation)

    def contain(self, ids: np.ndarray) -> np.ndarray:
        """Return whether each of these documents of the dataset (int64 [any]) is among them."""
        is_held_out = self.split.is_held_out(ids)
        return is_held_out if self.part == "validation" else ~is_held_out

    def held_out(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the ids and tokens of the documents that the split holds out, in ascending blocks."""
        for start in range(0, len(self.split.within), BLOCK):
            ids = self.split.held_out(np.arange(start, min(start + BLOCK, len(self.split.within))))
            yield ids, self.dataset.document_tokens(ids)
