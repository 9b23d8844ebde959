"""Gather whole weights, each on the one rank that owns it, and scatter what that rank makes of them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megahp.parallel.collectives import all_to_all
from megahp.parallel.layout import WITHIN_REPLICA
from megahp.parallel.mesh import Mesh
from megahp.parallel.parameters import extents, storage


class Owners:
    """Assigns weights to the ranks of a pipeline stage: of those of one call, at most `size`, the n-th is rank n's.

    The ranks of a replica exchange parts all to all, so each sends and receives about as much as the one weight that it
    owns (with fewer weights than ranks, owners receive more than they send). Gathering every weight on every rank would
    take as many times more as there are weights. Replicas own different weights, and broadcast what they make of them
    to each other.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.layout = mesh.layout
        self.replica, self.replicas = mesh.group(*WITHIN_REPLICA), mesh.group("dp_replicate")
        self.size = self.replicas.size() * self.replica.size()
        self.rank = self.replicas.rank() * self.replica.size() + self.replica.rank()
        self.places: dict[Tensor, list[tuple[slice, ...]]] = {}  # of a weight this rank owns: every rank's part in it

    def gather(self, weights: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor | None:
        """Return what belongs to the weight that this rank owns, whole; None if it owns none of these. A collective.

        weights: at most `size`; parts: for each weight this rank's part of something that is laid out like it.
        """
        first, ranks = self.replicas.rank() * self.replica.size(), self.replica.size()
        own_parts = parts[first : first + ranks]
        if not own_parts:  # this replica owns none
            return None
        if ranks == 1:  # a part is the whole, and is returned itself
            return own_parts[0]
        if self.rank >= len(weights):
            self._exchange(own_parts, [])
            return None
        whole = own_parts[0].new_empty(weights[self.rank].shape)
        views = self._views(weights[self.rank], whole)
        received = self._exchange(own_parts, sizes := [view.numel() for view in views]).split(sizes)
        torch._foreach_copy_(views, [piece.view_as(view) for piece, view in zip(received, views, strict=True)])
        return whole

    def scatter(self, weights: Sequence[Tensor], whole: Tensor | None) -> list[Tensor]:
        """Return for each weight this rank's part of `whole`, which the weight's owner passes. A collective."""
        parts, results = [storage(weight) for weight in weights], list[Tensor]()
        for replica, first in enumerate(range(0, len(weights), self.replica.size())):
            own_parts = parts[first : first + self.replica.size()]
            sizes = [part.numel() for part in own_parts]
            if replica == self.replicas.rank():
                pieces = self._views(weights[self.rank], whole) if whole is not None else [parts[0].new_empty(0)]
                flat = self._exchange(pieces, sizes)
            else:
                flat = parts[0].new_empty(sum(sizes))
            if self.replicas.size() > 1:
                dist.broadcast(flat, group=self.replicas, group_src=replica)
            results += [piece.view_as(part) for piece, part in zip(flat.split(sizes), own_parts, strict=True)]
        return results

    def _exchange(self, pieces: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """Send the n-th piece to rank n of the replica; return what its ranks send, of these sizes, in their order."""
        sent = [piece.numel() for piece in pieces]
        flat = pieces[0].new_empty(sum(sent))
        places = zip(flat.split(sent), pieces, strict=True)
        torch._foreach_copy_([place.view_as(piece) for place, piece in places], [*pieces])  # in one kernel
        if self.replica.size() == 1:
            return flat
        return all_to_all(flat, self._padded(sent), self._padded(sizes), self.replica)

    def _padded(self, sizes: Sequence[int]) -> list[int]:
        """Return a size for each rank of the replica: 0 for those after the last."""
        return [*sizes, *[0] * (self.replica.size() - len(sizes))]

    def _views(self, weight: Tensor, whole: Tensor) -> list[Tensor]:
        """Return of each rank of the replica, in order, its part of the whole of this weight."""
        if weight not in self.places:
            self.places[weight] = [
                tuple(slice(offset, offset + size) for offset, size in zip(*found, strict=True))
                for found in extents(weight, self.layout)
            ]
        return [whole[place] for place in self.places[weight]]
