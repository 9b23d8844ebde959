"""Drawing weights and masks from (seed, name, block of rows): the same bits on every layout and device."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn

from megahp.parallel.parameters import extent, parameters, probes, rows, storage
from megahp.scaling.parameterization import Table

# A rank draws every block of which it holds a part, so a small number wastes less; each costs a hash and a generator.
ROWS_PER_DRAW = 256


@torch.no_grad()
def initialise(model: nn.Module, table: Table, init_std: float, seed: int) -> None:
    """Draw every parameter in place. Biases and gains get their constants; probes and buffers start at 0."""
    by_name = rows(model)
    for name, weight in parameters(model):
        row, part = by_name[name], storage(weight)
        if row.start is not None:
            part.fill_(row.start)
        else:
            drawn = _draw(name, weight.shape, *extent(weight), seed, "standard_normal")
            scale = table.rule(row.role, row.density).init_std * (table.branch_init if row.ends_branch else 1.0)
            part.copy_(drawn * (init_std * scale))
    for zero in (*probes(model).values(), *model.buffers()):
        zero.zero_()


def draw_mask(name: str, weight: Tensor, density: float, seed: int) -> Tensor:
    """Return this rank's part of a bool mask sharded like the weight, each entry true with probability `density`."""
    if density == 1:
        return torch.ones_like(storage(weight), dtype=torch.bool)
    uniform = _draw(f"{name}.mask", weight.shape, *extent(weight), seed, "random")
    return (uniform < density).to(weight.device)


def _draw(
    name: str, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], seed: int, distribution: str
) -> Tensor:
    """Return a window of the tensor of this name, fp32 on the CPU, drawing only the blocks of rows it touches.

    distribution: a method of numpy's generators: standard_normal, or random (uniform in [0, 1)).
    """
    if 0 in sizes:
        return torch.empty(*sizes)
    if len(shape) > 2:  # a stack of matrices, such as experts: each has a name of its own, whatever ep deals it to
        numbers = range(offsets[0], offsets[0] + sizes[0])
        windows = [_draw(f"{name}.{n}", shape[1:], offsets[1:], sizes[1:], seed, distribution) for n in numbers]
        return torch.stack(windows)
    start, stop = offsets[0], offsets[0] + sizes[0]
    first, last = start // ROWS_PER_DRAW, -(-stop // ROWS_PER_DRAW)

    def draw_block(block: int) -> np.ndarray:
        key = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        count = min(ROWS_PER_DRAW, shape[0] - block * ROWS_PER_DRAW)
        return getattr(generator, distribution)((count, *shape[1:]), dtype=np.float32)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # numpy draws without holding the GIL
        blocks = list(pool.map(draw_block, range(first, last)))
    begins = (start - first * ROWS_PER_DRAW, *offsets[1:])
    window = tuple(slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=True))
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(blocks)[window]))
