"""The batch sizes that a layout can run, in sequences."""

import math

from megahp.config import Config, phases_of


def micro_batch(config: Config, length: int) -> int:
    """Return how many sequences of this length one forward pass of one rank has: as many tokens as at the run's first
    length."""
    return max(1, config.batch.micro_batch * config.data.sequence_length // length)


def batch_multiple(config: Config, dp: int) -> int:
    """Return what a global batch is a multiple of, in sequences of the run's first length.

    So many tokens are a whole number of microbatches on every data-parallel rank in every stage of the data, and of
    rounds of one for each pipeline rank where the schedule goes in rounds.
    """
    rounds = 1 if config.parallel.schedule == "1f1b" else config.parallel.pp
    return math.lcm(*(rounds * tokens for tokens in _microbatches(config, dp))) // config.data.sequence_length


def least_batch(config: Config, dp: int) -> int:
    """Return the smallest global batch, in sequences of the run's first length: a microbatch a pipeline rank."""
    tokens, multiple = config.parallel.pp * max(_microbatches(config, dp)), batch_multiple(config, dp)
    return -(-tokens // (multiple * config.data.sequence_length)) * multiple


def runnable(global_batch: int, unit: int, least: int = 0) -> tuple[int, ...]:
    """Return the multiples of the unit, not below the least, nearest to the wanted batch, ascending: one, if it is
    itself one, or two."""
    below = global_batch // unit * unit
    if below < least or not below:
        return (least or unit,)
    return (below,) if below == global_batch else (below, below + unit)


def _microbatches(config: Config, dp: int) -> list[int]:
    """Return the tokens of one microbatch of all data-parallel ranks, in each stage of the data."""
    return [dp * micro_batch(config, phase.length) * phase.length for phase in phases_of(config.data)]
