"""The validation loss, and what the simplest models lose on the same samples."""

import numpy as np
import torch
import torch.distributed as dist

from megahp.config import Config
from megahp.data.loader import Batch, TrainingData
from megahp.data.ngrams import unigram_and_bigram
from megahp.train.trainer import Trainer

BASELINE_TOKENS = 50_000_000  # the n-gram models of the report are fitted on at most so many training tokens


def validate(run: Trainer, data: TrainingData) -> float | None:
    """Mean loss over the validation samples, in nats per token, equal on all ranks; None where there are none."""
    if run.config.train.validation_samples == 0:
        return None
    samples = data.validation(run.config.train.validation_samples)
    count, dp, size = len(samples.tokens), run.mesh.layout.dp, run.config.batch.micro_batch
    total = torch.zeros((), dtype=torch.float64, device=run.mesh.device)
    for first in range(run.mesh.data_rank * size, -(-count // (dp * size)) * dp * size, dp * size):
        # FSDP2 needs as many forward passes on every rank: where samples run out the last is repeated, for nothing
        index = np.arange(first, first + size)
        total += run.engine.evaluate(_rows(samples, index.clip(max=count - 1), run), torch.from_numpy(index < count))
    run.engine.reshard()
    if not run.mesh.is_rank0(("tp",)):
        total.zero_()
    dist.all_reduce(total)
    return total.item() / (count * run.config.data.sequence_length)


def _rows(samples: Batch, index: np.ndarray, run: Trainer) -> Batch:
    device = run.mesh.device
    masked = samples.documents is not None and run.config.data.mask_documents
    documents = samples.documents[index].to(device) if masked else None  # type: ignore[index]
    return Batch(samples.tokens[index].to(device), documents, samples.ids[index])


def baselines(config: Config, data: TrainingData) -> tuple[float, float]:
    """What a unigram and a bigram model of the training tokens lose on the validation samples, nats per token."""
    samples = data.validation(config.train.validation_samples)
    return unigram_and_bigram(data.training_chunks(BASELINE_TOKENS), samples.tokens, config.model.vocab_size)
