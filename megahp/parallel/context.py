"""Context parallelism: every sequence is sharded over the cp ranks, which gather its keys and values.

A sequence is split into 2 cp chunks; rank r holds the r-th from either end. Under causal attention a chunk costs more
than the one before it, and the two costs add up to the same on every rank. (Llama 3, arXiv 2407.21783, section 3.3.2.)
"""

import torch
from torch import Tensor

from megahp.parallel.collectives import gather_from
from megahp.parallel.mesh import Axis


def spans(length: int, context: Axis) -> list[slice]:
    """Return the spans of this rank's tokens in a sequence, first to last. length: a multiple of 2 cp."""
    if context.size == 1:
        return [slice(0, length)]
    chunk = length // (2 * context.size)
    first, last = context.rank * chunk, length - (context.rank + 1) * chunk
    return [slice(first, first + chunk), slice(last, last + chunk)]


def shard_sequence(x: Tensor, dim: int, context: Axis) -> Tensor:
    """Return this rank's tokens of x, which holds whole sequences along dim."""
    if context.size == 1:
        return x
    chunks = x.chunk(2 * context.size, dim)
    return torch.cat((chunks[context.rank], chunks[-1 - context.rank]), dim)


def gather_sequence(x: Tensor, dim: int, context: Axis) -> Tensor:
    """Return whole sequences along dim from the ranks' tokens x; the gradient is summed and sharded again."""
    return x if context.size == 1 else restore_order(gather_from(x, dim, context.group), dim, context.size)


def restore_order(x: Tensor, dim: int, size: int) -> Tensor:
    """Reorder the tokens of `size` ranks, concatenated along dim rank by rank, into the order of the sequence."""
    # even chunks ascend from the front of the sequence; odd ones descend from its end
    chunks = x.chunk(2 * size, dim)
    return torch.cat((*chunks[::2], *chunks[::-2]), dim)
