"""Which tokens sample j of one source holds: a pure function of (data, seed, j).

Every epoch shuffles the documents, lays them end to end, cuts the stream into windows and shuffles the windows.
A sample is a window, or one of its equal parts (plus the token that is the last target). Nothing depends on how long
the run will be, on the ranks or on the batch, so any of them may change in mid-run.
"""

import hashlib
import uuid
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from megahp.data.indexed import IndexedDataset
from megahp.errors import UserError
from megahp.files import refuse_irregular

# All draws are RandomState's: numpy promises that its stream never changes, which default_rng's may.
SPLIT_SEED = 20_250_101
# Windows whose parts are dealt in turn, so that neighbours in the text are none in a batch; or a sixteenth of an epoch.
GROUP = 64


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
    windows: int64 [W], the windows of the stream in the order of the epoch.
    """

    documents: np.ndarray
    ends: np.ndarray
    windows: np.ndarray


class SampleOrder:
    """The samples of `documents` (ids, int64) of one dataset, epoch after epoch without end.

    window: tokens that are shuffled as one, and the most a sample may have.
    windows: how many an epoch has; up to `window` tokens at the end of the stream, other documents in each epoch,
    belong to none.
    key: names the order, the same for the same contents, documents, seed and window.

    The orders of epochs are cached under `cache` as one .npy file each, whose name hashes all that the
    order depends on; processes may build the same one at the same time. Raises UserError when the documents
    hold too few tokens for one sample.
    """

    def __init__(self, dataset: IndexedDataset, documents: np.ndarray, window: int, seed: int, cache: Path) -> None:
        self.window = window
        self.tokens = int(dataset.document_tokens[documents].sum())
        self.windows = (self.tokens - 1) // window
        self.group = max(1, min(GROUP, self.windows // 16))
        if self.windows < 1:
            few = f"{len(documents)} documents hold {self.tokens} tokens, fewer than the {window + 1} of one sample"
            raise UserError(f"data {dataset.prefix!r}: {few}: add data or lower sequence_length")
        self._dataset, self._documents, self._seed, self._cache = dataset, documents, seed, cache
        split = hashlib.sha256(np.ascontiguousarray(documents, np.int64).data).hexdigest()
        self._identity = f"{dataset.fingerprint} {split} {seed} {window}"
        self.key = hashlib.sha256(self._identity.encode()).hexdigest()[:32]
        self._epoch = lru_cache(maxsize=2)(self._load_epoch)

    def sample(self, j: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample j >= 0 of the order read in samples of `length` tokens, a divisor of the window.

        Of a group of windows the first parts come first, then the second parts. Returns the sample's tokens, int64
        [length + 1], and for each of its input tokens the document it is in, counted from 0 within the sample, int32
        [length].
        """
        parts = self.window // length
        number, within = divmod(int(j), self.windows * parts)
        group, within = divmod(within, self.group * parts)
        part, place = divmod(within, min(self.group, self.windows - group * self.group))
        epoch = self._epoch(number)
        start = int(epoch.windows[group * self.group + place]) * self.window + part * length
        # the tokens of the stream from `start` on, gathered document by document
        tokens, documents = np.empty(length + 1, np.int64), np.empty(length + 1, np.int32)
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

    def load_state(self, taken: int, before: int, now: int) -> int:
        """The sample of `now` tokens to go on with after `taken` samples of `before` tokens.

        No token comes twice in an epoch: with another length, what is left of a group of windows is passed over.
        """
        if before == now:
            return taken
        number, within = divmod(taken, self.windows * (self.window // before))
        groups = -(-within // (self.group * (self.window // before)))
        return (number * self.windows + min(groups * self.group, self.windows)) * (self.window // now)

    def _load_epoch(self, number: int) -> _Epoch:
        name = hashlib.sha256(f"{self._identity} {number}".encode()).hexdigest()[:32]
        path = self._cache / f"order-{name}.npy"
        numbers = _read_order(path, 2 * len(self._documents) + self.windows)
        if numbers is None:
            # A 256-bit seed; hashed, so that (seed, epoch + 1) and (seed + 1, epoch) have nothing in common.
            words = np.frombuffer(hashlib.sha256(f"{self._seed} {number}".encode()).digest(), dtype="<u4")
            random = np.random.RandomState(words)
            documents = random.permutation(self._documents)
            ends = np.cumsum(self._dataset.document_tokens[documents])
            numbers = np.concatenate((documents, ends, random.permutation(self.windows)))
            _write_order(path, numbers)
        return _Epoch(*np.split(numbers, [len(self._documents), 2 * len(self._documents)]))


def _read_order(path: Path, size: int) -> np.ndarray | None:
    """The `size` int64 numbers stored at `path`, memory-mapped; None when it is missing or damaged."""
    try:
        refuse_irregular(path, "order")
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (UserError, OSError, ValueError, EOFError):
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
