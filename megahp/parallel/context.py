"""Context parallelism: the cp ranks share out the tokens of every sequence, and gather its keys and values.

A sequence is cut into 2 cp chunks; rank r holds the r-th from either end. Under causal attention each chunk costs more
than the one before, so two such cost as much on any rank. (Llama 3, arXiv 2407.21783, section 3.3.2, does the same.)
"""

import torch
from torch import Tensor

from megahp.parallel.collectives import gather_from
from megahp.parallel.mesh import Axis


def spans(length: int, context: Axis) -> list[slice]:
    """Where this rank's tokens lie in a sequence of this length, a multiple of 2 cp; from first to last."""
    if context.size == 1:
        return [slice(0, length)]
    chunk = length // (2 * context.size)
    first, last = context.rank * chunk, length - (context.rank + 1) * chunk
    return [slice(first, first + chunk), slice(last, last + chunk)]


def shard_sequence(x: Tensor, dim: int, context: Axis) -> Tensor:
    """This rank's tokens of x, which holds whole sequences along dim."""
    if context.size == 1:
        return x
    chunks = x.chunk(2 * context.size, dim)
    return torch.cat((chunks[context.rank], chunks[-1 - context.rank]), dim)


def gather_sequence(x: Tensor, dim: int, context: Axis) -> Tensor:
    """Whole sequences along dim, of which x holds this rank's tokens; the gradient is summed and shared out again."""
    return x if context.size == 1 else restore_order(gather_from(x, dim, context.group), dim, context.size)


def restore_order(x: Tensor, dim: int, size: int) -> Tensor:
    """The tokens of `size` ranks, which stand along dim one rank's after the other's, in the order of the sequence."""
    chunks = x.chunk(2 * size, dim)  # by turns one from the front and one, going backwards, from the end
    return torch.cat((*chunks[::2], *chunks[::-2]), dim)
