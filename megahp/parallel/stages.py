"""The blocks of each pipeline stage, and the stages of each rank. Imports no torch: plans ask it for many layouts."""

from functools import lru_cache
from itertools import accumulate, pairwise

from megahp.config import Config, ParallelConfig
from megahp.scaling.flops import layer_costs


def stage_blocks(config: Config) -> list[range]:
    """Return the blocks of each pipeline stage, first to last: parallel.split, or the split of least cost."""
    model, parallel = config.model, config.parallel
    if not parallel.split:
        costs = layer_costs(model, config.data.sequence_length)
        return list(split(tuple(costs), parallel.pp * parallel.local_stages))
    ends = list(accumulate(parallel.split, initial=0))
    return [range(start, end) for start, end in pairwise(ends)]


@lru_cache  # a search asks for few splits many thousand times
def split(costs: tuple[float, ...], parts: int) -> tuple[range, ...]:
    """Split consecutive items into non-empty parts so that the costliest part is as cheap as possible.

    Dynamic programming over the end of each part. Raises ValueError for more parts than items.
    """
    if parts > len(costs):
        raise ValueError(f"{len(costs)} items cannot make {parts} parts")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best = {0: (0.0, [0])}  # number of items assigned -> the costliest part so far, and where the parts end
    for part in range(parts):
        best = {
            end: min(
                (max(worst, sums[end] - sums[start]), [*ends, end])
                for start, (worst, ends) in best.items()
                if start < end
            )
            for end in range(part + 1, len(costs) - parts + part + 2)
        }
    _, ends = best[len(costs)]
    return tuple(range(start, end) for start, end in pairwise(ends))


def owner(stage: int, parallel: ParallelConfig) -> int:
    """Return the pipeline rank of a stage: round robin, or for zbv down the ranks and back up."""
    lap, rank = divmod(stage, parallel.pp)
    return parallel.pp - 1 - rank if parallel.schedule == "zbv" and lap % 2 else rank


def stages_of(rank: int, parallel: ParallelConfig) -> list[int]:
    """Return the stages of a pipeline rank, ascending."""
    return [stage for stage in range(parallel.pp * parallel.local_stages) if owner(stage, parallel) == rank]
