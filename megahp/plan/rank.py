"""The sizes that one rank's work and memory follow from, and what other training stacks do differently from megahp."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from megahp.config import Config, longest
from megahp.parallel.layout import AXES, Layout
from megahp.parallel.stages import stage_blocks, stages_of
from megahp.plan.work import first_step, on_gpus

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}


@dataclass(frozen=True)
class Stack:
    """What a training stack does in a step beside the products; the defaults are megahp's own."""

    states: Literal["fsdp2", "fsdp", "megatron"] = "fsdp2"  # how weights, gradients and moments are spread over ranks
    elementwise: Literal["eager", "fused", "compiled"] = "eager"  # compiled: fewer tensors are kept, too
    fused_attention: bool = True  # False: the matrix of scores is made in memory, and kept for the backward pass
    attention: float = 1.0  # speed of its fused attention, relative to FlashAttention 2
    dropout: bool = False  # after attention's softmax and on both branches
    whole_logits: bool = False  # in float32, kept for the backward pass; False: a slice at a time
    gradient_bytes: int = 4  # of an accumulated gradient
    reduced_bytes: int = 4  # of a gradient that is sent
    hides_reduction: bool = True  # gradients are reduced while the last backward pass runs
    calls_per_block: int = 1  # collectives in which a block's gradients are reduced
    hidden_tp: float = 0.0  # share of tensor parallelism's communication that runs beside products
    whole_stream: bool = False  # between pipeline stages every tp rank sends all of the stream
    recomputed: float = 1.0  # share of blocks that compute.recompute applies to
    recomputes_all: bool = False  # a block to its end; False: as far as its backward pass needs, as torch does
    kept_products: float = 1.0  # share of products whose results selective recomputation keeps
    products_dtype: str = ""  # of products in blocks, where it is not the activations': float8


MEGAHP = Stack()


def stack_of(config: Config) -> Stack:
    """Return megahp's own stack under these settings."""
    config = on_gpus(config)
    # compute.compile = "auto" compiles nothing on a GPU (train/auto_settings.py). Attention is as in
    # model/transformer.py: no fused kernel caps logits, and in bfloat16 on a CPU plain products are faster.
    plain = bool(config.model.attention_softcap) or (config.train.device == "cpu" and config.train.dtype == "bfloat16")
    return replace(
        MEGAHP,
        elementwise="compiled" if config.compute.compile is True else "eager",
        fused_attention=not plain,
        products_dtype="" if config.compute.fp8 == "none" else "float8",
    )


class Rank:
    """One rank of a pipeline position in the first step.

    t: tokens of a microbatch on this rank; r: those of them in the residual stream, which sequence parallelism splits;
    e: bytes of a number; count: microbatches.
    """

    def __init__(self, config: Config, layout: Layout, position: int, stack: Stack) -> None:
        config = on_gpus(config)
        self.config, self.layout, self.position, self.stack = config, layout, position, stack
        self.model, self.parallel = config.model, config.parallel
        plan = first_step(config, layout.dp)
        self.count, self.sequences, self.length = plan.num_microbatches(layout.dp), plan.micro_batch, plan.length
        self.t = plan.micro_batch * plan.length // layout.cp
        self.r = self.t // layout.tp if config.parallel.sequence_parallel else self.t
        self.dtype, self.e = config.train.dtype, BYTES[config.train.dtype]
        cuts = stage_blocks(config)
        self.stages = {number: cuts[number] for number in stages_of(position, config.parallel)}
        self.blocks = [block for blocks in self.stages.values() for block in blocks]
        self.is_first, self.is_last = 0 in self.stages, len(cuts) - 1 in self.stages

    def kind(self, block: int) -> tuple[str, bool]:
        """Return what a block's work depends on: how it is recomputed, and whether it is dense. A window is a mask, and
        saves no work."""
        share = self.stack.recomputed / self.config.compute.recompute_every - 1e-9  # or 3 x 1/3 could be above 1
        applies = math.ceil((block + 1) * share) > math.ceil(block * share)
        recompute = self.config.compute.recompute if applies else "none"
        return recompute, block < self.model.layers - self.model.expert_layers

    def likeness(self) -> Hashable:
        """Return what ranks of equal work have in common."""
        return tuple((*map(self.kind, blocks), self.is_first, self.is_last) for blocks in self.stages.values())

    def named(self, *axes: str) -> str:
        """Return the name of the group of ranks along these axes, of which those of one rank are left out."""
        sizes = dict(zip(AXES, self.layout.shape, strict=True))
        return "_".join(axis for axis in axes if sizes[axis] > 1)

    # numbers of a token on this rank

    @property
    def queries(self) -> int:
        return self.model.heads * self.model.head_size // self.layout.tp

    @property
    def keys(self) -> int:
        """Those of all key heads; with fewer heads than tp ranks, of the copy of one."""
        return max(self.model.kv_heads // self.layout.tp, 1) * self.model.head_size

    @property
    def fused(self) -> int:
        """Outputs of the projection to queries, keys and values."""
        return (self.model.heads + 2 * self.model.kv_heads) * self.model.head_size // self.layout.tp

    @property
    def hidden(self) -> int:
        return self.model.mlp_width // self.layout.tp

    @property
    def vocabulary(self) -> int:
        return self.model.padded_vocab // self.layout.tp

    # numbers of weights, whole over the ranks that share them

    @property
    def norm(self) -> int:
        return self.model.width * (2 if self.model.norm == "layernorm" and self.model.bias else 1)

    @property
    def mlp_matrices(self) -> int:
        return 3 if self.model.gated else 2

    @cached_property
    def block_weights(self) -> int:
        """Return those of a block without its experts."""
        model, tp, matrices = self.model, self.layout.tp, self.mlp_matrices
        count = model.width * (self.fused + self.queries) + (4 if model.norm_placement == "both" else 2) * self.norm
        if model.bias or model.qkv_bias:
            count += self.fused
        if model.bias:
            count += 2 * model.width + (matrices - 1) * self.hidden
        if model.qk_norm:
            count += 2 * model.head_size
        if not model.experts:
            return count + matrices * model.width * self.hidden
        shared = matrices * model.shared_experts * model.expert_width // tp
        return count + model.width * (model.experts + shared)

    @cached_property
    def expert_weights(self) -> int:
        """Return those of a block's experts on this rank's part of ep."""
        model = self.model
        return (
            self.mlp_matrices * model.width * model.expert_width // self.layout.tp * (model.experts // self.layout.ep)
        )

    @cached_property
    def outer_weights(self) -> int:
        """Return those outside the blocks."""
        model, table = self.model, self.vocabulary * self.model.width
        count = 0
        if self.is_first:
            count += table + (longest(self.config) * model.width if model.positions == "learned" else 0)
        if self.is_last:
            count += self.norm + (0 if model.tied_embeddings and self.is_first else table)
        return count

    @property
    def weights(self) -> int:
        return len(self.blocks) * (self.block_weights + self.expert_weights) + self.outer_weights

    @property
    def shards(self) -> int:
        """Ranks that share a weight's moments."""
        if self.stack.states != "megatron":
            return self.layout.dp_shard * self.layout.cp
        return self.layout.dp if self.parallel.zero else 1

    @property
    def own_weights(self) -> int:
        """Those whose moments this rank holds; ranks along ep share no experts."""
        experts = len(self.blocks) * self.expert_weights
        return (self.weights - experts + experts * min(self.layout.ep, self.shards)) // self.shards
