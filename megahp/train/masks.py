"""Sparse weights: which of the blocks' matrices' weights are zero, and stay so.

A mask works on gradients alone, before their norms are taken. A masked weight begins at 0, and with a gradient and
moments of 0 AdamW leaves it there (its decay is a share of 0), so neither the forward pass nor the update knows of
masks, and what is computed is the network of W o M: norms, clipping and moments are those of its weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megahp.config import Config
from megahp.parallel.parameters import counted_once, draw_mask, like, storage
from megahp.train.step import Engine


class Masks:
    """This rank's parts of the masks, bool, laid out as their weights are: the same masks on every layout.

    static: each entry stays with the weight's density, independently of all others, and for the whole run. (SmuPar,
    arXiv 2405.15743, section 3)
    """

    @torch.no_grad()
    def __init__(self, settings: Config, engine: Engine) -> None:
        self.engine = engine
        self.masks = {
            name: draw_mask(name, weight, engine.rows[name].density, settings.train.seed)
            for name, weight in engine.weights.items()
            if engine.rows[name].density < 1
        }
        self.places = [place for place, name in enumerate(engine.weights) if name in self.masks]
        for name, mask in self.masks.items():
            storage(engine.weights[name]).mul_(mask)
        self.measure()

    def apply(self, grads: Sequence[Tensor]) -> None:
        """Make the gradients of masked weights 0; grads: this rank's parts, in the order of the weights."""
        for place, mask in zip(self.places, self.masks.values(), strict=True):
            grads[place].mul_(mask)

    def measure(self) -> None:
        """Have `density` be the share of the masked matrices' entries that stay, over all ranks; 1 without any."""
        rows, mesh = self.engine.rows, self.engine.mesh
        counts = torch.zeros(2, dtype=torch.float64, device=mesh.device)
        for name, mask in self.masks.items():
            if counted_once(self.engine.weights[name], rows[name], mesh):
                counts += torch.stack((mask.sum(), counts.new_tensor(mask.numel())))
        dist.all_reduce(counts)
        kept, all_there_are = counts.tolist()
        self.density = kept / all_there_are if all_there_are else 1.0

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of them."""
        return {f"mask.{name}": like(self.engine.weights[name], mask) for name, mask in self.masks.items()}
