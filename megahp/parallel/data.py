"""Data parallelism: FSDP2 over blocks, summing gradients, never averaging."""

from collections.abc import Collection
from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from megahp.config import ParallelConfig
from megahp.parallel.mesh import EXPERT_SHARDS, Mesh
from megahp.parallel.parameters import probes, storage


def shard(
    model: nn.Module,
    blocks: Collection[nn.Module],
    mesh: Mesh,
    parallel: ParallelConfig,
    compute: torch.dtype,
    master: torch.dtype,
) -> None:
    """Shard the parameters over the data- and context-parallel ranks: one unit a block, one for the rest, and one for
    a block's experts, of which other such ranks hold the same. Where there is one such rank nothing is done.

    Weights are gathered in the compute type and gradients reduced in the master type. Probes are scalars and cannot
    be sharded; they stay out of it.
    """
    if mesh.layout.dp * mesh.layout.cp == 1:
        return
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=master, cast_forward_inputs=False)
    ignored = set(probes(model).values())
    # a zero-bubble schedule finds no gradients of weights that were gathered twice for one microbatch
    sharded = partial(fully_shard, mp_policy=policy, reshard_after_forward=parallel.zero_level == 3)
    of_experts, of_rest = mesh.fsdp(EXPERT_SHARDS), mesh.fsdp()
    for experts in _experts(model):
        sharded(experts, mesh=of_experts, shard_placement_fn=partial(_even, of_experts.shape[-1]))
    for module in (*blocks, model):
        sharded(module, mesh=of_rest, ignored_params=ignored)
    units = _units(model)
    for unit in units:
        # the loss is divided by the global batch already; on gloo the factor alone would still average
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    _prefetch([block for block in units if block in blocks], parallel.prefetch)


def prepare_pass(model: nn.Module, last: bool, parallel: ParallelConfig) -> None:
    """Prepare the next forward and backward pass, the step's last one or not: whether gradients are communicated
    after it, and whether the gathered weights are kept."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or parallel.reduce == "every")
        model.set_reshard_after_backward(last or parallel.zero_level > 1)


def reshard(model: nn.Module) -> None:
    """Let go of whatever weights are gathered."""
    for unit in _units(model):
        unit.reshard()


def _prefetch(units: list[FSDPModule], count: int) -> None:
    """Gather so many blocks ahead of the one that computes; FSDP2 itself takes one when its turn is certain."""
    for index, unit in enumerate(units if count else []):
        unit.set_modules_to_forward_prefetch(units[index + 1 : index + 1 + count])
        unit.set_modules_to_backward_prefetch(units[max(0, index - count) : index][::-1])


def _experts(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if any(row.experts for row in getattr(module, "rows", {}).values())]


def _even(shards: int, weight: nn.Parameter) -> Shard:
    """The first dimension that the shards divide, since there may be fewer experts than shards."""
    return Shard(next((dim for dim, size in enumerate(storage(weight).shape) if size % shards == 0), 0))


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
