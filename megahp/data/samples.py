"""The sample order of one source: the tokens of sample j are a pure function of (data, seed, j).

Every epoch shuffles the documents, concatenates them, cuts the stream into windows and shuffles the windows. A sample
is a window, or one of its equal parts, plus the token that is the last target. Nothing depends on the run's length,
on the ranks or on the batch, so any of them may change during the run.
"""

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megahp.data.indexed import IndexedDataset
from megahp.errors import UserError
from megahp.files import refuse_irregular, replacing

# All random numbers come from RandomState: numpy guarantees that its stream never changes, unlike default_rng's.
SPLIT_SEED = 20_250_101
# Windows whose parts are interleaved, so that neighbours in the text do not share a batch; at most 1/16 of an epoch.
GROUP = 64


def split_documents(documents: int, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of training and validation documents (int64, ascending), the same for every training seed.

    The corpus is cut into equal stretches and one document of each is drawn for validation, so that both parts cover
    all of it. Both are non-empty if `validation_fraction` > 0 and there are two documents.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}; choose a value in [0, 1)")
    target = 0 if validation_fraction == 0 else max(1, round(documents * validation_fraction))
    count = max(0, min(target, documents - 1))
    edges = np.arange(count + 1) * documents // max(count, 1)
    within = np.random.RandomState(SPLIT_SEED).random_sample(count) * np.diff(edges)
    validation = edges[:-1] + within.astype(np.int64)
    return np.delete(np.arange(documents), validation), validation


@dataclass(frozen=True)
class _Epoch:
    """One epoch's order.

    documents: int64 [D], document ids in the order of the stream.
    ends: int64 [D], stream position at which each of them ends.
    windows: int64 [W], the windows of the stream in the order of the epoch.
    """

    documents: np.ndarray
    ends: np.ndarray
    windows: np.ndarray


class Sample(NamedTuple):
    """One sample, and what was wrong with those that were left out before it.

    tokens: int64 [length + 1].
    documents: int32 [length], for each input token the index of its document within the sample, from 0 on.
    wrong: for each sample left out because of an id outside the vocabulary, which.
    """

    tokens: np.ndarray
    documents: np.ndarray
    wrong: Sequence[str]


