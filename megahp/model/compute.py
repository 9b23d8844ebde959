"""How blocks are computed: compiled, with activations computed again in the backward pass, by other engines.

Nothing of it but float8 changes what they compute, and since it stays inside a block's forward pass, hooks, names and
shards are as they were.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megahp.config import ComputeConfig
from megahp.model.norm import LayerNorm, RMSNorm
from megahp.ops.engines import linear_of, norm_of
from megahp.parallel.parameters import storage
from megahp.parallel.tensor import ColumnParallelLinear, RowParallelLinear
from megahp.scaling.parameterization import Role

aten = torch.ops.aten
# What selective recomputation keeps: the operations that cost most for a byte of their result.
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._efficient_attention_forward.default,
}

# FSDP2's marks for the profiler: experts, a unit inside a block, make more of them when they are computed again.
SAC_IGNORED_OPS.add(torch.ops.profiler._record_function_enter_new.default)
SAC_IGNORED_OPS.add(torch.ops.profiler._record_function_exit._RecordFunction)


def arrange(blocks: nn.ModuleDict, compute: ComputeConfig) -> None:
    """Set every block's `compute` as the settings say. The blocks stand under their numbers in the whole model."""
    block: Any
    for number, block in blocks.items():
        recompute = compute.recompute if int(number) % compute.recompute_every == 0 else "none"
        if recompute == "selective":  # inside, where the compiler can keep what is to be kept
            block.compute = recomputed(block.compute, context_fn=partial(create_selective_checkpoint_contexts, _keep))
        if compute.compile:
            block.compute = torch.compile(block.compute)
        if recompute == "full":  # outside: torch 2.13 cannot compile it where weights are DTensors
            block.compute = recomputed(block.compute)


def replace_norms(model: nn.Module, engine: str) -> None:
    """Let another engine compute the norms of a model that measures nothing. Raises UserError."""
    for module in model.modules():
        if isinstance(module, RMSNorm | LayerNorm):
            module.engine = norm_of(engine, "rmsnorm" if isinstance(module, RMSNorm) else "layernorm")


def replace_products(model: nn.Module, engine: str, device: torch.device) -> None:
    """Let an engine multiply by the hidden matrices in float8: not by embedding or unembedding. The model's weights are
    this tp rank's parts, on any device; it will compute on this one. Raises UserError."""
    linear = cache(partial(linear_of, engine, device))  # one for all blocks, or each would be compiled anew
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and module.rows["weight"].role is Role.HIDDEN:
            module.linear = linear(*storage(module.weight).shape)


def recomputed(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """The function, keeping for its backward pass nothing but its inputs, and what `context_fn` says if there is one.

    (Selective recomputation of Korthikanti et al., arXiv 2205.05198, keeps all but the attention scores, which fused
    attention does not make; ours keeps `KEPT`.)
    """
    # nothing in a block is random, so there is no random state to restore
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False, **options)


def _keep(_context: object, operation: object, *_: object, **__: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
