"""Batches by sample id: sample i of a run is a function of (data, seed, i) and of nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megahp.data.blend import Blend
from megahp.data.indexed import IndexedDataset
from megahp.data.samples import SampleOrder, split_documents
from megahp.errors import UserError

# Validation windows are the same in every run, whatever its seed.
VALIDATION_SEED = 0


@dataclass(frozen=True)
class Source:
    """A tokenized corpus, `prefix`.bin and `prefix`.idx, and its share of the samples."""

    prefix: str
    weight: float


@dataclass(frozen=True)
class Batch:
    """Samples, one a row.

    tokens: int64 [n, sequence_length + 1]; all but the last column are inputs, all but the first targets.
    documents: int32 [n, sequence_length], the document each input is in, from 0 on in each row; or None.
    ids: int64 [n], global sample ids (in validation, numbers of validation windows).
    """

    tokens: torch.Tensor
    documents: torch.Tensor | None
    ids: np.ndarray


class TrainingData:
    """All sources of a run, split into training and validation documents and blended by weight.

    tokens: training tokens of all sources, each counted once.
    fingerprint: changes with the data, weights, sequence length, seed or split, but not with a path.

    Raises UserError for missing or corrupt files, bad weights or fractions, sources too small for a sample; and, as
    they are read, for tokens outside the vocabulary.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        sequence_length: int,
        seed: int,
        validation_fraction: float,
        cache: Path,
        vocab_size: int = 1 << 62,
    ) -> None:
        self._vocab_size = vocab_size
        self._blend = Blend([source.weight for source in sources])
        datasets = [IndexedDataset(source.prefix) for source in sources]
        splits = [split_documents(dataset.documents, validation_fraction) for dataset in datasets]
        self._training = [
            SampleOrder(dataset, training, sequence_length, seed, cache)
            for dataset, (training, _) in zip(datasets, splits, strict=True)
        ]
        # A source whose validation documents cannot fill one window has no part in validation.
        held_out = {
            k: SampleOrder(dataset, validation, sequence_length, VALIDATION_SEED, cache)
            for k, (dataset, (_, validation)) in enumerate(zip(datasets, splits, strict=True))
            if dataset.document_tokens[validation].sum() > sequence_length
        }
        if validation_fraction > 0 and not held_out:
            raise UserError(
                f"validation_fraction {validation_fraction} leaves no source {sequence_length + 1} tokens of "
                "validation documents: raise it, split the data into more documents, or set it to 0"
            )
        self._validation = list(held_out.values())
        self._validation_blend = Blend([sources[k].weight for k in held_out]) if held_out else None
        self._sequence_length = sequence_length
        self.tokens = sum(order.tokens for order in self._training)
        total = sum(source.weight for source in sources)
        shares = [source.weight / total for source in sources]
        contents = [dataset.fingerprint for dataset in datasets]
        described = f"{contents} {shares} {sequence_length} {seed} {validation_fraction}"
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()

    def batch(self, ids: np.ndarray, documents: bool) -> Batch:
        """The training samples with these global ids (int64 [n]), on the CPU."""
        return self._checked(_gather(self._training, self._blend, ids, documents))

    def validation(self, count: int) -> Batch:
        """Up to `count` windows of the validation documents, blended by weight, the same for every seed.

        A smaller count is a prefix of a larger one as far as no source runs out; no window comes twice.
        Raises UserError when nothing is held out.
        """
        if self._validation_blend is None:
            raise UserError("validation_fraction is 0, so there is nothing to validate on: set it above 0")
        wanted = np.arange(count)
        source, j = self._validation_blend.locate(wanted)
        available = np.array([order.samples_per_epoch for order in self._validation])
        ids = wanted[j < available[source]]
        return self._checked(_gather(self._validation, self._validation_blend, ids, documents=True))

    def _checked(self, batch: Batch) -> Batch:
        """The batch, if its tokens are in the vocabulary: split over ranks, no rank would miss one that is not."""
        wrong = batch.tokens[(batch.tokens < 0) | (batch.tokens >= self._vocab_size)]
        if len(wrong):
            raise UserError(
                f"the data holds token {wrong[0].item()} and the vocabulary ends at {self._vocab_size}: name the "
                "tokenizer it was written with, or set model.vocab_size"
            )
        return batch

    def training_chunks(self, limit: int) -> Iterator[np.ndarray]:
        """The run's first samples, int64 [n, sequence_length + 1], up to `limit` tokens or one epoch."""
        samples = min(limit, self.tokens) // self._sequence_length
        step = max(1, (1 << 20) // self._sequence_length)
        for start in range(0, samples, step):
            yield self.batch(np.arange(start, min(start + step, samples)), documents=False).tokens.numpy()


class Loader:
    """Hands out batches on `device` while one background thread gathers the next."""

    def __init__(self, data: TrainingData, device: torch.device, documents: bool) -> None:
        self._data = data
        # With its index: in the background thread a bare "cuda" is the first GPU, whichever the rank has.
        self._device = torch.empty(0, device=device).device
        self._documents = documents
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megahp-loader")
        self._ahead: tuple[np.ndarray, Future[Batch]] | None = None

    def take(self, ids: np.ndarray, then: np.ndarray | None = None) -> Batch:
        """The batch of exactly these global sample ids; `then` is gathered in the background meanwhile.

        `then` is a hint: when the next call asks for other ids, what was gathered is dropped. An error of the
        background thread is raised by the call that would have used its result.
        """
        batch = self._gathered(ids)
        self._ahead = None if then is None else (then, self._thread.submit(self._gather, then))
        return self._to_device(batch)

    def close(self) -> None:
        """Stop the background thread, dropping what it prepared."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _gathered(self, ids: np.ndarray) -> Batch:
        if self._ahead is not None and np.array_equal(self._ahead[0], ids):
            return self._ahead[1].result()
        return self._gather(ids)

    def _gather(self, ids: np.ndarray) -> Batch:
        batch = self._data.batch(ids, self._documents)
        if self._device.type != "cuda":
            return batch
        with torch.cuda.device(self._device):
            documents = None if batch.documents is None else batch.documents.pin_memory()
            return replace(batch, tokens=batch.tokens.pin_memory(), documents=documents)

    def _to_device(self, batch: Batch) -> Batch:
        documents = None if batch.documents is None else batch.documents.to(self._device, non_blocking=True)
        return replace(batch, tokens=batch.tokens.to(self._device, non_blocking=True), documents=documents)


def _gather(orders: Sequence[SampleOrder], blend: Blend, ids: np.ndarray, documents: bool) -> Batch:
    length = orders[0].sequence_length
    tokens = np.empty((len(ids), length + 1), np.int64)
    places = np.empty((len(ids), length), np.int32)
    for row, (source, j) in enumerate(zip(*blend.locate(ids), strict=True)):
        tokens[row], places[row] = orders[source].sample(j)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(places) if documents else None, ids)
