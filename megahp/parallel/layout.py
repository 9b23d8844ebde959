"""The sizes of the parallel axes, fitted to a number of ranks. Imports no torch: the launcher needs it early."""

import math
from dataclasses import dataclass

from megahp.config import ParallelConfig
from megahp.errors import UserError, nearest_divisors, nearest_multiples

# Outermost first: the ranks of tp, which communicate most, are neighbours, and so share a machine.
AXES = ("pp", "dp_replicate", "dp_shard", "ep", "cp", "tp")
SHARDS = ("dp_shard", "ep", "cp")  # the axes that FSDP2 shards a weight over
EXPERT_SHARDS = ("dp_shard", "cp")  # and an expert's: ranks along ep hold other experts
WITHIN_REPLICA = ("dp_shard", "ep", "cp", "tp")  # the axes of one replica of a pipeline stage
WITHIN_STAGE = ("dp_replicate", *WITHIN_REPLICA)
FREE = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # their product is the number of ranks: ep divides dp_shard


@dataclass(frozen=True)
class Layout:
    """The sizes of the axes; the product of all but ep is the number of ranks."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    ep: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the sizes along AXES: ep is split off dp_shard."""
        return (self.pp, self.dp_replicate, self.dp_shard // self.ep, self.ep, self.cp, self.tp)

    @property
    def dp(self) -> int:
        """Return the number of data-parallel ranks, those that read different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def is_sharded(self) -> bool:
        """Return whether FSDP2 shards weights. Without shards every rank holds plain ones, and a sum of the gradients a
        step is all that the replicas exchange."""
        return self.dp_shard * self.cp > 1


def shards_of(parallel: ParallelConfig, layout: Layout) -> int:
    """Return how many ranks hold one copy of a model together: with DeepSpeed, which shards its replicas, all."""
    return math.prod(layout.shape) // (1 if parallel.engine == "deepspeed" else layout.dp_replicate)


def fit(parallel: ParallelConfig, ranks: int) -> Layout:
    """Return the layout of `parallel` on this many ranks, its axis of size 0 filled. DeepSpeed's ranks are replicas
    here, since FSDP2 shards nothing among them.

    Raises UserError naming the nearest counts that fit.
    """
    if ranks < 1:
        raise UserError(f"--ranks {ranks} must be at least 1")
    given = {axis: getattr(parallel, axis) for axis in FREE}
    fixed = math.prod(size or 1 for size in given.values())
    open_axes = [axis for axis, size in given.items() if size == 0]
    product = " x ".join(f"{axis} {size or '*'}" for axis, size in given.items() if size != 1) or "1"
    if open_axes:
        if ranks % fixed:
            raise UserError(
                f"parallel: the layout {product} needs a multiple of {fixed} ranks and there are {ranks}; "
                f"nearest: {nearest_multiples(fixed, ranks)}"
            )
        given[open_axes[0]] = ranks // fixed
    elif fixed != ranks:
        raise UserError(
            f"parallel: the layout {product} needs {fixed} ranks and there are {ranks}; "
            f"run it on {fixed}, or set parallel.dp_shard=0 to fill"
        )
    if given["dp_shard"] % parallel.ep:
        raise UserError(
            f"parallel.ep = {parallel.ep} does not divide the {given['dp_shard']} ranks of parallel.dp_shard; "
            f"nearest that do: {nearest_divisors(given['dp_shard'], parallel.ep)}"
        )
    if parallel.engine == "deepspeed":
        given["dp_replicate"], given["dp_shard"] = given["dp_shard"], 1
    return Layout(**given, ep=parallel.ep)
