"""Batches by sample id: within a phase of the data, sample i of a run is a function of (data, seed, i) alone."""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megahp.config import Phase, phase_at
from megahp.data.blend import Blend
from megahp.data.indexed import IndexedDataset
from megahp.data.samples import Order, Sample, SampleOrder
from megahp.data.split import Documents, split_documents
from megahp.errors import UserError

if TYPE_CHECKING:  # elsewhere where it is needed: `megahp train --ranks` checks data without torch, to start sooner
    import torch

AT_A_TIME = 64  # samples that are looked up together, in half the time of one by one
MIXTURE = ""  # the group of ValidationSamples whose loss stands for the run's
VALIDATION_SEED = 0  # the same in every run, so that runs of several seeds are validated on the same windows


@dataclass(frozen=True)
class Batch:
    """Samples, one per row.

    tokens: int64 [n, sequence_length + 1]; all but the last column are inputs, all but the first targets.
    documents: int32 [n, sequence_length], index of each input's document, from 0 on in each row; or None.
    ids: int64 [n], global sample ids (in validation, indices of validation windows).
    wrong: for each sample in whose place another one of its source stands, since an id is outside the vocabulary,
    which id and where.
    """

    tokens: torch.Tensor
    documents: torch.Tensor | None
    ids: np.ndarray
    wrong: Sequence[str] = ()


@dataclass(frozen=True)
class ValidationSamples:
    """What a validation loss is the mean over.

    groups: bool [n], the rows of `batch` that are of a group: MIXTURE, a source or a named set.
    """

    batch: Batch
    groups: Mapping[str, np.ndarray]


