"""Choosing the largest entries of sharded weights: an exact number of them, the same ones on every layout."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megahp.parallel.mesh import Mesh
from megahp.parallel.parameters import Row, indices, is_first_replica

# The bits of a float that is not negative, read as an integer, keep its order: so a bisection by bits is exact.
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
Parts = dict[str, Tensor]  # this rank's parts of tensors sharded like weights, by name of the weight


class Entries:
    """Count and choose among the entries of some weights, in one group or a group for each weight.

    names: the weights of all pipeline stages; weights: this rank's of them. Methods are collectives of all ranks.
    """

    def __init__(
        self, names: Sequence[str], weights: Mapping[str, Tensor], rows: Mapping[str, Row], mesh: Mesh, together: bool
    ) -> None:
        self.weights, self.device = weights, mesh.device
        self.number = {name: number for number, name in enumerate(names)}
        self.group = {name: 0 if together else self.number[name] for name in weights}
        self.groups = 1 if together else len(names)
        self.counted = {name: is_first_replica(weight, rows[name], mesh) for name, weight in weights.items()}

    def count(self, chosen: Parts) -> Tensor:
        """Return the number of true entries in each group over all ranks: bool parts -> int64 [groups]."""
        counts = torch.zeros(self.groups, dtype=torch.int64, device=self.device)
        for name, part in chosen.items():
            counts[self.group[name]] += part.sum() * self.counted[name]
        if self.groups:
            dist.all_reduce(counts)
        return counts

    def largest(self, values: Parts, among: Parts, counts: Tensor) -> tuple[Parts, Tensor]:
        """Choose the entries of each group with the largest magnitudes; of equal ones, the first.

        Args:
            values: fp32 or fp64.
            among: bool, the candidates; at least `counts` of them.
            counts: int64 [groups], how many to choose.

        Returns:
            Masks, and the smallest magnitude chosen in each group, [groups].
        """
        dtype = next(iter(values.values())).dtype
        kind = INTEGERS[dtype]
        keys = {name: value.abs().view(kind).masked_fill_(~among[name], -1) for name, value in values.items()}
        bound = self._bisect(keys, counts)
        above = {name: key > bound[self.group[name]] for name, key in keys.items()}
        equal = {name: key == bound[self.group[name]] for name, key in keys.items()}
        rest = counts - self.count(above)
        if (self.count(equal) > rest).any():  # ties: take the first by index in the weight, then by weight
            order = {name: indices(w) * len(self.number) + self.number[name] for name, w in self.weights.items()}
            ranks = {name: torch.where(equal[name], 2**62 - index, -1) for name, index in order.items()}
            last = self._bisect(ranks, rest)
            equal = {name: key >= last[self.group[name]] for name, key in ranks.items()}
        return {name: above[name] | equal[name] for name in keys}, bound.to(kind).view(dtype)

    def _bisect(self, keys: Parts, counts: Tensor) -> Tensor:
        """Return the largest bound of each group, int64 [groups], that `counts` of its integer keys reach."""
        bound = torch.zeros_like(counts)
        for bit in reversed(range(torch.iinfo(next(iter(keys.values())).dtype).bits - 1)):
            higher = bound + 2**bit
            reached = self.count({name: key >= higher[self.group[name]] for name, key in keys.items()})
            bound = torch.where(reached >= counts, higher, bound)
        return bound
