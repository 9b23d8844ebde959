"""Choosing the largest entries of weights that lie on the ranks: exactly so many, and the same ones on every layout."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megahp.parallel.mesh import Mesh
from megahp.parallel.parameters import Row, indices, is_first_replica

INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}  # the same bits: of positive floats in their order
Parts = dict[str, Tensor]  # this rank's parts of tensors laid out as weights are, by name of the weight


class Entries:
    """The entries of some weights, in one group or each weight's in its own.

    names: of the weights of all pipeline stages; weights: this rank's of them. All ranks must call a method together.
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
        """How many are true in each group, over all ranks: bool parts -> int64 [groups]."""
        counts = torch.zeros(self.groups, dtype=torch.int64, device=self.device)
        for name, part in chosen.items():
            counts[self.group[name]] += part.sum() * self.counted[name]
        if self.groups:
            dist.all_reduce(counts)
        return counts

    def largest(self, values: Parts, among: Parts, wanted: Tensor) -> tuple[Parts, Tensor]:
        """Masks of the `wanted` (int64 [groups]) entries of each group with the largest magnitudes, of equal ones the
        first, among some (bool), which must be as many at least; and the least of these magnitudes, [groups]."""
        dtype = next(iter(values.values())).dtype
        kind = INTEGERS[dtype]
        keys = {name: value.abs().view(kind).masked_fill_(~among[name], -1) for name, value in values.items()}
        least = self._least(keys, wanted)
        above = {name: key > least[self.group[name]] for name, key in keys.items()}
        equal = {name: key == least[self.group[name]] for name, key in keys.items()}
        rest = wanted - self.count(above)
        if (self.count(equal) > rest).any():
            equal = self._first(equal, rest)
        return {name: above[name] | equal[name] for name in keys}, least.to(kind).view(dtype)

    def _first(self, among: Parts, wanted: Tensor) -> Parts:
        """The first `wanted` of each group: by index in the weight, then by weight."""
        order = {name: indices(weight) * len(self.number) + self.number[name] for name, weight in self.weights.items()}
        keys = {name: torch.where(among[name], 2**62 - place, -1) for name, place in order.items()}
        least = self._least(keys, wanted)
        return {name: key >= least[self.group[name]] for name, key in keys.items()}

    def _least(self, keys: Parts, wanted: Tensor) -> Tensor:
        """The largest bound of each group (int64 [groups]) that `wanted` of its keys, integers, reach: bit by bit."""
        least = torch.zeros_like(wanted)
        for bit in reversed(range(torch.iinfo(next(iter(keys.values())).dtype).bits - 1)):
            higher = least + 2**bit
            reached = self.count({name: key >= higher[self.group[name]] for name, key in keys.items()})
            least = torch.where(reached >= wanted, higher, least)
        return least
