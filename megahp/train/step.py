"""One optimizer step's mathematics: forward and backward over microbatches, then everything a step needs to know
about its gradients in one collective and one transfer to the host."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megahp.data.loader import Batch
from megahp.model.moe import Router
from megahp.model.transformer import Transformer
from megahp.parallel import data as data_parallel
from megahp.parallel.mesh import Mesh
from megahp.parallel.parameters import counted_once, parameters, probes, rows, storage, sum_gradients

FIRST_SCALE = 65536.0
SCALE_GROWS_AFTER = 2000  # steps


@dataclass(frozen=True)
class Measurement:
    """What one step's gradients say, equal on all ranks."""

    loss: float  # nats per token, mean over the global batch
    grad_norm: float  # of the whole gradient
    grad_sq_example: dict[str, float]  # norm layer -> mean_b ||g_b||^2 over its weight and bias
    grad_sq_batch: dict[str, float]  # norm layer -> ||G||^2 over its weight and bias
    load: dict[str, Tensor]  # router -> how often the global batch's tokens chose each expert: [experts] on the host
    balance_loss: dict[str, float]  # router -> mean over the global batch's sequences

    @property
    def finite(self) -> bool:
        return math.isfinite(self.grad_norm)


class Engine:
    """A model on a mesh, from batches to summed gradients. Losses are in nats per token."""

    def __init__(self, model: Transformer, mesh: Mesh) -> None:
        self.model, self.mesh = model, mesh
        self.weights = dict(parameters(model))
        self.rows = rows(model)
        self.routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
        self.probes = {name: probe for name, probe in probes(model).items() if name not in self.routers}
        # of the ranks that hold the same value one speaks: a loss is that of the rank's tokens, before tp splits them,
        # and probes have been summed over the ranks an example lies on
        mine = [counted_once(weight, mesh) for weight in self.weights.values()]
        self.weights_counted = torch.tensor(mine, dtype=torch.float64, device=mesh.device)
        self.first_of_tokens, self.first_of_example = mesh.is_first(("tp",)), mesh.is_first(("cp", "tp"))

    def forward_backward(self, microbatches: Iterable[Batch], count: int, tokens: int, scale: float = 1.0) -> Tensor:
        """Add up the gradients of `scale` times the mean loss over `tokens` tokens of the global batch, from this
        rank's `count` microbatches. Returns this rank's part of that loss, not scaled, without waiting for it."""
        total = torch.zeros((), device=self.mesh.device, dtype=torch.float64)
        for router in self.routers.values():
            router.unit = scale / tokens
        for index, batch in enumerate(microbatches):
            data_parallel.reduce_after(self.model, last=index == count - 1)
            losses = self.model(batch.tokens[:, :-1], batch.tokens[:, 1:], batch.documents)
            loss = losses.sum() / tokens
            (loss * scale).backward()
            total += loss.detach()
        sum_gradients(self.weights, self.rows, self.mesh)
        return total

    @torch.no_grad()
    def evaluate(self, batch: Batch, counted: Tensor) -> Tensor:
        """Sum of the token losses of the rows that are counted (bool [n]), without waiting for it."""
        losses = self.model(batch.tokens[:, :-1], batch.tokens[:, 1:], batch.documents)
        return (losses.double().sum(1) * counted.to(losses.device)).sum()

    def gradients(self) -> list[Tensor]:
        """This rank's parts of the gradients, in the order of the weights."""
        return [storage(weight.grad) for weight in self.weights.values()]  # type: ignore[arg-type]

    @torch.no_grad()
    def measure(self, loss: Tensor, grads: list[Tensor], batch: int, scale: float = 1.0) -> Measurement:
        """Reduce loss, squared gradient norms and probes of one step of `batch` sequences over all ranks and bring them
        to the host, the scale of the gradients taken out."""
        squares = torch.stack(torch._foreach_norm(grads, 2, torch.float64)).square() * self.weights_counted
        by_example = [probe.grad.double() * self.first_of_example for probe in self.probes.values()]  # type: ignore[union-attr]
        counted = [router.probe.grad.double() * self.first_of_tokens for router in self.routers.values()]  # type: ignore[union-attr]
        values = torch.cat((torch.stack([loss * self.first_of_tokens, *by_example]), squares, *counted))
        dist.all_reduce(values)
        sizes = [len(part) for part in counted]
        measured, *counted = values.cpu().split([len(values) - sum(sizes), *sizes])
        loss_value, *squared = measured.tolist()
        numbers = [value / scale**2 for value in squared]
        by_probe = dict(zip(self.probes, numbers, strict=False))
        by_weight = dict(zip(self.weights, numbers[len(by_probe) :], strict=True))
        return Measurement(
            loss=loss_value,
            grad_norm=math.sqrt(sum(by_weight.values())),  # nan or inf passes through
            # the probes hold sum_b ||g_b / B||^2, since the loss is a mean over the batch
            grad_sq_example={name: batch * square for name, square in by_probe.items()},
            grad_sq_batch={name: by_weight[f"{name}.weight"] + by_weight.get(f"{name}.bias", 0.0) for name in by_probe},
            load={name: part[:-1] for name, part in zip(self.routers, counted, strict=True)},
            balance_loss={name: part[-1].item() / batch for name, part in zip(self.routers, counted, strict=True)},
        )

    def rebalance(self, load: Mapping[str, Tensor]) -> None:
        """Make routers choose differently after a step that measured this load."""
        for name, router in self.routers.items():
            router.rebalance(load[name].to(self.mesh.device))

    def zero(self) -> None:
        """Forget the gradients."""
        self.model.zero_grad(set_to_none=True)


def clip(grads: list[Tensor], norm: float, largest: float, scale: float = 1.0) -> None:
    """Take the scale out of the gradients, in place, and bring them down to the largest global norm (0 = any), if
    theirs, without the scale, is above it."""
    factor = (largest / norm if largest and norm > largest else 1.0) / scale
    if factor != 1:
        torch._foreach_mul_(grads, factor)


@dataclass
class LossScale:
    """What the loss is multiplied by, so that no gradient vanishes in float16: halved when one overflows, doubled after
    so many steps in which none did. (Micikevicius et al., arXiv 1710.03740, section 3.2; torch's GradScaler has the
    same numbers.) It stays 1 for other types."""

    value: float = 1.0
    steps: int = 0  # since the last change

    def update(self, finite: bool) -> None:
        """Take in whether a step's gradients were finite."""
        self.steps += 1
        if not finite:
            self.value, self.steps = self.value / 2, 0
        elif self.steps == SCALE_GROWS_AFTER:
            self.value, self.steps = self.value * 2, 0
