"""How blocks are computed: compiled, with activations recomputed in the backward pass, by other engines.

Float8, simulated FP4 and quantized weights alone change what they compute. All of it stays inside a block's forward
pass, so that hooks, names and shards are as they were.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import SAC_IGNORED_OPS, checkpoint, create_selective_checkpoint_contexts

from megahp.config import ComputeConfig, ModelConfig
from megahp.model.moe import MoE
from megahp.model.norm import LayerNorm, RMSNorm
from megahp.ops.engines import linear_of, norm_of
from megahp.ops.fp4 import fp4_linear
from megahp.ops.quantize import BITS, quantized_linear
from megahp.parallel.parameters import storage
from megahp.parallel.tensor import ColumnParallelLinear, RowParallelLinear
from megahp.scaling.parameterization import Role

aten = torch.ops.aten
# What selective recomputation saves: the results that take most time to compute for a byte of memory.
SAVED = [
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_mm.default,
    aten._grouped_mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._efficient_attention_forward.default,
]


def apply_recompute_and_compile(blocks: nn.ModuleDict, compute: ComputeConfig) -> None:
    """Wrap every block's `compute`. Blocks are listed by their numbers in the whole model, so that a pipeline stage
    recomputes the same ones as the whole model would.

    (Selective recomputation of Korthikanti et al., arXiv 2205.05198, saves all but the attention scores, which fused
    attention never makes; ours saves `SAVED`.)
    """

    def recomputed(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
        # nothing in a block is random, so there is no random state to restore
        return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False, **options)

    if compute.recompute == "selective":
        # FSDP2's profiler marks: experts, a unit inside a block, emit more of them in the recomputation than in the
        # forward pass, which torch would take for another computation
        profiler = torch.ops.profiler
        SAC_IGNORED_OPS.update(
            (profiler._record_function_enter_new.default, profiler._record_function_exit._RecordFunction)
        )
    block: Any
    for number, block in blocks.items():
        recompute = compute.recompute if int(number) % compute.recompute_every == 0 else "none"
        if recompute == "selective":  # inside the compiler, which then sees what is to be saved
            block.compute = recomputed(block.compute, context_fn=partial(create_selective_checkpoint_contexts, SAVED))
        if compute.compile is True:  # not AUTO, which only a run's start decides (train/auto_settings.py)
            # For each shape anew: code for any shape gives gradients of NaN in bfloat16 on CPUs (torch 2.13). Only
            # experts, whose numbers of tokens change at every step, need it.
            block.compute = torch.compile(block.compute, dynamic=None if isinstance(block.mlp, MoE) else False)
        if recompute == "full":  # outside: torch 2.13 cannot compile it where weights are DTensors
            block.compute = recomputed(block.compute)


def replace_norms(model: nn.Module, engine: str) -> None:
    """Compute the norms of a model without probes by another engine. Raises UserError."""
    for module in model.modules():
        if isinstance(module, RMSNorm | LayerNorm):
            module.engine = norm_of(engine, "rmsnorm" if isinstance(module, RMSNorm) else "layernorm")


def hidden_products(model: nn.Module) -> Iterator[ColumnParallelLinear | RowParallelLinear]:
    """Yield the layers that multiply by hidden matrices: not embedding, unembedding, router and experts."""
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and module.rows["weight"].role is Role.HIDDEN:
            yield module


def quantize_products(model: nn.Module, config: ModelConfig) -> None:
    """Multiply by hidden matrices as they are when quantized."""
    linear = quantized_linear(BITS[config.quantize], config.quantize_group)
    for module in hidden_products(model):
        module.linear = linear


def simulate_fp4(model: nn.Module, compute: ComputeConfig, seed: int, device: torch.device) -> None:
    """Multiply by the hidden matrices as in 4-bit formats."""
    linear = fp4_linear(compute, seed, device)
    for module in hidden_products(model):
        module.linear = linear


def replace_products(model: nn.Module, engine: str, device: torch.device) -> None:
    """Multiply by the hidden matrices in float8. Raises UserError.

    The model's weights are this tp rank's parts, on any device; it will compute on the one given.
    """
    linear = cache(partial(linear_of, engine, device))  # one for all blocks: each would be compiled anew
    for module in hidden_products(model):
        module.linear = linear(*storage(module.weight).shape)
