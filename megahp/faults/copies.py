"""Whether weights that lie on several ranks are still equal there: nothing in training makes them so again."""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megahp.errors import Fault
from megahp.parallel.mesh import WITHIN_STAGE, Mesh
from megahp.parallel.messages import all_gather_json
from megahp.parallel.parameters import Row, replicated_axes, storage

SHOWN = 3  # differing weights in one message
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def check_copies(weights: Mapping[str, Tensor], table: Mapping[str, Row], mesh: Mesh) -> None:
    """Make sure that every weight is equal, to the bit, on all ranks that hold a copy of it. All ranks call it, and all
    raise Fault when it is not so on some of them, naming weights and ranks."""
    sums = {name: _sum_of_bits(weight) for name, weight in weights.items()}
    copied = {name: replicated_axes(weight, table[name]) for name, weight in weights.items()}
    groups = [(axis, mesh.group(axis)) for axis in WITHIN_STAGE] + [("pp", mesh.embedding_group)]
    found: list[str] = []
    for axis, group in groups:
        names = [name for name in weights if axis in copied[name]]
        if names and group and group.size() > 1:
            found += _apart(names, torch.stack([sums[name] for name in names]), group)
    differing = torch.tensor(len(found), device=mesh.device)
    dist.all_reduce(differing)
    if differing:
        told = all_gather_json(found[:SHOWN])
        lines = list(dict.fromkeys(line for part in told for line in part))[:SHOWN]
        raise Fault(f"weights that should be equal have come apart: {'; '.join(lines)}")


def _apart(names: list[str], own: Tensor, group: dist.ProcessGroup) -> Iterator[str]:
    """The weights of which the group's ranks hold different bits. Of two ranks nobody can tell which is wrong."""
    gathered = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(gathered, own, group=group)
    sums, ranks = torch.stack(gathered), dist.get_process_group_ranks(group)
    usual = sums.mode(0).values
    for column in (sums != usual).any(0).nonzero().flatten().tolist():
        other = [rank for rank, value in zip(ranks, sums[:, column], strict=True) if value != usual[column]]
        alone = f"rank {', '.join(map(str, other))} is not what {len(ranks) - len(other)} ranks hold"
        yield f"{names[column]} on {f'ranks {ranks[0]} and {ranks[1]}' if len(ranks) == 2 else alone}"


def _sum_of_bits(weight: Tensor) -> Tensor:
    """The sum of the bit patterns of this rank's part, as whole numbers that wrap around: int64."""
    part = storage(weight)
    return part.contiguous().view(BITS[part.itemsize]).sum(dtype=torch.int64)
