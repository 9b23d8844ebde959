"""The sizes that one rank's work and memory follow from, and what other training stacks do differently from megahp."""

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
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
        # whether FSDP keeps whole gradients from one microbatch to the next
        self.accumulates = self.count > 1 and self.parallel.reduce == "once"
        self.t = plan.micro_batch * plan.length // layout.cp
        self.r = self.t // layout.tp if config.parallel.sequence_parallel else self.t
        self.dtype, self.e = config.train.dtype, BYTES[config.train.dtype]
        cuts = stage_blocks(config)
        self.stages = {number: cuts[number] for number in stages_of(position, config.parallel)}
        self.blocks = [block for blocks in self.stages.values() for block in blocks]
        self.is_first, self.is_last = 0 in self.stages, len(cuts) - 1 in self.stages
        # numbers of a token on this rank
        model, tp = self.model, layout.tp
        self.queries = model.heads * model.head_size // tp
        self.keys = max(model.kv_heads // tp, 1) * model.head_size  # with fewer heads than tp ranks, a copy of one
        self.fused = (model.heads + 2 * model.kv_heads) * model.head_size // tp  # queries, keys and values
        self.hidden, self.vocabulary = model.mlp_width // tp, model.padded_vocab // tp
        self._count_weights()

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

    def _count_weights(self) -> None:
        """Count weights, whole over the ranks that share them: of a block without its experts, of a block's
        experts on this rank's part of ep, outside the blocks, and all; and those whose moments this rank holds, of all
        and of those outside."""
        model, parallel, layout = self.model, self.parallel, self.layout
        matrices = 3 if model.gated else 2
        norm = model.width * (2 if model.norm == "layernorm" and model.bias else 1)
        block = model.width * (self.fused + self.queries) + (4 if model.norm_placement == "both" else 2) * norm
        if model.bias or model.qkv_bias:
            block += self.fused
        if model.bias:
            block += 2 * model.width + (matrices - 1) * self.hidden
        if model.qk_norm:
            block += 2 * model.head_size
        if model.experts:
            block += model.width * (model.experts + matrices * model.shared_experts * model.expert_width // layout.tp)
        else:
            block += matrices * model.width * self.hidden
        self.block_weights = block
        of_expert = matrices * model.width * model.expert_width // layout.tp
        self.expert_weights = of_expert * (model.experts // layout.ep)
        table, outer = self.vocabulary * model.width, 0
        if self.is_first:
            outer += table + (longest(self.config) * model.width if model.positions == "learned" else 0)
        if self.is_last:
            outer += norm + (0 if model.tied_embeddings and self.is_first else table)
        self.outer_weights = outer
        experts = len(self.blocks) * self.expert_weights
        self.weights = len(self.blocks) * self.block_weights + experts + outer
        shards = layout.dp_shard * layout.cp  # ranks that share a weight's moments
        if self.stack.states == "megatron":
            shards = layout.dp if parallel.zero else 1
        # ranks along ep share no experts
        self.own_weights = (self.weights - experts + experts * min(layout.ep, shards)) // shards
        self.own_outer_weights = outer // shards
