"""The validation loss, and the loss of n-gram models on the same samples."""

import numpy as np
import torch
import torch.distributed as dist

from megahp.config import Config
from megahp.data.loader import MIXTURE, Batch, TrainingData
from megahp.data.ngrams import unigram_and_bigram
from megahp.scaling.batch import micro_batch
from megahp.train.trainer import Trainer

BASELINE_TOKENS = 50_000_000  # the n-gram models of the report are fitted on at most this many training tokens


def validate(run: Trainer, data: TrainingData) -> dict[str, float]:
    """Return the mean loss of each group of validation samples, nats per token, equal on all ranks. Empty if
    there are none."""
    if run.config.train.validation_samples == 0:
        return {}
    found = data.validation(run.config.train.validation_samples)
    samples, groups = found.batch, torch.from_numpy(np.stack(list(found.groups.values()), axis=1))
    count, dp, size = len(samples.tokens), run.mesh.layout.dp, run.config.batch.micro_batch
    if not isinstance(size, int):
        size = micro_batch(run.config, run.config.data.sequence_length, -(-count // dp))
    device = run.mesh.device
    with_documents = samples.documents is not None and run.config.data.mask_documents
    totals = torch.zeros(len(found.groups), dtype=torch.float64, device=device)
    for first in range(run.mesh.data_rank * size, -(-count // (dp * size)) * dp * size, dp * size):
        # FSDP2 needs as many forward passes on every rank: where samples run out the last is repeated, uncounted
        index = np.arange(first, first + size)
        rows = index.clip(max=count - 1)
        documents = samples.documents[rows].to(device) if with_documents else None  # type: ignore[index]
        batch = Batch(samples.tokens[rows].to(device), documents, samples.ids[rows])
        totals += run.engine.evaluate(batch, groups[rows] & torch.from_numpy(index < count)[:, None])
    run.engine.reshard()  # no backward pass comes to do it
    if not run.mesh.is_rank0(("tp",)):
        totals.zero_()  # all tp ranks have computed the same losses
    dist.all_reduce(totals)
    means = totals.cpu() / groups.sum(0) / run.config.data.sequence_length
    return dict(zip(found.groups, means.tolist(), strict=True))


def baselines(config: Config, data: TrainingData) -> tuple[float, float]:
    """Return the loss of a unigram and a bigram model of the training tokens on the validation samples, nats per
    token."""
    samples = data.validation(config.train.validation_samples)
    tokens = samples.batch.tokens[samples.groups[MIXTURE]]
    return unigram_and_bigram(data.training_chunks(BASELINE_TOKENS), tokens, config.model.vocab_size)
