"""The batch sizes that a layout can run, in sequences."""

import math

from megahp.config import Config, stages


def micro_batch(settings: Config, length: int) -> int:
    """Return how many sequences of this length one forward pass of one rank has: as many tokens as at the run's first
    length."""
    return max(1, settings.batch.micro_batch * settings.data.sequence_length // length)


def unit(settings: Config, dp: int) -> int:
    """Return what a global batch is a multiple of, in sequences of the run's first length.

    So many tokens are a whole number of microbatches on every data-parallel rank in every stage of the data, and of
    rounds of one for each pipeline rank where the schedule goes in rounds.
    """
    rounds = 1 if settings.parallel.schedule == "1f1b" else settings.parallel.pp
    return math.lcm(*(rounds * tokens for tokens in _microbatches(settings, dp))) // settings.data.sequence_length


def least_batch(settings: Config, dp: int) -> int:
    """Return the smallest global batch, in sequences of the run's first length: a microbatch a pipeline rank."""
    tokens, multiple = settings.parallel.pp * max(_microbatches(settings, dp)), unit(settings, dp)
    return -(-tokens // (multiple * settings.data.sequence_length)) * multiple


def runnable(global_batch: int, unit: int, least: int = 0) -> tuple[int, ...]:
    """Return the multiples of the unit, not below the least, nearest to the wanted batch, ascending: one, if it is
    itself one, or two."""
    below = global_batch // unit * unit
    if below < least or not below:
        return (least or unit,)
    return (below,) if below == global_batch else (below, below + unit)


def _microbatches(settings: Config, dp: int) -> list[int]:
    """Return the tokens of one microbatch of all data-parallel ranks, in each stage of the data."""
    return [dp * micro_batch(settings, stage.length) * stage.length for stage in stages(settings.data)]
