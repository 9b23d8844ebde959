"""Data parallelism over shards: FSDP2 over blocks, summing gradients, never averaging."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn

from megahp.config import ParallelConfig
from megahp.parallel.layout import EXPERT_SHARDS
from megahp.parallel.mesh import Mesh
from megahp.parallel.parameters import probes, storage

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Shard


def shard(
    model: nn.Module,
    blocks: Collection[nn.Module],
    mesh: Mesh,
    parallel: ParallelConfig,
    compute: torch.dtype,
    master: torch.dtype,
) -> None:
    """Shard the parameters over the ranks of dp_shard and cp. Do nothing where there is one such rank: replicas without
    shards sum their gradients once a step (parameters.sum_gradients), at no cost to a block's passes.

    FSDP2 gathers and reduces unit by unit: a block's experts, the rest of a block, and what is outside the blocks.
    Weights are gathered in the compute dtype, gradients reduced in the master dtype.
    """
    if not mesh.layout.is_sharded:
        return
    # here: with what torch's FSDP2 imports it takes a second, which a rank alone need not wait
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=master, cast_forward_inputs=False)
    # Pipelines do not reshard after forward (zero_level is then 1): under zero-bubble schedules, weights gathered twice
    # for a microbatch would get no gradients, silently.
    shard_unit = partial(fully_shard, mp_policy=policy, reshard_after_forward=parallel.zero_level == 3)
    expert_mesh, rest_mesh = mesh.fsdp(EXPERT_SHARDS), mesh.fsdp()
    shards = expert_mesh.shape[-1]

    def divisible(weight: nn.Parameter) -> Shard:
        """Return the first dimension that the shards divide, as a placement: experts may be fewer than shards."""
        return Shard(next((dim for dim, size in enumerate(storage(weight).shape) if size % shards == 0), 0))

    # Inside out: a module takes the parameters that no module inside it has taken. Experts come first because the ranks
    # along ep hold different ones, so their shards and their sums leave that axis out.
    for module in model.modules():
        if any(row.experts for row in getattr(module, "rows", {}).values()):
            shard_unit(module, mesh=expert_mesh, shard_placement_fn=divisible)
    ignored = set(probes(model).values())  # scalars, which FSDP2 cannot shard
    for module in (*blocks, model):
        shard_unit(module, mesh=rest_mesh, ignored_params=ignored)
    for unit in fsdp_units(model):
        # A sum, since the loss is divided by the tokens of the global batch already. Both calls are needed: on gloo a
        # factor of 1 alone would still average.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    if count := parallel.prefetch:
        # without this FSDP2 gathers one block ahead, and only once it is certain to be next
        sharded = [unit for unit in fsdp_units(model) if unit in blocks]
        for index, unit in enumerate(sharded):
            unit.set_modules_to_forward_prefetch(sharded[index + 1 : index + 1 + count])
            unit.set_modules_to_backward_prefetch(sharded[max(0, index - count) : index][::-1])


def prepare_pass(model: nn.Module, is_last: bool, parallel: ParallelConfig) -> None:
    """Decide, before one microbatch's forward and backward pass, whether its gradients are reduced and its weights
    resharded afterwards. is_last: it is the step's last microbatch.

    Gradients add up on every rank and are reduced once a step, unless parallel.reduce = "every". ZeRO-1 gathers weights
    once a step, so it keeps them until the last backward pass.
    """
    if _is_unit(model):
        model.set_requires_gradient_sync(is_last or parallel.reduce == "every")
        model.set_reshard_after_backward(is_last or parallel.zero_level > 1)


def unshard(model: nn.Module) -> None:
    """Gather the weights outside the blocks, until `reshard`."""
    if _is_unit(model):
        model.unshard()


def reshard(model: nn.Module) -> None:
    """Free the gathered weights."""
    for unit in fsdp_units(model):
        unit.reshard()


def fsdp_units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if _is_unit(module)]


def _is_unit(module: nn.Module) -> TypeGuard[FSDPModule]:
    return hasattr(module, "set_requires_gradient_sync")  # not isinstance, which would import FSDP2
