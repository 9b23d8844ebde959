"""DeepSpeed as the engine: its ZeRO shards weights, moments and gradients and reduces gradients; batches, norms,
clipping, rates, the update and checkpoints stay ours, so that a run may change engines at a checkpoint.

ZeRO cuts flattened weights into partitions whose ends lie anywhere in a weight, so that a rank's part of one is a
FlatPart. Below fp32 the layers cast weights as they use them, as on replicas, and DeepSpeed, which is told nothing of
it, gathers and reduces fp32.

It has been run with DeepSpeed 0.19 on CPUs alone. What has no public name there is in Zero1And2 and Zero3.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megahp.config import ParallelConfig
from megahp.data.loader import Batch
from megahp.model.build import Model
from megahp.model.transformer import Block
from megahp.ops.engines import deepspeed_on
from megahp.parallel.mesh import Mesh
from megahp.parallel.parameters import FlatPart, like, parameters, probes
from megahp.scaling.batch import StepPlan
from megahp.scaling.parameterization import Table
from megahp.train.engine import Engine
from megahp.train.optimizer import MOMENTS, by_rule, rates

BUCKET = 50_000_000  # entries that are reduced at a time: a buffer of as many is kept


@dataclass(frozen=True)
class Place:
    """Where this rank's part of a weight is: `count` entries of a flat partition, from `start` on, which are those from
    `begin` on of the flattened weight."""

    partition: int
    start: int
    begin: int
    count: int

    def of(self, partitions: Sequence[Tensor]) -> Tensor:
        return partitions[self.partition].detach()[self.start : self.start + self.count]


class Zero(Protocol):
    """What DeepSpeed's optimizer of a stage keeps where."""

    partitions: list[Tensor]  # this rank's flat fp32 master weights; with offload their `grad` lies on the CPU too

    def place(self, weight: nn.Parameter, size: int) -> Place:
        """Return where this rank's part of a weight of `size` entries is."""

    def gradient(self, weight: nn.Parameter, place: Place) -> Tensor:
        """Return this rank's part of the reduced gradient, averaged over the ranks: a view of what the next step uses,
        [place.count]."""

    def refresh(self) -> None:
        """Copy the master weights to those that compute."""


class Zero1And2:
    """The weights of a group, one after the other, are cut into as many equal partitions as there are ranks."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.partitions = optimizer, optimizer.single_partition_of_fp32_groups

    def place(self, weight: Any, size: int) -> Place:
        part = weight._hp_mapping
        if part is None:  # all of it is other ranks'
            return Place(0, 0, 0, 0)
        here, there = part.hp_fragment_address, part.lp_fragment_address
        return Place(part.param_group_index, here.start, there.start, here.numel)

    def gradient(self, weight: Any, place: Place) -> Tensor:
        if not place.count:
            return self.partitions[0].new_empty(0)
        self.optimizer._wait_for_offload_copies()  # offloaded gradients arrive on a CUDA stream of their own
        grad: Tensor = weight._hp_mapping.get_lp_grad_fragment(weight._index_in_param_group)
        return grad.view(-1)

    def refresh(self) -> None:
        self.optimizer.update_lp_params()


class Zero3:
    """Each weight is cut by itself into as many equal parts as there are ranks, the last ones padded."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.partitions = optimizer, optimizer.fp32_partitioned_groups_flat

    def place(self, weight: Any, size: int) -> Place:
        partition, start, padded = self.optimizer.grad_position[self.optimizer.get_param_id(weight)]
        begin = dist.get_rank() * padded
        return Place(partition, start, begin, max(0, min(padded, size - begin)))

    def gradient(self, weight: Any, place: Place) -> Tensor:
        grad, _ = self.optimizer._get_fp32_grad_state_partition(weight, release_swap_buffers=True)
        return grad.view(-1)[: place.count]

    def refresh(self) -> None:
        computing = self.optimizer.fp16_partitioned_groups_flat  # so called in fp32 too
        for compute, master in zip(computing, self.partitions, strict=True):
            compute.copy_(master)


