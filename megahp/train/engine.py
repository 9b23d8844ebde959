"""The mathematics of one optimizer step: forward and backward over microbatches, then one all-reduce and one transfer
to the host for everything a step measures."""

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
from megahp.parallel.parameters import is_first_replica, local, parameters, probes, saved_state, sum_gradients
from megahp.parallel.pipeline import Pipeline
from megahp.train.teachers import TeacherModels

FIRST_SCALE = 65536.0
SCALE_GROWS_AFTER = 2000  # steps


@dataclass(frozen=True)
class Measurement:
    """What was measured of one step and its gradients, equal on all ranks."""

    loss: float  # nats per token, mean over the global batch
    stop_requested: bool  # on any rank
    wrong_samples: bool  # whether any rank's samples stand in for others (Batch.wrong)
    grad_norm: float  # of the whole gradient of the trained weights
    grad_sq_example: dict[str, float]  # norm layer -> mean_b ||g_b||^2 over its weight and bias
    grad_sq_batch: dict[str, float]  # norm layer -> ||G||^2 over its weight and bias
    load: dict[str, Tensor]  # router -> how often the global batch's tokens chose each expert: [experts] on the host
    balance_loss: dict[str, float]  # router -> mean over the global batch's sequences

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Engine:
    """A model on a mesh, from batches to summed gradients. Losses are in nats per token.

    teachers: whose predictions training learns; None = the data's tokens alone. Evaluation is of the tokens.
    """

    teachers: TeacherModels | None = None

    def __init__(
        self, model: Model, mesh: Mesh, parallel: ParallelConfig, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """weights: this rank's parts of the master weights, where they are not the modules' own parameters."""
        self.model, self.mesh, self.parallel = model, mesh, parallel
        self.stages = list(model.stages.values())
        self.rows = model.rows
        # collected once, here: during a step the modules' own parameters are FSDP2's gathered ones, in the compute type
        self.weights = weights or {name: weight for stage in self.stages for name, weight in parameters(stage)}
        self.trained = {name: weight for name, weight in self.weights.items() if self.rows[name].trained}
        self.saved = saved_state(self.weights, self.stages)
        self.routers = {name: router for stage in self.stages for name, router in routers(stage).items()}
        self.probes = {name: probe for stage in self.stages for name, probe in probes(stage).items()}
        self.pipeline = Pipeline(model.stages, parallel, mesh, self.stages[0].stream) if parallel.pp > 1 else None

        # All that a step measures travels as one float64 vector, through one all-reduce over all ranks: the loss, the
        # flags, every probe and every weight's squared norm, of all pipeline stages. A rank adds its numbers at
        # `self.slots`, times `self.contributes`: 1, or 0 where it holds a copy of what another rank adds.
        probe_sizes = {f"{name}.probe": size for name, size in model.probes.items()}
        sizes = {"loss": 1, "stop_requested": 1, "wrong_samples": 1, **probe_sizes, **dict.fromkeys(self.rows, 1)}
        ends = dict(zip(sizes, accumulate(sizes.values()), strict=True))
        self.num_slots = sum(sizes.values())
        contributes = {"loss": mesh.is_rank0(("tp",)), "stop_requested": True, "wrong_samples": True}
        for name in self.probes:
            # a router's probe, as the loss, is of this rank's tokens, which are the same on all tp ranks; a norm's has
            # been summed over tp and cp, where an example's tokens lie
            copied_over = ("tp",) if name in self.routers else ("cp", "tp")
            contributes[f"{name}.probe"] = mesh.is_rank0(copied_over)
        for name, weight in self.trained.items():
            contributes[name] = is_first_replica(weight, self.rows[name], mesh)
        slots = [torch.arange(ends[name] - sizes[name], ends[name]) for name in contributes]
        self.slots = torch.cat(slots).to(mesh.device)
        factors = [float(counts) for name, counts in contributes.items() for _ in range(sizes[name])]
        self.contributes = torch.tensor(factors, dtype=torch.float64, device=mesh.device)

    def forward_backward(self, microbatches: Iterable[Batch], count: int, tokens: int, scale: float = 1.0) -> Tensor:
        """Add the gradients of `scale` times the mean loss over `tokens` tokens of the global batch, from this rank's
        `count` microbatches. Returns this rank's part of that loss, unscaled, on the device: nothing waits for it."""
        if self.pipeline:
            inputs = [self._inputs(batch) for batch in microbatches]
            merged = {name: torch.cat([each[name] for each in inputs]) for name in inputs[0]}
            total = self.pipeline.forward_backward(merged.pop("x"), scale / tokens, count, **merged) / scale
        else:
            (model,) = self.stages
            total = torch.zeros((), device=self.mesh.device, dtype=torch.float64)
            for index, batch in enumerate(microbatches):
                data_parallel.prepare_pass(model, index == count - 1, self.parallel)
                # divided by the tokens of the global batch, not of this microbatch: accumulation and data parallelism
                # then are plain sums, and gradients do not depend on how a batch is divided
                own = self._inputs(batch)
                taught = self.teachers.predict(own) if self.teachers else None
                loss = model(**own, teachers=taught, loss_weight=scale / tokens).sum() / tokens
                (loss * scale).backward()
                total += loss.detach()
        # after the last backward pass, once for all microbatches: a tied weight's copies need FSDP's reduction first
        sum_gradients(self.trained, self.rows, self.mesh)
        return total

    @torch.no_grad()
    def evaluate(self, batch: Batch, groups: Tensor) -> Tensor:
        """Return the sum of the token losses of each group of rows (bool [n, groups]), float64 [groups], on the last
        pipeline stage; 0 elsewhere. Nothing waits for it."""
        inputs = self._inputs(batch)
        losses = self.pipeline.forward(inputs.pop("x"), **inputs) if self.pipeline else self.stages[0](**inputs)
        if losses is None:
            return torch.zeros(groups.shape[1], dtype=torch.float64, device=self.mesh.device)
        return (losses.double().sum(1)[:, None] * groups.to(losses.device)).sum(0)

    def loaded(self) -> None:
        """Bring what computes in line with `saved`, which a checkpoint has just filled. They are the same here."""

    def reshard(self) -> None:
        """Free the weights that forward passes without a backward pass have gathered."""
        for stage in self.stages:
            data_parallel.reshard(stage)

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return the model's inputs: this rank's tokens and targets, and the documents of the whole sequences, which
        attention compares with those of other ranks' keys."""
        context = self.stages[0].axis.context
        inputs = {
            "x": shard_sequence(batch.tokens[:, :-1], 1, context),
            "targets": shard_sequence(batch.tokens[:, 1:], 1, context),
        }
        return inputs if batch.documents is None else {**inputs, "documents": batch.documents}

    @torch.no_grad()  # or autograd would record to_local(), which takes 40 times as long as reading the local tensor
    def gradients(self) -> list[Tensor]:
        """Return this rank's parts of the gradients, in the order of `trained`; a pipeline stage may have none."""
        return [local(weight.grad) for weight in self.trained.values()]  # type: ignore[arg-type]

    @torch.no_grad()
    def measure(
        self,
        loss: Tensor,
        grads: list[Tensor],
        batch: int,
        scale: float = 1.0,
        stop_requested: bool = False,
        wrong_samples: bool = False,
    ) -> Measurement:
        """Reduce loss, squared gradient norms, probes and flags of one step over all ranks, and bring them to the host,
        unscaled. Waits for the device, once.

        loss, grads, flags: this rank's parts; batch: sequences of the global batch; scale: of the gradients.
        """
        measured = [
            loss[None],
            loss.new_tensor([stop_requested, wrong_samples]),
            *(probe.grad.view(-1) for probe in self.probes.values()),  # type: ignore[union-attr]
        ]
        if grads:
            measured.append(torch.stack(torch._foreach_norm(grads, 2, torch.float64)).square().to(loss.device))
        values = torch.zeros(self.num_slots, dtype=torch.float64, device=loss.device)
        values[self.slots] = torch.cat(measured) * self.contributes
        dist.all_reduce(values)
        numbers = iter(values.tolist())  # in the order of the slots
        loss_value, stop_count, wrong_count = islice(numbers, 3)
        probed = {name: list(islice(numbers, size)) for name, size in self.model.probes.items()}
        routed = {name: probed.pop(name) for name in self.model.routers}
        # both are quadratic in the gradients, and so in their scale; a router's probe counts, and has none
        examples = {name: square / scale**2 for name, (square,) in probed.items()}
        squares = {name: square / scale**2 for name, square in zip(self.rows, numbers, strict=True)}
        return Measurement(
            loss=loss_value,
            stop_requested=stop_count > 0,
            wrong_samples=wrong_count > 0,
            grad_norm=math.sqrt(sum(squares.values())),  # nan or inf passes through
            # the probes hold sum_b ||g_b / B||^2, since the loss is a mean over the batch
            grad_sq_example={name: batch * square for name, square in examples.items()},
            grad_sq_batch={name: squares[f"{name}.weight"] + squares.get(f"{name}.bias", 0.0) for name in examples},
            load={name: torch.tensor(part[:-1]) for name, part in routed.items()},
            balance_loss={name: part[-1] / batch for name, part in routed.items()},
        )

    def rebalance(self, load: Mapping[str, Tensor]) -> None:
        """Move the routers' biases against this load, measured in a step."""
        if self.routers:
            loads = torch.stack([load[name] for name in self.routers]).to(self.mesh.device)  # one transfer for all
            for router, router_load in zip(self.routers.values(), loads, strict=True):
                router.rebalance(router_load)

    def zero(self) -> None:
        """Drop the gradients, those of the probes too."""
        for parameter in (*self.weights.values(), *self.probes.values()):
            parameter.grad = None


def clip(grads: list[Tensor], norm: float, max_norm: float, scale: float = 1.0) -> None:
    """Unscale the gradients in place, and bring their global norm down to max_norm (0 = any). norm: of the unscaled."""
    factor = (max_norm / norm if max_norm and norm > max_norm else 1.0) / scale
    if factor != 1 and grads:
        torch._foreach_mul_(grads, factor)


@dataclass
class LossScale:
    """The factor on the loss that keeps small gradients from vanishing in float16: halved when one overflows, doubled
    after SCALE_GROWS_AFTER steps without. The trainer updates it for float16 only. (Micikevicius et al., arXiv
    1710.03740, section 3.2; the numbers are torch's GradScaler's.)"""

    value: float = 1.0
    steps: int = 0  # since the last change

    def update(self, finite: bool) -> None:
        """Adjust the scale after a step whose gradients were finite, or not."""
        self.steps += 1
        if not finite:
            self.value, self.steps = self.value / 2, 0
        elif self.steps == SCALE_GROWS_AFTER:
            self.value, self.steps = self.value * 2, 0


def initial_loss_scale(dtype: str) -> LossScale:
    """Return the loss scale that a run of train.dtype begins with."""
    return LossScale(FIRST_SCALE if dtype == "float16" else 1.0)
