"""Data parallelism: FSDP2 over blocks, summing gradients, never averaging."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megahp.parallel.mesh import Mesh
from megahp.parallel.parameters import probes


def shard(model: nn.Module, blocks: nn.ModuleList, mesh: Mesh, compute: torch.dtype, master: torch.dtype) -> None:
    """Shard the parameters over the data- and context-parallel ranks: one unit a block, one for the rest. Where
    there is one such rank nothing is done.

    Weights are gathered in the compute type and gradients reduced in the master type. Probes are scalars and cannot
    be sharded; they stay out of it.
    """
    if mesh.layout.dp * mesh.layout.cp == 1:
        return
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=master, cast_forward_inputs=False)
    ignored = set(probes(model).values())
    for unit in (*blocks, model):
        fully_shard(unit, mesh=mesh.fsdp(), mp_policy=policy, ignored_params=ignored)
    for unit in _units(model):
        # the loss is divided by the global batch already; on gloo the factor alone would still average
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def reduce_after(model: nn.Module, last: bool) -> None:
    """Communicate gradients after the next backward pass only if it is the step's last one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
