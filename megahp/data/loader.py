"""Batches by sample id: within a stage of the data, sample i of a run is a function of (data, seed, i) alone."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megahp.config import Phase, phase_at
from megahp.data.blend import Blend
from megahp.data.indexed import IndexedDataset
from megahp.data.samples import SampleOrder, split_documents
from megahp.errors import UserError

# Validation windows are the same in every run, whatever its seed.
VALIDATION_SEED = 0


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


def rank_samples(first: int, global_batch: int, micro_batch: int, rank: int, ranks: int) -> list[np.ndarray]:
    """Return the global sample ids of one of the data-parallel ranks, int64, one array a microbatch.

    The ranks take microbatches in turn, so that a global batch has the same samples on every layout.
    """
    return list(np.arange(first, first + global_batch).reshape(-1, ranks, micro_batch)[:, rank])


class TrainingData:
    """All sources of a run, split into training and validation documents, and dealt stage by stage.

    datasets: one tokenized corpus each.
    stages: mixture (weights, one a corpus; 0 = not now) and sample length along the run; each length divides the
    longest. Validation is dealt by the last stage's mixture at the first one's length, in every stage alike.
    tokens: training tokens of all sources, each counted once.
    fingerprint: changes with the data, stages, seed or split, but not with a path.

    Within a stage sample i is a function of (data, seed, i); each source goes on where the stage before left it.

    Raises UserError for bad weights or fractions, sources too small for a sample; and, as
    they are read, for tokens outside the vocabulary.
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
        prefixes = self._prefixes = [dataset.prefix for dataset in datasets]
        self.phases, self._vocab_size = phases, vocab_size
        self._blends = [Blend(phase.weights) for phase in phases]
        splits = [split_documents(dataset.documents, validation_fraction) for dataset in datasets]
        window, validation_length = max(phase.length for phase in phases), phases[0].length
        self._training = [
            SampleOrder(dataset, training, window, seed, cache)
            for dataset, (training, _) in zip(datasets, splits, strict=True)
        ]
        by_key = dict(zip((order.key for order in self._training), prefixes, strict=True))
        if doubles := set(prefixes) - set(by_key.values()):
            double = min(doubles)
            raise UserError(f"data {double!r} holds the same as another prefix; name one of them, with their weight")
        # A source whose validation documents cannot fill one window has no part in validation.
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
        shares = [(each.tokens, each.length, [one / sum(each.weights) for one in each.weights]) for each in phases]
        contents = [dataset.fingerprint for dataset in datasets]
        self.fingerprint = hashlib.sha256(f"{contents} {shares} {seed} {validation_fraction}".encode()).hexdigest()
        self.phase = self._first_sample = 0
        self._begins = {order.key: (0, phases[0].length) for order in self._training}

    def batch(self, ids: np.ndarray, documents: bool) -> Batch:
        """The training samples with these global ids (int64 [n]), of the present stage, on the CPU."""
        source, j = self._blends[self.phase].locate(ids - self._first_sample)
        begins = np.array([self._begins[self._training[k].key][0] for k in source], np.int64)
        return self._checked(_gather(self._training, source, begins + j, self.length, ids, documents))

    def enter(self, phase: int, sample: int) -> None:
        """Deal by another stage from this global sample id on."""
        self._begin_phase(self._taken(sample), phase, sample)

    def state(self, sample: int) -> dict[str, Any]:
        """Where every source stands at this global sample id, for `restore` and `branch`."""
        return {
            "stage": self.phase,
            "first_sample": self._first_sample,
            "length": self.length,
            "begins": self._begins,
            "taken": self._taken(sample),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue as the data did that made this state. Raises UserError where it is another's."""
        if state["stage"] >= len(self.phases) or state["begins"].keys() != self._begins.keys():
            raise UserError("a checkpoint's data_order names other stages or sources than data.train; use another one")
        self.phase, self._first_sample = state["stage"], state["first_sample"]
        self._begins = {key: (count, length) for key, (count, length) in state["begins"].items()}

    def branch(self, state: Mapping[str, Any], tokens: int, sample: int) -> list[str]:
        """Go on from other data's state: a source that both share, in the same order, where it stands. Returns the
        sources that begin at their beginning."""
        taken = {key: (count, length) for key, (count, length) in state["taken"].items()}
        self._begin_phase(taken, phase_at(self.phases, tokens), sample)
        return [prefix for prefix, order in zip(self._prefixes, self._training, strict=True) if order.key not in taken]

    def validation(self, count: int) -> Batch:
        """Up to `count` windows of the validation documents, blended by weight, the same for every seed.

        A smaller count is a prefix of a larger one as far as no source runs out; no window comes twice.
        Raises UserError when nothing is held out.
        """
        if self._validation_blend is None:
            raise UserError("validation_fraction is 0, so there is nothing to validate on: set it above 0")
        source, j, numbers = self._windows(count)
        places = source, j, self.phases[0].length, numbers
        return self._checked(_gather(self._validation, *places, documents=True))

    def held_out(self, count: int) -> int:
        """How many windows `validation(count)` has."""
        return len(self._windows(count)[2]) if self._validation_blend else 0

    def epochs(self, begin: float, end: float) -> dict[str, float]:
        """How often the training tokens of each prefix are read between so many and so many tokens of a run."""
        found = dict.fromkeys(self._prefixes, 0.0)
        bounds = [phase.tokens for phase in self.phases[1:]] + [math.inf]
        for phase, until in zip(self.phases, bounds, strict=True):
            span = max(0.0, min(until, end) - max(phase.tokens, begin)) / sum(phase.weights)
            for prefix, order, weight in zip(self._prefixes, self._training, phase.weights, strict=True):
                found[prefix] += span * weight / order.tokens
        return found

    @property
    def length(self) -> int:
        return self.phases[self.phase].length

    def _windows(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, place in it, and number of each of up to `count` validation windows."""
        assert self._validation_blend
        source, j = self._validation_blend.locate(np.arange(count))
        there = j < np.array([order.windows for order in self._validation])[source]
        return source[there], j[there], np.arange(count)[there]

    def _begin_phase(self, taken: Mapping[str, tuple[int, int]], phase: int, sample: int) -> None:
        """Begin a stage. Sources it does not know keep their place, for a later one that does."""
        self.phase, self._first_sample = phase, sample
        here = {
            order.key: (order.load_state(*taken.get(order.key, (0, self.length)), self.length), self.length)
            for order in self._training
        }
        self._begins = {**taken, **here}

    def _taken(self, sample: int) -> dict[str, tuple[int, int]]:
        """Samples taken of every source before this global sample id, and their length."""
        counts = self._blends[self.phase].counts(sample - self._first_sample)
        return self._begins | {
            order.key: (self._begins[order.key][0] + count, self.length)
            for order, count in zip(self._training, counts, strict=True)
        }

    def _checked(self, batch: Batch) -> Batch:
        """The batch, if its tokens are in the vocabulary: split over ranks, no rank would miss one that is not."""
        wrong = batch.tokens[(batch.tokens < 0) | (batch.tokens >= self._vocab_size)]
        if len(wrong):
            why = f"the data holds token {wrong[0].item()} and the vocabulary ends at {self._vocab_size}"
            raise UserError(f"{why}: name the tokenizer it was written with, or set model.vocab_size")
        return batch

    def training_chunks(self, limit: int) -> Iterator[np.ndarray]:
        """Samples of the present stage, int64 [n, length + 1], from its first on, up to `limit` tokens or one epoch."""
        samples = min(limit, self.tokens) // self.length
        step = max(1, (1 << 20) // self.length)
        for start in range(0, samples, step):
            ids = self._first_sample + np.arange(start, min(start + step, samples))
            yield self.batch(ids, documents=False).tokens.numpy()


class Loader:
    """Hands out batches on `device` while one background thread gathers the next."""

    def __init__(self, data: TrainingData, device: torch.device, documents: bool) -> None:
        self._data, self._documents = data, documents
        # With its index: in the background thread a bare "cuda" is the first GPU, whichever the rank has.
        self._device = torch.empty(0, device=device).device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megahp-loader")
        self._ahead: tuple[np.ndarray, Future[Batch]] | None = None

    def take(self, ids: np.ndarray, then: np.ndarray | None = None) -> Batch:
        """The batch of exactly these global sample ids; `then` is gathered in the background meanwhile.

        `then` is a hint: when the next call asks for other ids, what was gathered is dropped. An error of the
        background thread is raised by the call that would have used its result.
        """
        batch = self._ahead[1].result() if self._ahead and np.array_equal(self._ahead[0], ids) else self._gather(ids)
        self._ahead = None if then is None else (then, self._thread.submit(self._gather, then))
        documents = None if batch.documents is None else batch.documents.to(self._device, non_blocking=True)
        return replace(batch, tokens=batch.tokens.to(self._device, non_blocking=True), documents=documents)

    def forget(self) -> None:
        """Drop what was gathered ahead, once it is: the data is about to become another."""
        if self._ahead is not None:
            self._ahead[1].exception()
        self._ahead = None

    def close(self) -> None:
        """Stop the background thread, dropping what it prepared."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _gather(self, ids: np.ndarray) -> Batch:
        batch = self._data.batch(ids, self._documents)
        if self._device.type != "cuda":
            return batch
        with torch.cuda.device(self._device):
            documents = None if batch.documents is None else batch.documents.pin_memory()
            return replace(batch, tokens=batch.tokens.pin_memory(), documents=documents)


def _gather(
    orders: Sequence[SampleOrder], source: np.ndarray, j: np.ndarray, length: int, ids: np.ndarray, documents: bool
) -> Batch:
    tokens = np.empty((len(ids), length + 1), np.int64)
    places = np.empty((len(ids), length), np.int32)
    for row, (order, number) in enumerate(zip(source, j, strict=True)):
        tokens[row], places[row] = orders[order].sample(number, length)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(places) if documents else None, ids)
