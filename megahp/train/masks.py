"""Sparse weights: which of the blocks' matrices' weights are zero, and stay so.

A mask works on gradients alone, before their norms are taken. A masked weight begins at 0, and with a gradient and
moments of 0 AdamW leaves it there (its decay is a share of 0), so neither the forward pass nor the update knows of
masks, and what is computed is the network of W o M: norms, clipping and moments are those of its weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megahp.config import Config
from megahp.parallel.draw import draw_mask
from megahp.parallel.parameters import like, storage
from megahp.parallel.selection import Entries, Parts
from megahp.scaling.batch import Progress, StepPlan
from megahp.scaling.parameterization import Role
from megahp.scaling.sparsity import density_at, pruning_span, replaced_at
from megahp.train.optimizer import MOMENTS, Optimizer
from megahp.train.step import Engine


@dataclass(frozen=True)
class MaskChange:
    """What was done to the masks; densities are those of all masked matrices together."""

    reason: str
    before: float
    now: float
    threshold: float | None  # gradual: magnitude of the smallest weight that stays


class Masks:
    """This rank's parts of the masks, bool, laid out as their weights are: the same masks on every layout.

    static: each entry is drawn, independently of all others, for the whole run. (SmuPar, arXiv 2405.15743, section 3)
    gradual: of all matrices' weights together the smallest go, and never come back: so many at each change as a
    geometric schedule says. (The Journey Matters, arXiv 2501.12486)
    rigl: drawn, then at each change a share of each matrix's weights, the smallest, go, and as many come, from 0, whose
    gradients are the largest; experts' matrices count as one. (RigL, arXiv 1911.11134)
    """

    @torch.no_grad()
    def __init__(self, config: Config, engine: Engine, optimizer: Optimizer) -> None:
        self.sparsity, self.horizon, self.optimizer = config.sparsity, config.train.tokens, optimizer
        hidden = [name for name, row in engine.rows.items() if row.role is Role.HIDDEN]
        names = hidden if self.sparsity.method != "none" else []
        self.weights = {name: weight for name, weight in engine.weights.items() if name in names}
        self.places = {name: place for place, name in enumerate(engine.trained) if name in names}
        together = self.sparsity.method == "gradual"
        self.entries = Entries(names, self.weights, engine.rows, engine.mesh, together)
        self.masks = {
            name: draw_mask(name, weight, engine.rows[name].density, config.train.seed)
            for name, weight in self.weights.items()
        }
        self.unmasked: Parts = {}  # gradients that a change is to be made from
        for name, weight in self.weights.items():
            storage(weight).mul_(self.masks[name])
        self.size = self.entries.count({name: torch.ones_like(mask) for name, mask in self.masks.items()})
        self.measure()

    def apply(self, grads: Sequence[Tensor], plan: StepPlan) -> None:
        """Make the gradients of masked weights 0, in place. grads: this rank's parts, in the order of the trained
        weights."""
        own = {name: grads[place] for name, place in self.places.items()}
        decide = self.sparsity.method == "rigl" and self._due(plan)
        self.unmasked = {name: grad.clone() for name, grad in own.items()} if decide else {}
        self.cover(grads)

    def cover(self, grads: Sequence[Tensor]) -> None:
        """Make the gradients of masked weights 0, in place, and decide nothing by them."""
        for name, place in self.places.items():
            grads[place].mul_(self.masks[name].view(torch.uint8))  # by bool a CPU takes four times as long

    @torch.no_grad()
    def update(self, plan: StepPlan, progress: Progress) -> MaskChange | None:
        """Change the masks, and with them weights and moments, if that is due after the step of this plan, which
        `progress` counts already."""
        if self.sparsity.method == "gradual":
            return self._prune(plan, progress)
        return self._replace(progress) if self.unmasked else None

    def measure(self) -> None:
        """Take stock of the masks: what they keep, int64 [groups], and the density of all, 1 without any."""
        self.kept = self.entries.count(self.masks)
        self.density = (self.kept.sum() / self.size.sum().double()).nan_to_num(1.0).item()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of them, laid out as the weights are."""
        return {f"mask.{name}": like(self.weights[name], mask) for name, mask in self.masks.items()}

    def _due(self, plan: StepPlan) -> bool:
        return plan.step % self.sparsity.every == 0

    def _prune(self, plan: StepPlan, progress: Progress) -> MaskChange | None:
        """Mask the smallest of all weights, if the schedule has fallen below what they are."""
        sparsity = self.sparsity
        span = pruning_span(sparsity.density, sparsity.begin, sparsity.end)
        if not (progress.tokens >= span[1] * self.horizon or self._due(plan)):
            return None
        wanted = (
            (self.size.double() * density_at(progress.tokens / self.horizon, sparsity.density, span)).round().long()
        )
        if wanted >= self.kept:
            return None
        masks, least = self.entries.largest(self._values(), self.masks, wanted)
        return self._become(masks, f"weights below {least.item():.3g} are masked", least.item())

    def _replace(self, progress: Progress) -> MaskChange | None:
        """Exchange the smallest weights of each matrix for as many others; those dropped just now may be among them,
        and then stay as they were."""
        share = replaced_at(progress.tokens / self.horizon, self.sparsity.drop, self.sparsity.end)
        if share == 0:
            return None
        changing = (self.kept.double() * share).long()
        left, _ = self.entries.largest(self._values(), self.masks, self.kept - changing)
        grown, _ = self.entries.largest(self.unmasked, {name: ~mask for name, mask in left.items()}, changing)
        masks = {name: mask | grown[name] for name, mask in left.items()}
        return self._become(masks, f"{share:.3g} of each matrix's weights made room for others")

    def _values(self) -> Parts:
        return {name: storage(weight) for name, weight in self.weights.items()}

    def _become(self, masks: Parts, why: str, threshold: float | None = None) -> MaskChange:
        """Take other masks, which make weights and moments 0."""
        before, moments = self.density, self.optimizer.state()
        for name, mask in self.masks.items():
            mask.copy_(masks[name])
            for tensor in (self.weights[name], *(moments[f"{moment}.{name}"] for moment in MOMENTS)):
                storage(tensor).mul_(mask)
        self.measure()
        self.unmasked = {}
        return MaskChange(why, before, self.density, threshold)