class DeepSpeedEngine(Engine):
    """A model under ZeRO, from batches to this rank's parts of the summed gradients."""

    def __init__(self, model: Model, mesh: Mesh, parallel: ParallelConfig, table: Table) -> None:
        (stage,) = model.stages.values()
        hide_probes(stage)
        self.computing = dict(parameters(stage))
        names, shapes = list(self.computing), {name: weight.shape for name, weight in self.computing.items()}
        self.update = Update(
            {"params": [self.computing[names[index]] for index in indices], "rule": rule}
            for rule, indices in by_rule(names, model.rows, table).items()
        )
        self.deepspeed = initialize(stage, self.update, mesh.device, parallel)
        self.zero_parts: Zero = (Zero3 if parallel.zero_level == 3 else Zero1And2)(self.deepspeed.optimizer)
        self.update.allocate(self.zero_parts.partitions)
        # of the shapes as they were: ZeRO-3 leaves empty weights between their uses
        self.places = {
            name: self.zero_parts.place(weight, shapes[name].numel()) for name, weight in self.computing.items()
        }
        weights = {
            name: FlatPart(shapes[name], place.begin, place.of(self.zero_parts.partitions))
            for name, place in self.places.items()
        }
        super().__init__(model, mesh, parallel, weights)
        self.has_gradients = False  # which DeepSpeed keeps until its next step

    def forward_backward(self, microbatches: Iterable[Batch], count: int, tokens: int, scale: float = 1.0) -> Tensor:
        total = torch.zeros((), device=self.mesh.device, dtype=torch.float64)
        self.has_gradients = True
        for index, batch in enumerate(microbatches):
            # set at each one, since their number changes as the batch grows
            self.deepspeed.set_gradient_accumulation_boundary(index == count - 1)
            loss = self.deepspeed(**self._inputs(batch), loss_weight=scale / tokens).sum() / tokens
            self.deepspeed.backward(loss * scale, scale_wrt_gas=False)
            total += loss.detach()
        return total

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """Return this rank's parts of the gradients, in the order of `trained`, in the memory that DeepSpeed's step
        will read. To be called once for each forward_backward."""
        grads = [self.zero_parts.gradient(self.computing[name], place) for name, place in self.places.items()]
        # DeepSpeed averages over the ranks, and our loss is divided by the tokens of the global batch already. The
        # product is exact where the ranks are a power of two.
        torch._foreach_mul_(grads, float(self.mesh.layout.dp))
        return grads

    @torch.no_grad()
    def loaded(self) -> None:
        self.zero_parts.refresh()

    def zero(self) -> None:
        for probe in self.probes.values():
            probe.grad = None
        if self.has_gradients:  # DeepSpeed drops them in its step alone: one that updates nothing
            self.step(None)

    def step(self, plan: StepPlan | None, updates: int = 0) -> None:
        """Let DeepSpeed update the weights (without a plan: leave them), and gather what computes.

        updates: that have been made, this one included.
        """
        self.update.plan, self.update.updates = plan, updates
        self.deepspeed.step()
        self.has_gradients = False


class Update(torch.optim.Optimizer):
    """AdamW's update of whole partitions, which DeepSpeed calls for one group after the other. The kernel is that of
    our own AdamW; it computes each entry by itself, so that it does not matter how weights are cut."""

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(list(groups), {"lr": 0.0})  # which DeepSpeed's reports ask for
        self.plan: StepPlan | None = None
        self.updates = 0

    def allocate(self, partitions: Iterable[Tensor]) -> None:
        """Make the moments of the partitions, which DeepSpeed has put in the place of the weights."""
        for partition in partitions:
            self.state[partition] = {moment: torch.zeros_like(partition.detach()) for moment in MOMENTS}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if self.plan is None:
            return
        for group in self.param_groups:
            for partition in group["params"]:  # none in groups whose turn it is not
                exp_avg, exp_avg_sq = (self.state[partition][moment] for moment in MOMENTS)
                torch._fused_adamw_(
                    [partition],
                    [partition.grad],
                    [exp_avg],
                    [exp_avg_sq],
                    [],
                    [torch.full((), float(self.updates), device=partition.device)],
                    **rates(group["rule"], self.plan),
                    beta1=self.plan.beta1,
                    beta2=self.plan.beta2,
                    amsgrad=False,
                    maximize=False,
                )


class PartitionedAdamW:
    """The optimizer of a DeepSpeedEngine, as the trainer and checkpoints know one (megahp.train.optimizer)."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.engine, self.updates = engine, 0

    def step(self, grads: Sequence[Tensor], plan: StepPlan) -> None:
        """grads: those of the engine, which DeepSpeed has, and which may have been clipped in place."""
        self.updates += 1
        self.engine.step(plan, self.updates)

    def state(self) -> dict[str, Tensor]:
        engine = self.engine
        moments: Mapping[str, list[Tensor]] = {
            moment: [engine.update.state[partition][moment] for partition in engine.zero_parts.partitions]
            for moment in MOMENTS
        }
        return {
            f"{moment}.{name}": like(engine.weights[name], place.of(partitions))
            for moment, partitions in moments.items()
            for name, place in engine.places.items()
        }


def hide_probes(model: nn.Module) -> None:
    """Make the probes plain attributes of their modules: DeepSpeed would take them for weights, and shard and average
    what is each rank's own measurement."""
    for name, probe in probes(model).items():
        module = model.get_submodule(name)
        del module._parameters["probe"]
        module.__dict__["probe"] = probe


def initialize(model: nn.Module, update: Update, device: torch.device, parallel: ParallelConfig) -> Any:
    """Return DeepSpeed's engine over a model, which it shards over all ranks, in place. Raises UserError."""
    package = deepspeed_on(device)
    stage, offload = parallel.zero_level, parallel.offload
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": 0,  # it would keep whole copies of small weights beside their parts
        "memory_efficient_linear": False,  # it would replace torch's own linear
        "compute_grad_norm": stage == 3 or offload,  # it cannot be left out there, though we have measured the norm
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    config = {
        "train_micro_batch_size_per_gpu": 1,  # neither this nor the next is used: we say where a step ends
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # by default it would clip, and by the norm of its own
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # whose C++ is compiled when a run starts; torch's fused one serves
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
    }
    if stage == 3:  # a block's weights are gathered together, as by FSDP2, and outside of what recomputes it
        package.utils.set_z3_leaf_modules(model, [Block])
    engine, *_ = package.initialize(model=model, optimizer=update, config=config, dist_init_required=False)
    return engine