def rank_samples(first: int, global_batch: int, micro_batch: int, rank: int, ranks: int) -> list[np.ndarray]:
    """Return the global sample ids of a data-parallel rank, int64, one array per microbatch, of `micro_batch` ids or,
    where that does not divide its share, nearly equal.

    Microbatches are assigned round-robin, so that a global batch has the same samples on every layout.
    """
    share, remainder = divmod(global_batch, ranks)
    assert not remainder, (global_batch, ranks)
    parts = np.array_split(np.arange(share), -(-share // micro_batch))
    return [first + ranks * part[0] + rank * len(part) + np.arange(len(part)) for part in parts]


class TrainingData:
    """All sources of a run, split into training and validation documents, and blended phase by phase.

    datasets: one tokenized corpus each.
    phases: mixture (weights, one per corpus) and sample length over the run; each length divides the longest.
    Validation uses the last phase's mixture and the first one's length throughout, so that losses stay comparable.
    skip: documents of each prefix, and under "" global sample ids, that are left out: the next sample of the source
    comes twice instead, and no other sample changes.
    sets: further corpora to validate on, by name. order: how each epoch is shuffled.
    tokens: training tokens of all sources, each counted once.
    fingerprint: changes with the data, phases, seed or split, but not with a path.

    Within a phase sample i is a function of (data, seed, skip, i); each source continues where the previous phase left
    it. Raises UserError for bad weights or fractions, and for sources too small for a sample.
    """

    def __init__(
        self,
        datasets: Sequence[IndexedDataset],
        phases: Sequence[Phase],
        seed: int,
        validation_fraction: float,
        cache: Path,
        vocab_size: int = 1 << 62,
        skip: Mapping[str, Sequence[range]] | None = None,
        sets: Mapping[str, IndexedDataset] | None = None,
        order: Order = "keyed",
    ) -> None:
        self._skip, self._seed, self._fraction, self._order = skip or {}, seed, validation_fraction, order
        self.datasets, self.phases = datasets, phases
        prefixes = self._prefixes = [dataset.prefix for dataset in datasets]
        self._blends = [Blend(phase.weights) for phase in phases]
        splits = [split_documents(dataset.documents, validation_fraction) for dataset in datasets]
        window, length = max(phase.length for phase in phases), phases[0].length

        def samples(documents: Documents, window: int, seed: int) -> SampleOrder:
            skipped = self._skip.get(documents.dataset.prefix, ())
            return SampleOrder(documents, window, seed, cache, vocab_size, skipped, order)

        sources = list(zip(datasets, splits, strict=True))
        self._training = [samples(Documents(dataset, split), window, seed) for dataset, split in sources]
        # Positions are saved by key, so that two sources of the same content could not be told apart.
        by_key = dict(zip((order.key for order in self._training), prefixes, strict=True))
        if duplicates := set(prefixes) - set(by_key.values()):
            raise UserError(
                f"data {min(duplicates)!r} has the same content as another prefix; name one of them, with their weight"
            )
        held_out = [Documents(dataset, split, "validation") for dataset, split in sources]
        self._held_out_tokens = [documents.tokens for documents in held_out]
        self._validation = {
            k: samples(documents, length, VALIDATION_SEED)
            for k, documents in enumerate(held_out)
            if phases[-1].weights[k] and documents.tokens > length
        }
        self._held_out = [self._validation[k].windows if k in self._validation else 0 for k in range(len(datasets))]
        if validation_fraction > 0 and not self._validation:
            tokens = max(self._held_out_tokens)
            raise UserError(
                f"data.validation_fraction = {validation_fraction:g} holds out {tokens:,} tokens of a source at most, "
                f"and one sequence is {length + 1:,}: {self._larger_fraction(tokens, length + 1)}, lower "
                "data.sequence_length, split the data into more documents, or set the fraction to 0, and "
                "train.validation_samples too"
            )
        trained = {dataset.fingerprint for dataset in datasets}
        for name, dataset in (sets or {}).items():
            if dataset.fingerprint in trained:
                raise UserError(f"data.validation: {name} ({dataset.prefix}) is trained on; hold out other data")
        self._sets = {
            name: samples(Documents(dataset, split_documents(dataset.documents, 0)), length, VALIDATION_SEED)
            for name, dataset in (sets or {}).items()
        }
        self.tokens = sum(order.tokens for order in self._training)
        self.phase = self._first_sample = 0
        self._begins = {order.key: (0, phases[0].length) for order in self._training}

    @property
    def fingerprint(self) -> str:
        """Return a hash of all that decides which sample is which, but for what is skipped."""
        # Only ratios of weights matter, so scaled weights have the same fingerprint.
        shares = [
            (phase.tokens, phase.length, [w / sum(phase.weights) for w in phase.weights]) for phase in self.phases
        ]
        contents = [dataset.fingerprint for dataset in self.datasets]
        kind = "" if self._order == "drawn" else f" {self._order}"
        return hashlib.sha256(f"{contents} {shares} {self._seed} {self._fraction}{kind}".encode()).hexdigest()

    def identities(self) -> list[dict[str, str]]:
        """Return what the sources are recognized by, in their order, for `recognize`."""
        return [asdict(replace(each.identity, fingerprint=each.fingerprint)) for each in self.datasets]

    def recognize(self, saved: Sequence[Mapping[str, str]]) -> list[str]:
        """Give sources whose tokens have changed since their identities were saved the fingerprints that they had, so
        that positions and orders are found, before a state is loaded. Returns their prefixes."""
        changed = []
        for dataset in self.datasets:
            before = max(saved, key=dataset.identity.likeness, default=None)
            if before and dataset.identity.likeness(before) and before["fingerprint"] != dataset.fingerprint:
                dataset.fingerprint = before["fingerprint"]
                changed.append(dataset.prefix)
        return changed

    def batch(self, ids: np.ndarray, documents: bool) -> Batch:
        """Return the training samples with these global ids (int64 [n]), of the current phase, on the CPU."""
        source, j = self._blends[self.phase].locate(ids - self._first_sample)
        for row, i in enumerate(ids.tolist()):
            if any(i in part for part in self._skip.get("", ())):
                j[row] = self._next_number(i, source[row])
        j += np.array([self._begins[order.key][0] for order in self._training])[source]
        samples: list[Sample] = []
        for start in range(0, len(ids), AT_A_TIME):
            rows = slice(start, start + AT_A_TIME)
            for k in np.unique(source[rows]).tolist():
                self._training[k].prepare(j[rows][source[rows] == k].tolist(), self.length)
            numbers = zip(source[rows].tolist(), j[rows].tolist(), strict=True)
            samples += [self._training[k].sample(number, self.length) for k, number in numbers]
        return _stack(samples, ids, documents)

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
        # those of a branch also hold what only the run before it had
        if state["stage"] >= len(self.phases) or not state["begins"].keys() >= {each.key for each in self._training}:
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
        return [order.prefix for order in self._training if order.key not in consumed]

    def validation(self, count: int) -> ValidationSamples:
        """Return `count` windows of the validation documents, of each source as many as its weight says, and `count` of
        each named set; the same for every training seed.

        A smaller count is a prefix of a larger one; no window comes twice. The groups are the mixture, each of its
        sources if there are several, and each set; without documents held out, the mixture is all sets together.
        Windows that are skipped, or hold an id outside the vocabulary, are passed over. Raises UserError for a source
        or set that has fewer.
        """
        rows = self._validation_rows(count)
        names = np.array([name for name, _ in rows])
        groups = {name: names == name for name in (*self._prefixes, *self._sets) if name in names}
        main = ~np.isin(names, list(self._sets)) if self._validation else np.ones(len(rows), bool)
        batch = _stack([sample for _, sample in rows], np.arange(len(rows)), documents=True)
        return ValidationSamples(batch, {MIXTURE: main, **groups} if len(groups) > 1 else {MIXTURE: main})

    def wrong_in_validation(self, count: int) -> list[str]:
        """Return the `wrong` of what `validation` returns, without torch."""
        return _wrong([sample for _, sample in self._validation_rows(count)], itertools.count())

    def _validation_rows(self, count: int) -> list[tuple[str, Sample]]:
        """Return the windows to validate on, each with the name of its source or set."""
        if not self._validation and not self._sets:
            raise UserError("validation_fraction is 0, so there is nothing to validate on; set it above 0")
        rows: list[tuple[str, Sample]] = []
        if self.validation_quotas(count):
            source, j = Blend(self.phases[-1].weights).locate(np.arange(count))
            windows = {k: self._windows(self._validation[k], source.tolist().count(k)) for k in set(source.tolist())}
            rows += [(self._prefixes[k], windows[k][number]) for k, number in zip(source, j, strict=True)]
        for name, order in self._sets.items():
            rows += [(name, sample) for sample in self._windows(order, count, f" (data.validation: {name})")]
        return rows

    def most_validation_samples(self, count: int) -> int:
        """Return the largest number, up to `count`, of validation samples that there are by the mixture's weights, and
        in each named set."""
        blend = Blend(self.phases[-1].weights)
        sets = min([count, *(order.windows for order in self._sets.values())])
        held_out = self._held_out if self._validation else [count] * len(self._held_out)
        return bisect(range(1, sets + 1), 0, key=lambda n: any(map(operator.gt, blend.counts(n), held_out)))

    def validation_quotas(self, count: int) -> dict[str, int]:
        """Return how many of `count` held-out windows are of each source; {} if nothing is held out. Raises UserError
        where a source has fewer."""
        if not self._validation:
            return {}
        quotas, held_out = Blend(self.phases[-1].weights).counts(count), self._held_out
        lacking = [(quota / max(have, 0.5), k) for k, (quota, have) in enumerate(zip(quotas, held_out, strict=True))]
        ratio, k = max(lacking)
        if ratio > 1:
            fits = self.most_validation_samples(count)
            fewer = f"set it to {fits}, or " if fits else ""
            needed = (quotas[k] + 1) * self.phases[0].length
            raise UserError(
                f"train.validation_samples = {count} takes {quotas[k]} sequences of {self._prefixes[k]!r} by its weight"
                f", and data.validation_fraction = {self._fraction:g} holds out only {held_out[k]}; {fewer}"
                f"{self._larger_fraction(self._held_out_tokens[k], needed)}"
            )
        return dict(zip(self._prefixes, quotas, strict=True))

    def epochs(self, begin: float, end: float) -> dict[str, float]:
        """Return how many epochs of each prefix a run reads from `begin` to `end`, in tokens."""
        epochs = dict.fromkeys(self._prefixes, 0.0)
        bounds = [phase.tokens for phase in self.phases[1:]] + [math.inf]
        for phase, until in zip(self.phases, bounds, strict=True):
            span = max(0.0, min(until, end) - max(phase.tokens, begin)) / sum(phase.weights)
            for order, weight in zip(self._training, phase.weights, strict=True):
                epochs[order.prefix] += span * weight / order.tokens
        return epochs

    def epochs_read(self, sample: int) -> dict[str, float]:
        """Return how many epochs of each prefix were read before this global sample id."""
        taken = self._consumed(sample)
        return {order.prefix: math.prod(taken[order.key]) / order.tokens for order in self._training}

    @property
    def length(self) -> int:
        """Tokens per sample in the current phase."""
        return self.phases[self.phase].length

    def _next_number(self, i: int, source: int) -> int:
        """Return the index in this source of its first sample from i on that data.skip does not name."""
        while True:
            if part := next((part for part in self._skip[""] if i in part), None):
                i = part.stop
            (k,), (number,) = self._blends[self.phase].locate(np.array([i - self._first_sample]))
            if k == source and not any(i in part for part in self._skip[""]):
                return int(number)
            i += 1

    def _windows(self, order: SampleOrder, count: int, of: str = "") -> list[Sample]:
        """Return the first `count` windows of an order of validation documents. Raises UserError if it has fewer."""
        windows = list(itertools.islice(order.samples(0, order.window, order.windows), count))
        if len(windows) < count:
            raise UserError(
                f"train.validation_samples = {count}, but data {order.prefix!r}{of} has {len(windows)} sequences of "
                f"{order.window} tokens to validate on; set it to at most {len(windows)}, or add data"
            )
        return windows

    def _larger_fraction(self, tokens: int, needed: int) -> str:
        """Return the remedy where data.validation_fraction holds out fewer tokens than needed."""
        enough = 1.1 * self._fraction * needed / max(tokens, 1)
        return f"raise it to about {enough:.2g}" if enough < 0.3 else "add data"

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


def _stack(samples: Sequence[Sample], ids: np.ndarray, documents: bool) -> Batch:
    """Return the batch of these samples, one per row."""
    import torch

    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    indices = torch.from_numpy(np.stack([sample.documents for sample in samples])) if documents else None
    return Batch(tokens, indices, ids, _wrong(samples, ids))


def _wrong(samples: Sequence[Sample], ids: Iterable[int]) -> list[str]:
    """Return for each sample in whose place another stands which id is outside the vocabulary, and where."""
    return [f"sample {i}: {sample.wrong[0]}" for i, sample in zip(ids, samples, strict=False) if sample.wrong]
