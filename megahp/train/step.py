"""One optimizer step's mathematics: forward and backward over microbatches, then everything a step needs to know
about its gradients in one collective and one transfer to the host."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, islice

import torch
import torch.distributed as dist
from torch import Tensor

from megahp.config import ParallelConfig
from megahp.data.loader import Batch
from megahp.model.build import Model
from megahp.model.moe import routers
from megahp.parallel import data as data_parallel
from megahp.parallel.context import shard_sequence
from megahp.parallel.mesh import Mesh
from megahp.parallel.parameters import is_first_replica, local, parameters, probes, saved, sum_gradients
from megahp.parallel.pipeline import Pipeline

FIRST_SCALE = 65536.0
SCALE_GROWS_AFTER = 2000  # steps


@dataclass(frozen=True)
class Measurement:
    """What one step's gradients say, equal on all ranks."""

    loss: float  # nats per token, mean over the global batch
    stop_requested: bool  # whether some rank has been told to leave
    grad_norm: float  # of the whole gradient of the trained weights
    grad_sq_example: dict[str, float]  # norm layer -> mean_b ||g_b||^2 over its weight and bias
    grad_sq_batch: dict[str, float]  # norm layer -> ||G||^2 over its weight and bias
    load: dict[str, Tensor]  # router -> how often the global batch's tokens chose each expert: [experts] on the host
    balance_loss: dict[str, float]  # router -> mean over the global batch's sequences

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Engine:
    """A model on a mesh, from batches to summed gradients. Losses are in nats per token."""

    def __init__(self, model: Model, mesh: Mesh, parallel: ParallelConfig) -> None:
        self.model, self.mesh, self.parallel = model, mesh, parallel
        self.stages = list(model.stages.values())
        self.rows = model.rows
        self.weights = {name: weight for stage in self.stages for name, weight in parameters(stage)}
        self.trained = {name: weight for name, weight in self.weights.items() if self.rows[name].trained}
        # looked up now: at times the modules' own parameters are FSDP2's gathered ones, in the compute type
        self.saved = {name: tensor for stage in self.stages for name, tensor in saved(stage).items()}
        self.routers = {name: router for stage in self.stages for name, router in routers(stage).items()}
        self.probes = {name: probe for stage in self.stages for name, probe in probes(stage).items()}
        self.pipeline = Pipeline(model.stages, parallel, mesh, self.stages[0].stream) if parallel.pp > 1 else None
        # what a step measures over all stages, name -> how many numbers; and where this rank's stand among them
        probe_sizes = {f"{name}.probe": size for name, size in model.probes.items()}
        sizes = {"loss": 1, "stop_requested": 1, **probe_sizes, **dict.fromkeys(self.rows, 1)}
        ends = dict(zip(sizes, accumulate(sizes.values()), strict=True))
        self.total = sum(sizes.values())
        own = {"loss": mesh.is_rank0(("tp",)), "stop_requested": True}
        # of ranks with the same value only the first counts. A router's is, as a loss, of the rank's tokens, before tp
        # splits them; a norm's has been summed over the ranks an example lies on
        copies = {name: ("tp",) if name in self.routers else ("cp", "tp") for name in self.probes}
        own |= {f"{name}.probe": mesh.is_rank0(axes) for name, axes in copies.items()}
        own |= {name: is_first_replica(weight, self.rows[name], mesh) for name, weight in self.trained.items()}
        places = [torch.arange(ends[name] - sizes[name], ends[name]) for name in own]
        self.places = torch.cat(places).to(mesh.device)
        counted = [float(counts) for name, counts in own.items() for _ in range(sizes[name])]
        self.counted = torch.tensor(counted, dtype=torch.float64, device=mesh.device)

    def forward_backward(self, microbatches: Iterable[Batch], count: int, tokens: int, scale: float = 1.0) -> Tensor:
        """Add up the gradients of `scale` times the mean loss over `tokens` tokens of the global batch, from this
        rank's `count` microbatches. Returns this rank's part of that loss, not scaled, without waiting for it."""
        for router in self.routers.values():
            router.unit = scale / tokens
        if self.pipeline:
            inputs = [self._inputs(batch) for batch in microbatches]
            together = {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}
            total = self.pipeline.forward_backward(together.pop("x"), scale / tokens, count, **together) / scale
        else:
            total = self._accumulate(microbatches, count, tokens, scale)
        sum_gradients(self.trained, self.rows, self.mesh)
        return total

    @torch.no_grad()
    def evaluate(self, batch: Batch, counted: Tensor) -> Tensor:
        """Sum of the token losses of the rows that are counted (bool [n]), on the last pipeline stage; 0 elsewhere.
        Does not wait for it."""
        inputs = self._inputs(batch)
        losses = self.pipeline.forward(inputs.pop("x"), **inputs) if self.pipeline else self.stages[0](**inputs)
        if losses is None:
            return torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        return (losses.double().sum(1) * counted.to(losses.device)).sum()

    def reshard(self) -> None:
        """Let go of the weights that forward passes without a backward pass have gathered."""
        for stage in self.stages:
            data_parallel.reshard(stage)

    def _accumulate(self, microbatches: Iterable[Batch], count: int, tokens: int, scale: float) -> Tensor:
        """Forward and backward of one microbatch after the other, by a model that is whole on this rank."""
        (model,) = self.stages
        total = torch.zeros((), device=self.mesh.device, dtype=torch.float64)
        for index, batch in enumerate(microbatches):
            data_parallel.before(model, index == count - 1, self.parallel)
            loss = model(**self._inputs(batch)).sum() / tokens
            (loss * scale).backward()
            total += loss.detach()
        return total

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the model takes of a batch: this rank's tokens and targets, and the documents of the whole sequences."""
        context = self.stages[0].axis.context
        inputs = {
            "x": shard_sequence(batch.tokens[:, :-1], 1, context),
            "targets": shard_sequence(batch.tokens[:, 1:], 1, context),
        }
        return inputs if batch.documents is None else {**inputs, "documents": batch.documents}

    @torch.no_grad()  # without autograd a DTensor's part is an attribute; a detour through it takes 40 times as long
    def gradients(self) -> list[Tensor]:
        """This rank's parts of the gradients, in the order of the trained weights; a pipeline stage may have none."""
        return [local(weight.grad) for weight in self.trained.values()]  # type: ignore[arg-type]

    @torch.no_grad()
    def measure(
        self, loss: Tensor, grads: list[Tensor], batch: int, scale: float = 1.0, stop_requested: bool = False
    ) -> Measurement:
        """Reduce loss, squared gradient norms and probes of one step of `batch` sequences over all ranks and bring them
        to the host, the scale of the gradients taken out. told: whether this rank has been told to leave."""
        measured = [
            loss[None],
            loss.new_tensor([stop_requested]),
            *(probe.grad.view(-1) for probe in self.probes.values()),  # type: ignore[union-attr]
        ]
        if grads:
            measured.append(torch.stack(torch._foreach_norm(grads, 2, torch.float64)).square())
        values = torch.zeros(self.total, dtype=torch.float64, device=loss.device)
        values[self.places] = torch.cat(measured) * self.counted
        dist.all_reduce(values)
        numbers = iter(values.tolist())
        loss_value, anybody_told = next(numbers), next(numbers) > 0
        probed = {name: list(islice(numbers, size)) for name, size in self.model.probes.items()}
        routed = {name: probed.pop(name) for name in self.model.routers}
        examples = {name: square / scale**2 for name, (square,) in probed.items()}
        batches = {name: square / scale**2 for name, square in zip(self.rows, numbers, strict=True)}
        return Measurement(
            loss=loss_value,
            stop_requested=anybody_told,
            grad_norm=math.sqrt(sum(batches.values())),  # nan or inf passes through
            # the probes hold sum_b ||g_b / B||^2, since the loss is a mean over the batch
            grad_sq_example={name: batch * square for name, square in examples.items()},
            grad_sq_batch={name: batches[f"{name}.weight"] + batches.get(f"{name}.bias", 0.0) for name in examples},
            load={name: torch.tensor(part[:-1]) for name, part in routed.items()},
            balance_loss={name: part[-1] / batch for name, part in routed.items()},
        )

    def rebalance(self, load: Mapping[str, Tensor]) -> None:
        """Make routers choose differently after a step that measured this load."""
        if self.routers:
            loads = torch.stack([load[name] for name in self.routers]).to(self.mesh.device)
            for router, own in zip(self.routers.values(), loads, strict=True):
                router.rebalance(own)

    def zero(self) -> None:
        """Forget the gradients."""
        for parameter in (*self.weights.values(), *self.probes.values()):
            parameter.grad = None


def clip(grads: list[Tensor], norm: float, largest: float, scale: float = 1.0) -> None:
    """Take the scale out of the gradients, in place, and bring them down to the largest global norm (0 = any), if
    theirs, without the scale, is above it."""
    factor = (largest / norm if largest and norm > largest else 1.0) / scale
    if factor != 1 and grads:
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


def initial_loss_scale(dtype: str) -> LossScale:
    """The loss scale a run of train.dtype begins with."""
    return LossScale(FIRST_SCALE if dtype == "float16" else 1.0)
