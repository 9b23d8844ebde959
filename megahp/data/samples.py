"""Which tokens sample j of one source holds: a pure function of (data, seed, j).

Every epoch shuffles the documents, lays them end to end, cuts the stream into windows of `sequence_length`
tokens (plus the one that is the last target) and shuffles the windows. Nothing depends on how long the run
will be, on the ranks or on the batch, so any of them may change in mid-run.
"""

from __future__ import annotations

import hashlib
import uuid
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from megahp.data.indexed import IndexedDataset
from megahp.errors import UserError

# All draws are RandomState's: numpy promises that its stream never changes, which default_rng's may.
SPLIT_SEED = 20_250_101


def split_documents(documents: int, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the training and the validation documents (int64, ascending), the same for every training seed.

    The corpus is cut into equal stretches and one document of each is drawn for validation, so that both
    parts see all of it. Both are non-empty when `validation_fraction` > 0 and there are two documents.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}: choose a value in [0, 1)")
    wanted = 0 if validation_fraction == 0 else max(1, round(documents * validation_fraction))
    count = max(0, min(wanted, documents - 1))
    edges = np.arange(count + 1) * documents // max(count, 1)
    within = np.random.RandomState(SPLIT_SEED).random_sample(count) * np.diff(edges)
    validation = edges[:-1] + within.astype(np.int64)
    return np.delete(np.arange(documents), validation), validation


@dataclass(frozen=True)
class _Epoch:
    """One epoch's order.

    documents: int64 [D], document ids in the order of the stream.
    ends: int64 [D], stream position at which each of them ends.
    windows: int64 [W], window of the stream that each sample of the epoch is.
    """

    documents: np.ndarray
    ends: np.ndarray
    windows: np.ndarray


class SampleOrder:
    """The samples of `documents` (ids, int64) of one dataset, epoch after epoch without end.

    samples_per_epoch: windows in an epoch; up to `sequence_length` tokens at the end of the stream, other
    documents in each epoch, belong to none.

    The orders of epochs are cached under `cache` as one .npy file each, whose name hashes all that the
    order depends on; processes may build the same one at the same time. Raises UserError when the documents
    hold too few tokens for one sample.
    """

    def __init__(
        self, dataset: IndexedDataset, documents: np.ndarray, sequence_length: int, seed: int, cache: Path
    ) -> None:
        self.sequence_length = sequence_length
        self.tokens = int(dataset.document_tokens[documents].sum())
        self.samples_per_epoch = (self.tokens - 1) // sequence_length
        if self.samples_per_epoch < 1:
            raise UserError(
                f"data {dataset.prefix!r}: {len(documents)} documents hold {self.tokens} tokens, fewer than "
                f"the {sequence_length + 1} of one sample: add data or lower sequence_length"
            )
        self._dataset = dataset
        self._documents = documents
        self._seed = seed
        self._cache = cache
        split = hashlib.sha256(np.ascontiguousarray(documents, np.int64).data).hexdigest()
        self._key = f"{dataset.fingerprint} {split} {seed} {sequence_length}"
        self._epoch = lru_cache(maxsize=2)(self._load_epoch)

    def sample(self, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample j >= 0.

        Returns its tokens, int64 [sequence_length + 1], and for each of its input tokens the document it is
        in, counted from 0 within the sample, int32 [sequence_length].
        """
        number, within = divmod(int(j), self.samples_per_epoch)
        epoch = self._epoch(number)
        start = int(epoch.windows[within]) * self.sequence_length
        return self._window(epoch, start)

    def _window(self, epoch: _Epoch, start: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of the stream from `start` on, gathered document by document."""
        tokens = np.empty(self.sequence_length + 1, np.int64)
        documents = np.empty(self.sequence_length + 1, np.int32)
        place = int(np.searchsorted(epoch.ends, start, side="right"))
        filled = pieces = 0
        while filled < len(tokens):
            document = int(epoch.documents[place])
            skip = start + filled - (int(epoch.ends[place]) - int(self._dataset.document_tokens[document]))
            piece = self._dataset.tokens(document, skip, skip + len(tokens) - filled)
            tokens[filled : filled + len(piece)] = piece
            documents[filled : filled + len(piece)] = pieces
            filled += len(piece)
            pieces += len(piece) > 0
            place += 1
        return tokens, documents[:-1]

    def _load_epoch(self, number: int) -> _Epoch:
        name = hashlib.sha256(f"{self._key} {number}".encode()).hexdigest()[:32]
        path = self._cache / f"order-{name}.npy"
        size = 2 * len(self._documents) + self.samples_per_epoch
        numbers = _read_order(path, size)
        if numbers is None:
            numbers = np.concatenate(self._build_epoch(number))
            _write_order(path, numbers)
        cuts = [len(self._documents), 2 * len(self._documents)]
        return _Epoch(*np.split(numbers, cuts))

    def _build_epoch(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        random = np.random.RandomState(_seed_words(self._seed, number))
        documents = random.permutation(self._documents)
        ends = np.cumsum(self._dataset.document_tokens[documents])
        return documents, ends, random.permutation(self.samples_per_epoch)


def _seed_words(seed: int, epoch: int) -> np.ndarray:
    """A 256-bit seed; hashed, so that (seed, epoch + 1) and (seed + 1, epoch) have nothing in common."""
    return np.frombuffer(hashlib.sha256(f"{seed} {epoch}".encode()).digest(), dtype="<u4")


def _read_order(path: Path, size: int) -> np.ndarray | None:
    """The `size` int64 numbers stored at `path`, memory-mapped; None when it is missing or damaged."""
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if stored.dtype != np.int64 or stored.shape != (size + 1,) or stored[-1] != _checksum(stored[:-1]):
        return None
    return stored[:-1].view(np.ndarray)


def _write_order(path: Path, numbers: np.ndarray) -> None:
    """Store `numbers` and their checksum under a name of our own first: a reader sees a whole file or
    none."""
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            np.save(file, np.append(numbers, _checksum(numbers)))
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"cache {str(path.parent)!r} cannot be written, {error.strerror}: choose another") from error


def _checksum(numbers: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(numbers).data)
