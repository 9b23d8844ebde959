"""The global batches that a layout can run, in sequences."""

import math
import sys

from megahp.config import AUTO, Config, phases_of


def largest_micro_batch(config: Config, length: int) -> int:
    """Return the most sequences of this length in one forward pass of one rank: as many tokens as at the first length.
    Unlimited where that is still to be decided (batch.micro_batch = "auto", before the run's start)."""
    fixed, largest = config.batch.micro_batch, config.batch.largest_micro_batch
    sequences = fixed if isinstance(fixed, int) else largest or sys.maxsize
    return max(1, sequences * config.data.sequence_length // length)


def micro_batch(config: Config, length: int, share: int) -> int:
    """Return the sequences in the largest of the passes, as few and as equal as can be, that a rank's share of the
    global batch is divided into. A fixed batch.micro_batch divides every share."""
    count = -(-share // largest_micro_batch(config, length))
    return -(-share // count)


def batch_multiple(config: Config, dp: int) -> int:
    """Return what every global batch is a multiple of, in sequences of the run's first length.

    In each phase of the data that many tokens are a whole number of microbatches (with "auto", of sequences) on every
    data-parallel rank, and of rounds of one microbatch for each pipeline rank, where the schedule goes in rounds (all
    but 1f1b).
    """
    rounds = 1 if config.parallel.schedule == "1f1b" else config.parallel.pp
    return math.lcm(*(rounds * tokens for tokens in _microbatches(config, dp))) // config.data.sequence_length


def least_batch(config: Config, dp: int) -> int:
    """Return the smallest global batch, in sequences of the run's first length: a microbatch for each pipeline rank,
    without which PyTorch's schedules do not run."""
    tokens, multiple = config.parallel.pp * max(_microbatches(config, dp)), batch_multiple(config, dp)
    return -(-tokens // (multiple * config.data.sequence_length)) * multiple


def runnable(global_batch: int, multiple: int, least: int = 0) -> tuple[int, ...]:
    """Return the one or two multiples nearest to a batch, ascending and not below the least."""
    below = global_batch // multiple * multiple
    if below < least or not below:
        return (least or multiple,)
    return (below,) if below == global_batch else (below, below + multiple)


def _microbatches(config: Config, dp: int) -> list[int]:
    """Return the tokens that a batch grows by in each phase of the data: on every data-parallel rank a microbatch, or a
    sequence where microbatches follow the batch."""
    lengths = [phase.length for phase in phases_of(config.data)]
    is_auto = config.batch.micro_batch == AUTO
    return [dp * length * (1 if is_auto else largest_micro_batch(config, length)) for length in lengths]