class SampleOrder:
    """The samples of `documents` (ids, int64) of one dataset, over any number of epochs.

    window: tokens that are shuffled as a unit, and the maximum length of a sample.
    skip: documents, by id, none of whose tokens is read.
    windows: number of them per epoch; up to `window` tokens at the end of the stream, of other documents in each epoch,
    belong to none.
    key: identifies the order: equal for equal contents, documents, seed and window.

    The order of each epoch is cached under `cache` in a .npy file, whose name hashes all that the order depends on;
    several processes may build the same one at once. Raises UserError if the documents hold too few tokens for one
    sample.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        documents: np.ndarray,
        window: int,
        seed: int,
        cache: Path,
        vocab_size: int = 1 << 62,
        skip: Sequence[range] = (),
    ) -> None:
        self.window, self.prefix = window, dataset.prefix
        self.tokens = int(dataset.document_tokens[documents].sum())
        self.windows = (self.tokens - 1) // window  # one token is left for the last target of the last window
        self.group = max(1, min(GROUP, self.windows // 16))
        if self.windows < 1:
            few = f"{len(documents)} documents hold {self.tokens} tokens, fewer than the {window + 1} of one sample"
            raise UserError(f"data {dataset.prefix!r}: {few}; add data or lower sequence_length")
        self._dataset, self._documents, self._seed, self._cache = dataset, documents, seed, cache
        self._vocab_size, self._skip = vocab_size, skip
        self._split = hashlib.sha256(np.ascontiguousarray(documents, np.int64).data).hexdigest()
        self._epoch = lru_cache(maxsize=2)(self._load_epoch)  # two, since a batch may span the end of an epoch

    @property
    def key(self) -> str:
        return hashlib.sha256(self._identity.encode()).hexdigest()[:32]

    @property
    def _identity(self) -> str:
        return f"{self._dataset.fingerprint} {self._split} {self._seed} {self.window}"

    def sample(self, j: int, length: int) -> Sample:
        """Return the first of the samples from j on (see `samples`). Raises UserError when an epoch holds none."""
        for sample in self.samples(j, length):
            return sample
        raise UserError(f"data {self.prefix!r}: every sample is left out; mend it, or shorten data.skip")

    def samples(self, j: int, length: int, end: int | None = None) -> Iterator[Sample]:
        """Yield the samples from j >= 0 to `end` (None = an epoch later), in the order cut into samples of `length`
        tokens, a divisor of the window. Those that a skipped document or an id outside the vocabulary is in are left
        out: which, depends on the data and `skip` alone.

        In a group of windows, the first parts come first, then the second parts.
        """
        wrong: list[str] = []
        for number in range(j, j + self.windows * (self.window // length) if end is None else end):
            pieces = self._pieces(number, length)
            if any(document in part for part in self._skip for document, _, _ in pieces):
                continue
            tokens = np.concatenate([self._dataset.tokens(*piece) for piece in pieces]).astype(np.int64)
            # an embedding that is split over ranks would not notice: each rank takes the id for another rank's
            if tokens.min() < 0 or tokens.max() >= self._vocab_size:
                wrong.append(next(filter(None, (self._dataset.problem(self._vocab_size, *piece) for piece in pieces))))
                continue
            lengths = [stop - start for _, start, stop in pieces]
            documents = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths)
            yield Sample(tokens, documents[:-1], wrong)
            wrong = []

    def _pieces(self, j: int, length: int) -> list[tuple[int, int, int]]:
        """Return what sample j consists of: documents, each with its first token there and the one after the last."""
        parts = self.window // length
        number, within = divmod(int(j), self.windows * parts)
        group, within = divmod(within, self.group * parts)
        part, place = divmod(within, min(self.group, self.windows - group * self.group))
        epoch = self._epoch(number)
        start = int(epoch.windows[group * self.group + place]) * self.window + part * length
        place = int(np.searchsorted(epoch.ends, start, side="right"))
        pieces, missing = [], length + 1
        while missing:
            document = int(epoch.documents[place])
            tokens = int(self._dataset.document_tokens[document])
            first = max(0, start - (int(epoch.ends[place]) - tokens))
            stop = min(tokens, first + missing)
            if stop > first:  # empty documents do not count
                pieces.append((document, first, stop))
            missing -= stop - first
            place += 1
        return pieces

    def convert_position(self, samples: int, old_length: int, new_length: int) -> int:
        """Return the index of the next sample of `new_length` tokens after `samples` samples of `old_length` tokens.

        No token comes twice in an epoch: if the length changes, the rest of a group of windows is skipped.
        """
        if old_length == new_length:
            return samples
        number, within = divmod(samples, self.windows * (self.window // old_length))
        groups = -(-within // (self.group * (self.window // old_length)))
        return (number * self.windows + min(groups * self.group, self.windows)) * (self.window // new_length)

    def _load_epoch(self, number: int) -> _Epoch:
        """Load the order of an epoch from the cache, or draw it."""
        name = hashlib.sha256(f"{self._identity} {number}".encode()).hexdigest()[:32]
        path = self._cache / f"order-{name}.npy"
        numbers = read_numbers(path, 2 * len(self._documents) + self.windows)
        if numbers is None:
            # A 256-bit seed; hashed, so that (seed, epoch + 1) and (seed + 1, epoch) have nothing in common.
            words = np.frombuffer(hashlib.sha256(f"{self._seed} {number}".encode()).digest(), dtype="<u4")
            random = np.random.RandomState(words)
            # Documents first, then windows: another order of the draws would be another sample order.
            documents = random.permutation(self._documents)
            ends = np.cumsum(self._dataset.document_tokens[documents])
            numbers = np.concatenate((documents, ends, random.permutation(self.windows)))
            write_numbers(path, numbers)
        return _Epoch(*np.split(numbers, [len(self._documents), 2 * len(self._documents)]))


def read_numbers(path: Path, size: int | None = None) -> np.ndarray | None:
    """Return the `size` (None = any number of) int64 stored at `path`, memory-mapped; None if missing or damaged."""
    try:
        refuse_irregular(path, "order")
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (UserError, OSError, ValueError, EOFError):
        return None
    if stored.dtype != np.int64 or stored.ndim != 1 or not len(stored) or size not in (None, len(stored) - 1):
        return None
    if stored[-1] != _checksum(stored[:-1]):
        return None
    return stored[:-1].view(np.ndarray)


def write_numbers(path: Path, numbers: np.ndarray) -> None:
    """Store `numbers` and their checksum, atomically: other processes may read the file at any time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished, open(unfinished, "wb") as file:
            np.save(file, np.append(numbers, _checksum(numbers)))
    except OSError as error:
        raise UserError(
            f"cache {str(path.parent)!r} cannot be written, {error.strerror}; choose another data.cache"
        ) from error


def _checksum(numbers: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(numbers).data)
