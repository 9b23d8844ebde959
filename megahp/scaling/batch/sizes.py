"""The global batches that a layout can run, in sequences."""

import math

from megahp.config import Config, phases_of


def micro_batch(config: Config, length: int) -> int:
    """Return the sequences of this length in one forward pass of one rank: as many tokens as at the first length."""
    return max(1, config.batch.micro_batch * config.data.sequence_length // length)


def batch_multiple(config: Config, dp: int) -> int:
    """Return what every global batch is a multiple of, in sequences of the run's first length.

    In each phase of the data that many tokens are a whole number of microbatches on every data-parallel rank, and of
    rounds of one microbatch for each pipeline rank, where the schedule goes in rounds (all but 1f1b).
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
    """Return the tokens of one microbatch of all data-parallel ranks in each phase of the data."""
    return [dp * micro_batch(config, phase.length) * phase.length for phase in phases_of(config.data)]
