"""Comparing copies: are weights that several ranks hold still equal? Nothing in training makes them so again."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megahp.errors import Fault
from megahp.parallel.layout import WITHIN_STAGE
from megahp.parallel.mesh import Mesh
from megahp.parallel.messages import all_gather_json
from megahp.parallel.parameters import Row, replicated_axes, storage

SHOWN = 3  # differing weights in one message
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a value -> the integers of as many


@torch.no_grad()
def check_copies(weights: Mapping[str, Tensor], rows: Mapping[str, Row], mesh: Mesh) -> None:
    """Check that every weight is equal, to the bit, on all ranks that hold a copy of it. All ranks call this, and all
    raise Fault when a copy differs anywhere, naming weights and ranks."""
    sums = {}
    for name, weight in weights.items():
        # bit patterns as integers that wrap around: unlike in a sum of floats, any one flipped bit shows
        part = storage(weight).contiguous()
        sums[name] = part.view(BITS[part.itemsize]).sum(dtype=torch.int64)
    copied = {name: replicated_axes(weight, rows[name]) for name, weight in weights.items()}
    groups = [(axis, mesh.group(axis)) for axis in WITHIN_STAGE] + [("pp", mesh.embedding_group)]
    differing: list[str] = []
    for axis, group in groups:
        names = [name for name in weights if axis in copied[name]]
        if names and group and group.size() > 1:
            differing += _compare(names, torch.stack([sums[name] for name in names]), group)
    # most often nothing differs, and one number settles it; only then are names sent about
    count = torch.tensor(len(differing), device=mesh.device)
    dist.all_reduce(count)
    if count:
        gathered = all_gather_json(differing[:SHOWN])
        lines = list(dict.fromkeys(line for of_rank in gathered for line in of_rank))[:SHOWN]
        raise Fault(f"weights that should be equal have come apart: {'; '.join(lines)}")


def _compare(names: list[str], sums: Tensor, group: dist.ProcessGroup) -> list[str]:
    """Return the weights of which the group's ranks hold different bits, each with the ranks in the minority. Of two
    ranks it cannot be known which one is wrong."""
    gathered = [torch.empty_like(sums) for _ in range(group.size())]
    dist.all_gather(gathered, sums, group=group)
    by_rank, ranks = torch.stack(gathered), dist.get_process_group_ranks(group)
    usual = by_rank.mode(0).values
    differing = []
    for column in (by_rank != usual).any(0).nonzero().flatten().tolist():
        others = [rank for rank, value in zip(ranks, by_rank[:, column], strict=True) if value != usual[column]]
        where = f"rank {', '.join(map(str, others))} is not what {len(ranks) - len(others)} ranks hold"
        differing.append(f"{names[column]} on {f'ranks {ranks[0]} and {ranks[1]}' if len(ranks) == 2 else where}")
    return differing
