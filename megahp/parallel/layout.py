"""Which ranks do what: the sizes of the parallel axes, fitted to a number of ranks. No torch here."""

import math
from dataclasses import dataclass

from megahp.config import ParallelConfig
from megahp.errors import UserError, nearest_divisors, nearest_multiples

AXES = ("pp", "dp_replicate", "dp_shard", "ep", "cp", "tp")  # outermost first: tp ranks are neighbours
FREE = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # their product is the number of ranks: ep divides dp_shard


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes; the product of all but ep is the number of ranks."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    ep: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes along AXES, whose dp_shard is what ep leaves of it."""
        return (self.pp, self.dp_replicate, self.dp_shard // self.ep, self.ep, self.cp, self.tp)

    @property
    def dp(self) -> int:
        """Data-parallel ranks: those that see different samples."""
        return self.dp_replicate * self.dp_shard


def fit(parallel: ParallelConfig, ranks: int) -> Layout:
    """The layout of `parallel` on so many ranks, its 0 axis filled. Raises UserError naming the nearest counts."""
    if ranks < 1:
        raise UserError(f"--ranks {ranks} must be at least 1")
    given = {axis: getattr(parallel, axis) for axis in FREE}
    fixed = math.prod(size or 1 for size in given.values())
    open_axes = [axis for axis, size in given.items() if size == 0]
    words = " x ".join(f"{axis} {size or '*'}" for axis, size in given.items() if size != 1) or "1"
    if open_axes:
        if ranks % fixed:
            raise UserError(
                f"parallel: the layout {words} needs a multiple of {fixed} ranks and there are {ranks}; "
                f"nearest: {nearest_multiples(fixed, ranks)}"
            )
        given[open_axes[0]] = ranks // fixed
    elif fixed != ranks:
        raise UserError(
            f"parallel: the layout {words} needs {fixed} ranks and there are {ranks}; "
            f"run it on {fixed}, or set parallel.dp_shard=0 to fill"
        )
    if given["dp_shard"] % parallel.ep:
        raise UserError(
            f"parallel.ep = {parallel.ep} does not divide the {given['dp_shard']} ranks of parallel.dp_shard; "
            f"nearest that do: {nearest_divisors(given['dp_shard'], parallel.ep)}"
        )
    return Layout(**given, ep=parallel.ep)
