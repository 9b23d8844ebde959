"""The sample order of one source: the tokens of sample j are a pure function of (data, seed, j).

Every epoch shuffles the documents, concatenates them, cuts the stream into windows and shuffles the windows. A sample
is a window, or one of its equal parts, plus the token that is the last target. Nothing depends on the run's length,
on the ranks or on the batch, so any of them may change during the run.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from megahp.data.epochs import DrawnEpoch, Epoch, KeyedEpoch
from megahp.data.split import Documents
from megahp.errors import UserError

# Windows whose parts are interleaved, so that neighbours in the text do not share a batch; at most 1/16 of an epoch.
GROUP = 64
Order = Literal["keyed", "drawn"]


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
    """The samples of documents of one dataset, over any number of epochs.

    window: tokens that are shuffled as a unit, and the maximum length of a sample.
    order: how epochs are shuffled (megahp/data/epochs.py). cache: folder in which a drawn one is kept.
    skip: documents, by id, none of whose tokens is read.
    windows: number of them per epoch; up to `window` tokens at the end of the stream, of other documents in each epoch,
    belong to none.
    key: identifies the order: equal for equal contents, documents, seed, window and kind of order.

    Raises UserError if the documents hold too few tokens for one sample.
    """

    def __init__(
        self,
        documents: Documents,
        window: int,
        seed: int,
        cache: Path,
        vocab_size: int = 1 << 62,
        skip: Sequence[range] = (),
        order: Order = "keyed",
    ) -> None:
        self.window, self.prefix, self.tokens = window, documents.dataset.prefix, documents.tokens
        self.windows = (self.tokens - 1) // window  # one token is left for the last target of the last window
        self.group = max(1, min(GROUP, self.windows // 16))
        if self.windows < 1:
            few = f"{len(documents)} documents hold {self.tokens} tokens, fewer than the {window + 1} of one sample"
            raise UserError(f"data {self.prefix!r}: {few}; add data or lower sequence_length")
        self._dataset, self._documents, self._seed, self._cache = documents.dataset, documents, seed, cache
        self._vocab_size, self._skip = vocab_size, skip
        # Of a drawn order, names of files and keys in checkpoints hash the ids themselves.
        self._ids = hashlib.sha256(documents.ids().data).hexdigest() if order == "drawn" else ""
        self._epoch = lru_cache(maxsize=2)(self._load_epoch)  # two, since a batch may span the end of an epoch

    @property
    def key(self) -> str:
        return hashlib.sha256(self._identity.encode()).hexdigest()[:32]

    @property
    def _identity(self) -> str:
        split, part = self._documents.split, self._documents.part
        documents = self._ids or f"keyed {part} {len(split.within)}/{split.documents}"
        return f"{self._dataset.fingerprint} {documents} {self._seed} {self.window}"

    def prepare(self, numbers: Iterable[int], length: int) -> None:
        """Look up together what `sample` needs for each of these samples."""
        places = [self._place(j, length) for j in numbers]
        for number in {epoch for epoch, _ in places}:
            self._epoch(number).prepare(np.array([start for epoch, start in places if epoch == number]))

    def sample(self, j: int, length: int) -> Sample:
        """Return the first of the samples from j on (see `samples`). Raises UserError when an epoch holds none."""
        for sample in self.samples(j, length):
            return sample
        raise UserError(f"data {self.prefix!r}: every sample is left out; correct it, or shorten data.skip")

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
        number, start = self._place(j, length)
        pieces, missing = [], length + 1
        for document, first, tokens in self._epoch(number).read(start):
            stop = min(tokens, first + missing)
            if stop > first:  # empty documents do not count
                pieces.append((document, first, stop))
            missing -= stop - first
            if not missing:
                break
        return pieces

    def _place(self, j: int, length: int) -> tuple[int, int]:
        """Return in which epoch sample j is, and where it begins in the epoch's stream."""
        parts = self.window // length
        number, within = divmod(int(j), self.windows * parts)
        group, within = divmod(within, self.group * parts)
        part, place = divmod(within, min(self.group, self.windows - group * self.group))
        return number, self._epoch(number).window(group * self.group + place) * self.window + part * length

    def convert_position(self, samples: int, old_length: int, new_length: int) -> int:
        """Return the index of the next sample of `new_length` tokens after `samples` samples of `old_length` tokens.

        No token comes twice in an epoch: if the length changes, the rest of a group of windows is skipped.
        """
        if old_length == new_length:
            return samples
        number, within = divmod(samples, self.windows * (self.window // old_length))
        groups = -(-within // (self.group * (self.window // old_length)))
        return (number * self.windows + min(groups * self.group, self.windows)) * (self.window // new_length)

    def _load_epoch(self, number: int) -> Epoch:
        if not self._ids:
            return KeyedEpoch(self._documents, self.windows, f"{self._seed} {number}")
        name = hashlib.sha256(f"{self._identity} {number}".encode()).hexdigest()[:32]
        return DrawnEpoch(self._documents, self.windows, self._seed, number, self._cache / f"order-{name}.npy")
