"""Batches by sample id: within a phase of the data, sample i of a run is a function of (data, seed, i) alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megahp.config import Phase, phase_at
from megahp.data.blend import Blend
from megahp.data.indexed import IndexedDataset
from megahp.data.samples import SampleOrder, split_documents
from megahp.errors import UserError

if (
    TYPE_CHECKING
):  # elsewhere where it is needed: `megahp train --ranks` checks data without torch, to start ranks sooner
    import torch

VALIDATION_SEED = 0  # the same in every run, so that runs of several seeds are validated on the same windows


@dataclass(frozen=True)
class Batch:
    """Samples, one per row.

    tokens: int64 [n, sequence_length + 1]; all but the last column are inputs, all but the first targets.
    documents: int32 [n, sequence_length], index of each input's document, from 0 on in each row; or None.
    ids: int64 [n], global sample ids (in validation, indices of validation windows).
    """

    tokens: torch.Tensor
    documents: torch.Tensor | None
    ids: np.ndarray


def rank_samples(first: int, global_batch: int, micro_batch: int, rank: int, ranks: int) -> list[np.ndarray]:
    """Return the global sample ids of a data-parallel rank, int64, one array per microbatch.

    Microbatches are assigned round-robin, so that a global batch has the same samples on every layout.
    """
    return list(np.arange(first, first + global_batch).reshape(-1, ranks, micro_batch)[:, rank])


class TrainingData:
    """All sources of a run, split into training and validation documents, and blended phase by phase.

    datasets: one tokenized corpus each.
    phases: mixture (weights, one per corpus) and sample length over the run; each length divides the longest.
    Validation uses the last phase's mixture and the first one's length throughout, so that losses stay comparable.
    tokens: training tokens of all sources, each counted once.
    fingerprint: changes with the data, phases, seed or split, but not with a path.

    Within a phase sample i is a function of (data, seed, i); each source continues where the previous phase left it.

    Raises UserError for bad weights or fractions, for sources too small for a sample, and, when they are read, for
    tokens outside the vocabulary.
    """

    def __init__(
        self,
        datasets: Sequence[IndexedDataset],
        phases: Sequence[Phase],
        seed: int,
        validation_fraction: float,
        cache: Path,
        vocab_size: int = 1 << 62,
    ) -> None:
        self.datasets, self.phases, self._vocab_size = datasets, phases, vocab_size
        prefixes = self._prefixes = [dataset.prefix for dataset in datasets]
        self._blends = [Blend(phase.weights) for phase in phases]
        splits = [split_documents(dataset.documents, validation_fraction) for dataset in datasets]
        window, validation_length = max(phase.length for phase in phases), phases[0].length
        self._training = [
            SampleOrder(dataset, training, window, seed, cache)
            for dataset, (training, _) in zip(datasets, splits, strict=True)
        ]
        # Positions are saved by key, so that two sources of the same content could not be told apart.
        by_key = dict(zip((order.key for order in self._training), prefixes, strict=True))
        if duplicates := set(prefixes) - set(by_key.values()):
            raise UserError(
                f"data {min(duplicates)!r} has the same content as another prefix; name one of them, with their weight"
            )
        # A source whose validation documents cannot fill one window is not part of validation.
        held_out = {
            k: SampleOrder(dataset, validation, validation_length, VALIDATION_SEED, cache)
            for k, (dataset, (_, validation)) in enumerate(zip(datasets, splits, strict=True))
            if phases[-1].weights[k] and dataset.document_tokens[validation].sum() > validation_length
        }
        if validation_fraction > 0 and not held_out:
            tokens = max(int(each.document_tokens[ids].sum()) for each, (_, ids) in zip(datasets, splits, strict=True))
            enough = 1.1 * validation_fraction * (validation_length + 1) / max(tokens, 1)
            raised = f"raise it to about {enough:.2g}" if enough < 0.3 else "add data"
            raise UserError(
                f"data.validation_fraction = {validation_fraction:g} holds out {tokens:,} tokens of a source at most, "
                f"and one sequence is {validation_length + 1:,}: {raised}, lower data.sequence_length, split the data "
                "into more documents, or set the fraction to 0, and train.validation_samples too"
            )
        self._validation = list(held_out.values())
        self._validation_blend = Blend([phases[-1].weights[k] for k in held_out]) if held_out else None
        self.tokens = sum(order.tokens for order in self._training)
        # Only ratios of weights matter, so scaled weights have the same fingerprint.
        shares = [(phase.tokens, phase.length, [w / sum(phase.weights) for w in phase.weights]) for phase in phases]
        contents = [dataset.fingerprint for dataset in datasets]
        self.fingerprint = hashlib.sha256(f"{contents} {shares} {seed} {validation_fraction}".encode()).hexdigest()
        self.phase = self._first_sample = 0
        self._begins = {order.key: (0, phases[0].length) for order in self._training}

    def batch(self, ids: np.ndarray, documents: bool) -> Batch:
        """Return the training samples with these global ids (int64 [n]), of the current phase, on the CPU."""
        source, j = self._blends[self.phase].locate(ids - self._first_sample)
        begins = np.array([self._begins[self._training[k].key][0] for k in source], np.int64)
        return self._checked(_gather(self._training, source, begins + j, self.length, ids, documents))

    def enter_phase(self, phase: int, sample: int) -> None:
        """Switch to a phase, by its index, from this global sample id on."""
        self._begin_phase(self._consumed(sample), phase, sample)

    def state(self, sample: int) -> dict[str, Any]:
        """Return the position of every source at this global sample id, for `load_state` and `branch`."""
        return {
            "stage": self.phase,
            "first_sample": self._first_sample,
            "length": self.length,
            "begins": self._begins,
            "taken": self._consumed(sample),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the same data. Raises UserError if it has other phases or sources."""
        if state["stage"] >= len(self.phases) or state["begins"].keys() != self._begins.keys():
            raise UserError("the checkpoint's data_order has other phases or sources than data.train; use another one")
        self.phase, self._first_sample = state["stage"], state["first_sample"]
        self._begins = {key: (count, length) for key, (count, length) in state["begins"].items()}

    def branch(self, state: Mapping[str, Any], tokens: int, sample: int) -> list[str]:
        """Continue from the state of another run's data: a source that both share, in the same order, keeps its
        position.

        tokens, sample: where the new run begins. Returns the prefixes of the other sources, which start from their
        first sample.
        """
        consumed = {key: (count, length) for key, (count, length) in state["taken"].items()}
        self._begin_phase(consumed, phase_at(self.phases, tokens), sample)
        sources = zip(self._prefixes, self._training, strict=True)
        return [prefix for prefix, order in sources if order.key not in consumed]

    def validation(self, count: int) -> Batch:
        """Return up to `count` windows of the validation documents, blended by weight, the same for every seed.

        A smaller count is a prefix of a larger one as long as no source runs out; no window comes twice. Raises
        UserError if nothing is held out.
        """
        if self._validation_blend is None:
            raise UserError("validation_fraction is 0, so there is nothing to validate on; set it above 0")
        source, j, ids = self._windows(count)
        return self._checked(_gather(self._validation, source, j, self.phases[0].length, ids, documents=True))

    def validation_size(self, count: int) -> int:
        """Return the number of windows of `validation(count)`."""
        return len(self._windows(count)[2]) if self._validation_blend else 0

    def epochs(self, begin: float, end: float) -> dict[str, float]:
        """Return how many epochs of each prefix a run reads from `begin` to `end`, in tokens."""
        epochs = dict.fromkeys(self._prefixes, 0.0)
        bounds = [phase.tokens for phase in self.phases[1:]] + [math.inf]
        for phase, until in zip(self.phases, bounds, strict=True):
            span = max(0.0, min(until, end) - max(phase.tokens, begin)) / sum(phase.weights)
            for prefix, order, weight in zip(self._prefixes, self._training, phase.weights, strict=True):
                epochs[prefix] += span * weight / order.tokens
        return epochs

    @property
    def length(self) -> int:
        """Tokens per sample in the current phase."""
        return self.phases[self.phase].length

    def _windows(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return source, index within it, and id of up to `count` validation windows: those of the blend that exist."""
        assert self._validation_blend
        ids = np.arange(count)
        source, j = self._validation_blend.locate(ids)
        exists = j < np.array([order.windows for order in self._validation])[source]
        return source[exists], j[exists], ids[exists]

    def _begin_phase(self, consumed: Mapping[str, tuple[int, int]], phase: int, sample: int) -> None:
        """Begin a phase, converting the positions of its sources to its sample length.

        Sources that this run does not have keep their position in the state, for a later branch that has them again.
        """
        self.phase, self._first_sample = phase, sample
        self._begins = dict(consumed)
        for order in self._training:
            count, length = consumed.get(order.key, (0, self.length))
            self._begins[order.key] = order.convert_position(count, length, self.length), self.length

    def _consumed(self, sample: int) -> dict[str, tuple[int, int]]:
        """Return the samples consumed of every source before this global sample id, and their length."""
        counts = self._blends[self.phase].counts(sample - self._first_sample)
        return self._begins | {
            order.key: (self._begins[order.key][0] + count, self.length)
            for order, count in zip(self._training, counts, strict=True)
        }

    def _checked(self, batch: Batch) -> Batch:
        """Return the batch. Raises UserError if a token is outside the vocabulary.

        An embedding that is split over ranks would not notice: each rank takes the token for another rank's.
        """
        wrong = batch.tokens[(batch.tokens < 0) | (batch.tokens >= self._vocab_size)]
        if len(wrong):
            why = f"the data holds token {wrong[0].item()} but the vocabulary ends at {self._vocab_size}"
            raise UserError(f"{why}; name the tokenizer it was written with, or set model.vocab_size")
        return batch

    def training_chunks(self, limit: int) -> Iterator[np.ndarray]:
        """Yield samples of the current phase, int64 [n, length + 1], from its first on, up to `limit` tokens or one
        epoch."""
        samples = min(limit, self.tokens) // self.length
        step = max(1, (1 << 20) // self.length)  # chunks of about a million tokens
        for start in range(0, samples, step):
            ids = self._first_sample + np.arange(start, min(start + step, samples))
            yield self.batch(ids, documents=False).tokens.numpy()


class Loader:
    """Returns batches on `device` while a background thread gathers the next."""

    def __init__(self, data: TrainingData, device: torch.device, documents: bool) -> None:
        import torch

        self._data, self._documents = data, documents
        # A bare "cuda" means the first GPU in the background thread, whichever the rank uses: resolve the index here.
        self._device = torch.empty(0, device=device).device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megahp-loader")
        self._prefetched: tuple[np.ndarray, Future[Batch]] | None = None

    def take(self, ids: np.ndarray, then: np.ndarray | None = None) -> Batch:
        """Return the batch of exactly these global sample ids, and start to prefetch `then` in the background.

        `then` is a hint: if the next call asks for other ids, the prefetched batch is dropped. An error of the
        background thread is raised by the call that would have used its result.
        """
        if self._prefetched is not None and np.array_equal(self._prefetched[0], ids):
            batch = self._prefetched[1].result()
        else:
            batch = self._gather(ids)
        self._prefetched = None if then is None else (then, self._thread.submit(self._gather, then))
        documents = None if batch.documents is None else batch.documents.to(self._device, non_blocking=True)
        return replace(batch, tokens=batch.tokens.to(self._device, non_blocking=True), documents=documents)

    def drop_prefetched(self) -> None:
        """Drop the prefetched batch, after waiting for the thread: the data is about to change under it."""
        if self._prefetched is not None:
            self._prefetched[1].exception()  # waits, and does not raise
        self._prefetched = None

    def close(self) -> None:
        """Stop the background thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _gather(self, ids: np.ndarray) -> Batch:
        batch = self._data.batch(ids, self._documents)
        if self._device.type != "cuda":
            return batch
        import torch

        # Pinned, so that the copy to the GPU runs asynchronously; in this thread, since pinning takes time.
        with torch.cuda.device(self._device):
            documents = None if batch.documents is None else batch.documents.pin_memory()
            return replace(batch, tokens=batch.tokens.pin_memory(), documents=documents)


def _gather(
    orders: Sequence[SampleOrder], source: np.ndarray, j: np.ndarray, length: int, ids: np.ndarray, documents: bool
) -> Batch:
    """Return sample j[i] of source[i] in row i."""
    import torch

    tokens = np.empty((len(ids), length + 1), np.int64)
    indices = np.empty((len(ids), length), np.int32)
    for row, (k, number) in enumerate(zip(source, j, strict=True)):
        tokens[row], indices[row] = orders[k].sample(number, length)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(indices) if documents else None, ids)
