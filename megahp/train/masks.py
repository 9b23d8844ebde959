"""Sparse weights: which entries of the blocks' matrices are zero, and stay so.

A mask works on gradients alone, before their norms are measured. A masked weight begins at 0, and with a gradient and
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
from megahp.train.engine import Engine
from megahp.train.optimizer import MOMENTS, Optimizer


@dataclass(frozen=True)
class MaskChange:
    """A change of the masks; densities are those of all masked matrices together."""

    reason: str
    before: float
    now: float
    threshold: float | None  # gradual: magnitude of the smallest weight that stays


class Masks:
    """This rank's parts of the masks, bool, laid out as their weights are: the same masks on every layout.

    static: each entry is drawn, independently of all others, for the whole run. (SmuPar, arXiv 2405.15743, section 3)
    gradual: of all matrices' weights together the smallest are masked for good, as many at each change as a geometric
    schedule says. (The Journey Matters, arXiv 2501.12486)
    rigl: drawn, then at each change a share of each matrix's weights, the smallest, are masked, and as many others,
    whose gradients are the largest, unmasked, from 0; experts' matrices count as one. (RigL, arXiv 1911.11134)
    """

    @torch.no_grad()
    def __init__(self, config: Config, engine: Engine, optimizer: Optimizer) -> None:
        self.sparsity, self.horizon, self.optimizer = config.sparsity, config.train.tokens, optimizer
        hidden = [name for name, row in engine.rows.items() if row.role is Role.HIDDEN]
        names = hidden if self.sparsity.method != "none" else []
        self.weights = {name: weight for name, weight in engine.weights.items() if name in names}
        self.grad_index = {name: index for index, name in enumerate(engine.trained) if name in names}
        in_one_group = self.sparsity.method == "gradual"
        self.entries = Entries(names, self.weights, engine.rows, engine.mesh, in_one_group)
        self.masks = {
            name: draw_mask(name, weight, engine.rows[name].density, config.train.seed)
            for name, weight in self.weights.items()
        }
        self.unmasked_grads: Parts = {}  # of this step, if a RigL change follows it
        for name, weight in self.weights.items():
            storage(weight).mul_(self.masks[name])
        self.num_entries = self.entries.count({name: torch.ones_like(mask) for name, mask in self.masks.items()})
        self.recount()

    def mask_step_gradients(self, grads: Sequence[Tensor], plan: StepPlan) -> None:
        """Mask the gradients of a step, in place. grads: this rank's parts, in the order of the trained weights."""
        # RigL chooses by the gradients of masked weights, which are gone after this
        needed = self.grad_index if self.sparsity.method == "rigl" and plan.step % self.sparsity.every == 0 else {}
        self.unmasked_grads = {name: grads[index].clone() for name, index in needed.items()}
        self.mask_gradients(grads)

    def mask_gradients(self, grads: Sequence[Tensor]) -> None:
        """Mask gradients, in place, that no change of the masks depends on."""
        for name, index in self.grad_index.items():
            grads[index].mul_(self.masks[name].view(torch.uint8))  # multiplying by bool takes a CPU four times as long

    @torch.no_grad()
    def update(self, plan: StepPlan, progress: Progress) -> MaskChange | None:
        """Change the masks, and with them weights and moments, if due after the step of this plan, which is already
        counted in `progress`."""
        values = {name: storage(weight) for name, weight in self.weights.items()}
        if self.sparsity.method == "gradual":
            return self._prune(values, plan, progress)
        return self._replace(values, progress) if self.unmasked_grads else None

    def recount(self) -> None:
        """Count what the masks keep: int64 [groups], and the density of all, 1 without any."""
        self.kept = self.entries.count(self.masks)
        self.density = (self.kept.sum() / self.num_entries.sum().double()).nan_to_num(1.0).item()

    def state(self) -> dict[str, Tensor]:
        """Return the masks for a checkpoint, laid out as the weights are."""
        return {f"mask.{name}": like(self.weights[name], mask) for name, mask in self.masks.items()}

    def _prune(self, values: Parts, plan: StepPlan, progress: Progress) -> MaskChange | None:
        """Mask the smallest of all weights, down to the schedule's density."""
        sparsity = self.sparsity
        span = pruning_span(sparsity.density, sparsity.begin, sparsity.end)
        # from the end of the schedule on every step is due, so that the final density does not wait
        if progress.tokens < span[1] * self.horizon and plan.step % sparsity.every:
            return None
        density = density_at(progress.tokens / self.horizon, sparsity.density, span)
        target = (self.num_entries.double() * density).round().long()
        if target >= self.kept:
            return None
        masks, least = self.entries.largest(values, self.masks, target)
        return self._set(masks, f"weights below {least.item():.3g} are masked", least.item())

    def _replace(self, values: Parts, progress: Progress) -> MaskChange | None:
        """Replace the smallest weights of each matrix by as many masked ones. Those just masked may be chosen again,
        and then stay as they were."""
        share = replaced_at(progress.tokens / self.horizon, self.sparsity.drop, self.sparsity.end)
        if share == 0:
            return None
        replaced = (self.kept.double() * share).long()
        left, _ = self.entries.largest(values, self.masks, self.kept - replaced)
        grown, _ = self.entries.largest(self.unmasked_grads, {name: ~mask for name, mask in left.items()}, replaced)
        masks = {name: mask | grown[name] for name, mask in left.items()}
        return self._set(masks, f"{share:.3g} of each matrix's weights made room for others")

    def _set(self, masks: Parts, reason: str, threshold: float | None = None) -> MaskChange:
        """Set the masks, and zero the weights and moments that they mask."""
        before, moments = self.density, self.optimizer.state()
        for name, mask in self.masks.items():
            mask.copy_(masks[name])
            for tensor in (self.weights[name], *(moments[f"{moment}.{name}"] for moment in MOMENTS)):
                storage(tensor).mul_(mask)
        self.recount()
        self.unmasked_grads = {}
        return MaskChange(reason, before, self.density, threshold)
