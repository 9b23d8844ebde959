"""Data parallelism: FSDP2 over blocks, summing gradients, never averaging."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from megahp.parallel.mesh import EXPERT_SHARDS, Mesh
from megahp.parallel.parameters import probes, storage


def shard(model: nn.Module, blocks: nn.ModuleList, mesh: Mesh, compute: torch.dtype, master: torch.dtype) -> None:
    """Shard the parameters over the data- and context-parallel ranks: one unit a block, one for the rest, and one for
    a block's experts, of which other such ranks hold the same. Where there is one such rank nothing is done.

    Weights are gathered in the compute type and gradients reduced in the master type. Probes are scalars and cannot
    be sharded; they stay out of it.
    """
    if mesh.layout.dp * mesh.layout.cp == 1:
        return
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=master, cast_forward_inputs=False)
    ignored = set(probes(model).values())
    for experts in _experts(model):
        fully_shard(experts, mesh=mesh.fsdp(EXPERT_SHARDS), mp_policy=policy, shard_placement_fn=partial(_even, mesh))
    for unit in (*blocks, model):
        fully_shard(unit, mesh=mesh.fsdp(), mp_policy=policy, ignored_params=ignored)
    for unit in _units(model):
        # the loss is divided by the global batch already; on gloo the factor alone would still average
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def reduce_after(model: nn.Module, last: bool) -> None:
    """Communicate gradients after the next backward pass only if it is the step's last one."""
    for unit in _units(model)[:1]:
        unit.set_requires_gradient_sync(last)


def _experts(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if any(row.experts for row in getattr(module, "rows", {}).values())]


def _even(mesh: Mesh, weight: nn.Parameter) -> Shard:
    """The first dimension that the shards divide, since there may be fewer experts than shards."""
    shards = mesh.fsdp(EXPERT_SHARDS).shape[-1]
    return Shard(next((dim for dim, size in enumerate(storage(weight).shape) if size % shards == 0), 0))


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
