"""Count by formulas what trace.py finds by tracing: the work of one rank's step, in milliseconds.

Of megahp's own step the products, and the bytes of collectives, are those of a trace exactly, and peak memory is within
a tenth (tests/plan/test_formulas.py). `Stack` says what other training stacks do differently, so that their published
measurements can be predicted by the same formulas.

Bytes of operations bound by memory are counted in passes over a tensor, one read or one write each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megahp.config import Config, longest
from megahp.parallel.layout import Layout, fit
from megahp.parallel.logits import KEPT, rows_at_once
from megahp.parallel.stages import stage_blocks, stages_of
from megahp.plan.schedules import rank_actions, steady
from megahp.plan.work import Collective, Kernel, Phase, Work, first_step

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}


@dataclass(frozen=True)
class Stack:
    """What a training stack does in a step beside the products; the defaults are megahp's own."""

    states: Literal["fsdp2", "fsdp", "megatron"] = "fsdp2"  # where weights, gradients and moments lie, and how gathered
    fused_attention: bool = True  # False: the matrix of scores is made in memory, and kept for the backward pass
    compiled: bool = False  # elementwise operations are fused into few passes
    dropout: bool = False  # after attention's softmax and on both branches
    whole_logits: bool = False  # kept in float32 for the backward pass; False: a slice at a time
    gradient_bytes: int = 4  # of an accumulated gradient
    reduced_bytes: int = 4  # of a gradient that is sent
    hides_reduction: bool = True  # gradients are reduced while the last backward pass runs
    attention: float = 1.0  # speed of its attention kernel relative to FlashAttention 2, by head size 128
    hidden_tp: float = 0.0  # share of tensor parallelism's communication that runs beside products
    recomputes_all: bool = (
        False  # a recomputed block to its end; False: as far as its backward pass needs, as torch does
    )
    recomputed: float = 1.0  # share of blocks that compute.recompute applies to
    kept_products: float = 1.0  # share of products whose results selective recomputation keeps
    calls_per_block: int = 1  # collectives that a block's weights are gathered by, and its gradients reduced by
    products_dtype: str = ""  # of products in blocks, where it is not the activations': float8


MEGAHP = Stack()


def rank_works(config: Config, ranks: int, stack: Stack = MEGAHP) -> list[Work]:
    """Return the work of a rank of each pipeline position in the first step. Of ranks with blocks alike that of the
    first is returned for all: it holds the activations of most microbatches."""
    layout = fit(config.parallel, ranks)
    found: dict[Hashable, Work] = {}
    works = []
    for rank in range(layout.pp):
        step = _Step(config, layout, rank, stack)
        key = step.likeness()
        if key not in found:
            found[key] = step.work()
        works.append(found[key])
    return works


class _Step:
    """Collects the work of one rank. Sizes: t tokens of a microbatch, r of them in the residual stream, e bytes of a
    number."""

    def __init__(self, config: Config, layout: Layout, rank: int, stack: Stack) -> None:
        self.config, self.layout, self.stack, self.rank = config, layout, stack, rank
        self.model, self.parallel = config.model, config.parallel
        plan = first_step(config, layout.dp)
        self.count = plan.num_microbatches(layout.dp)
        self.sequences, self.length = plan.micro_batch, plan.length
        self.t = plan.micro_batch * plan.length // layout.cp
        self.r = self.t // layout.tp if config.parallel.sequence_parallel else self.t
        self.dtype, self.e = config.train.dtype, BYTES[config.train.dtype]
        self.kernels: Counter[Kernel] = Counter()
        self.collectives: Counter[Collective] = Counter()
        cuts = stage_blocks(config)
        self.stages = {number: cuts[number] for number in stages_of(rank, config.parallel)}
        self.blocks = sum(map(len, self.stages.values()))
        self.is_first, self.is_last = 0 in self.stages, len(cuts) - 1 in self.stages

    def likeness(self) -> Hashable:
        """Return what ranks of equal work have in common."""
        return tuple((*map(self.kind, blocks), self.is_first, self.is_last) for blocks in self.stages.values())

    def work(self) -> Work:
        self._blocks()
        if self.is_first:
            self._embedding()
        if self.is_last:
            self._loss()
        self._pipeline()
        self._states()
        peak = self._peak()
        return Work(self.kernels, self.collectives, peak, int(peak["weights"]))

    # ---- what a kernel or a collective is

    def product(self, phase: Phase, m: int, n: int, k: int, count: float, batch: int = 1, dtype: str = "") -> None:
        dtype = dtype or self.dtype
        size = BYTES[dtype] * batch * (m * k + k * n) + self.e * batch * m * n
        kernel = Kernel(
            "mm" if batch == 1 else "bmm", "product", (batch, m, n, k), dtype, 2 * batch * m * n * k, size, phase
        )
        self.kernels[kernel] += int(count)

    def linear(self, outputs: int, inputs: int, again: float, rows: int, count: int, dtype: str = "") -> None:
        """Count a linear layer of these rows: forward, `again` in the backward pass, gradients of input and weight."""
        self.product("forward", rows, outputs, inputs, count, dtype=dtype)
        if again:
            self.product("backward", rows, outputs, inputs, again * count, dtype=dtype)
        self.product("backward", rows, inputs, outputs, count, dtype=dtype)
        self.product("backward", outputs, inputs, rows, count, dtype=dtype)

    def memory(self, phase: Phase, name: str, size: float, count: float = 1, calls: int = 1) -> None:
        """Count `calls` kernels that read and write this many bytes together."""
        self.kernels[Kernel(name, "memory", (), self.dtype, 0, int(size / calls), phase)] += int(count * calls)

    def send(self, phase: Phase, name: str, axes: str, size: int, bytes: float, count: int = 1) -> None:
        if size > 1 and count:
            self.collectives[Collective(name, axes, size, int(bytes), phase)] += count

    # ---- the parts of a step

    def _blocks(self) -> None:
        """Count the blocks, those that are alike at once."""
        for kind, alike in Counter(self.kind(n) for blocks in self.stages.values() for n in blocks).items():
            self._block(*kind, alike * self.count)

    def kind(self, block: int) -> tuple[str, bool, int]:
        """Return how a block is recomputed, whether it is dense, and its attention's window: what its work depends on."""
        share = self.stack.recomputed / self.config.compute.recompute_every
        applies = math.ceil((block + 1) * share) > math.ceil(block * share)
        chosen = self.config.compute.recompute if applies else "none"
        return chosen, block < self.model.layers - self.model.expert_layers, self.model.window_of(block)

    def _block(self, recompute: str, dense: bool, window: int, count: int) -> None:
        """Count the microbatches of blocks of one kind; count: of both together."""
        model, tp, e, t, r = self.model, self.layout.tp, self.e, self.t, self.r
        d, hidden = model.width, model.mlp_width // tp
        products = {"full": 1.0, "selective": 1 - self.stack.kept_products}.get(recompute, 0.0)
        fp8 = self.stack.products_dtype
        queries, keys = model.heads * model.head_size // tp, max(model.kv_heads // tp, 1) * model.head_size
        fused = (model.heads + 2 * model.kv_heads) * model.head_size // tp
        self.linear(fused, d, products, t, count, fp8)
        self._attention(queries, recompute, window, count)
        self.linear(d, queries, products, t, count, fp8)
        if dense:
            self._mlp(t, hidden, products, count)
        else:
            self._experts(recompute, count)
        # norms, rotation, activation and sums: (forward, backward) passes over numbers of a token
        lean = self.stack.compiled
        norms = (4, 7) if lean else (6, 10)  # the first reads and writes; the second also the sum of stream and branch
        sums = (1, 2) if lean else (3, 6)
        turned = (2, 2) if lean else (9, 9)
        per_hidden = ((3, 5) if lean else (5, 10)) if model.gated else ((2, 3) if model.bias else (2, 3))
        drop = (2 * 5, 2 * 5) if self.stack.dropout else (0, 0)
        again = recompute != "none"
        for phase, which in (("forward", 0), ("backward", 1)):
            stream = (norms[which] + sums[which] + drop[which]) * d * r
            heads = (turned[which] if model.positions == "rope" else 0) * (queries + keys) * t + 2 * queries * t
            size = e * (stream + heads + (per_hidden[which] * hidden * t if dense else 0))
            self.memory(phase, "elementwise", size, count, 8 if lean else 24)  # type: ignore[arg-type]
            if which == 0 and again:
                self.memory("backward", "elementwise", size, count, 8 if lean else 24)
        self._tensor_parallel(recompute, count)

    def _mlp(self, rows: int, hidden: int, again: float, count: int) -> None:
        d, fp8 = self.model.width, self.stack.products_dtype
        for _ in range(2 if self.model.gated else 1):
            self.linear(hidden, d, again, rows, count, fp8)
        self.linear(d, hidden, again if self.stack.recomputes_all else 0, rows, count, fp8)

    def _experts(self, recompute: str, count: int) -> None:
        """Count router, experts under equal load, and the exchange of tokens over ep."""
        model, layout, e, t = self.model, self.layout, self.e, self.t
        again, ep = float(recompute == "full"), layout.ep
        self.linear(model.experts, model.width, again, t, count, "float32")
        hidden, chosen = model.expert_width // layout.tp, t * model.experts_per_token
        mine = max(1, model.experts // ep)
        self._mlp(max(1, chosen // mine), hidden, again, count * mine)
        if model.shared_experts:
            self._mlp(t, model.shared_experts * hidden, again, count)
        passes = (8, 12)
        hiddens = (5, 10) if model.gated else (2, 3)
        for phase, which in (("forward", 0), ("backward", 1)):
            size = e * chosen * (passes[which] * model.width + hiddens[which] * hidden)
            times = 2 if which and recompute != "none" else 1
            self.memory(phase, "experts", size, count * times, 8 * mine)  # type: ignore[arg-type]
            self.send(phase, "all-to-all", "ep", ep, e * chosen * model.width, 2 * count * times)  # type: ignore[arg-type]

    def _attention(self, queries: int, recompute: str, window: int, count: int) -> None:
        """Count attention over all scores: a fused kernel's time leaves the masked half out."""
        model, e, length = self.model, self.e, self.length
        heads, size, local = queries // model.head_size, model.head_size, self.length // self.layout.cp
        cells = self.sequences * heads * local * length
        again = 1 if recompute == "full" else 0
        if self.stack.fused_attention:
            shape = (self.sequences, heads, local, min(length, window or length), size)
            work = math.prod(shape)
            bytes_ = e * self.t * (2 * queries + 2 * model.kv_heads * size // self.layout.tp)
            for phase, products, times in (("forward", 2, 1), ("backward", 2, again), ("backward", 5, 1)):
                name = "attention_backward" if products == 5 else "attention"
                kernel = Kernel(name, "attention", shape, self.dtype, 2 * products * work, bytes_, phase)  # type: ignore[arg-type]
                self.kernels[kernel] += count * times
            return
        batch, redone = self.sequences * heads, int(recompute != "none")  # selective recomputation is of the scores
        scores, mixed = (local, length, size), (local, size, length)
        softmax, dropped = 4 * e / 2, (2.5 * e if self.stack.dropout else 0)
        for phase, times in (("forward", 1), ("backward", redone)):
            self.product(phase, *scores, count * times, batch)  # type: ignore[arg-type]
            self.product(phase, *mixed, count * times, batch)  # type: ignore[arg-type]
            self.memory(phase, "softmax", cells * (softmax + dropped), count * times, 2)  # type: ignore[arg-type]
        for shape in (mixed, mixed, scores, (length, size, local)):
            self.product("backward", *shape, count, batch)
        self.memory("backward", "softmax", cells * (1.5 * softmax + dropped), count, 2)

    def _tensor_parallel(self, recompute: str, count: int) -> None:
        """Count what enters and leaves the two branches of a block."""
        tp, size = self.layout.tp, self.e * self.t * self.model.width
        entered = 2 if recompute == "full" else 0
        left = 1 + self.stack.recomputes_all if recompute == "full" else 0
        if self.parallel.sequence_parallel:
            self.send("forward", "all-gather", "tp", tp, size, 2 * count)
            self.send("forward", "reduce-scatter", "tp", tp, size, 2 * count)
            self.send("backward", "all-gather", "tp", tp, size, (2 + entered) * count)
            self.send("backward", "reduce-scatter", "tp", tp, size, (2 + left) * count)
        else:
            self.send("forward", "all-reduce", "tp", tp, size, 2 * count)
            self.send("backward", "all-reduce", "tp", tp, size, (2 + left) * count)
        cp, keys = self.layout.cp, max(self.model.kv_heads // tp, 1) * self.model.head_size
        gathered = self.e * self.t * cp * 2 * keys
        self.send("forward", "all-gather", "cp", cp, gathered, count)
        self.send("backward", "all-gather", "cp", cp, gathered, count * (recompute == "full"))
        self.send("backward", "reduce-scatter", "cp", cp, gathered, count)

    def _embedding(self) -> None:
        tp, count, size = self.layout.tp, self.count, self.e * self.t * self.model.width
        table = self.model.padded_vocab // tp * self.model.width
        name, adjoint = ("reduce-scatter", "all-gather") if self.parallel.sequence_parallel else ("all-reduce", "")
        self.send("forward", name, "tp", tp, size, count)
        if adjoint:
            self.send("backward", adjoint, "tp", tp, size, count)
        self.memory("forward", "embedding", 3 * size + (6 * table if self.stack.states == "fsdp2" else 0), count, 2)
        # the gradient of the table is made anew for every microbatch, in float32, and added
        self.memory("backward", "embedding", 3 * size + 4 * table * (4 if self.count > 1 else 1), count, 3)

    def _loss(self) -> None:
        tp, t, e, count, model = self.layout.tp, self.t, self.e, self.count, self.model
        vocabulary = model.padded_vocab // tp
        self.memory("forward", "norm", 2 * e * self.r * model.width, count)
        self.memory("backward", "norm", 3 * e * self.r * model.width, count)
        size = e * t * model.width
        name, adjoint = ("all-gather", "reduce-scatter") if self.parallel.sequence_parallel else ("", "all-reduce")
        if name:
            self.send("forward", name, "tp", tp, size, count)
        self.send("backward", adjoint, "tp", tp, size, count)
        self.send("forward", "all-reduce", "tp", tp, 4 * t, count)
        self.send("forward", "all-reduce", "tp", tp, 8 * t, count)
        if self.stack.whole_logits:
            self.linear(vocabulary, model.width, 0, t, count)
            # logits to float32 (e + 4), their softmax (8), its gradient (8), back to half precision (4 + e)
            self.memory("forward", "loss", t * vocabulary * (e + 4 + 12), count, 5)
            self.memory("backward", "loss", t * vocabulary * (8 + 4 + e), count, 3)
            return
        rows = rows_at_once(t, model.width)
        keeps = t * vocabulary * e <= KEPT
        for start in range(0, vocabulary, rows):
            part = min(rows, vocabulary - start)
            self.linear(part, model.width, 0 if keeps else 1, t, count)
            # float32 copy (e + 4), gather, maximum (4), difference and exponential (16), sum (4)
            self.memory("forward", "loss", t * part * (e + 4 + 4 + 16 + 4), count, 6)
            # copy, difference, exponential, scale (24), scatter, half precision (4 + e); x's gradient (12 and e)
            self.memory("backward", "loss", t * part * (e + 4 + 24 + 4 + e) + t * model.width * (12 + 4 + e), count, 8)

    def _pipeline(self) -> None:
        if self.layout.pp == 1:
            return
        size = self.e * self.r * self.model.width
        inner = len(self.stages) * self.count
        forward_out, forward_in = inner - self.is_last * self.count, inner - self.is_first * self.count
        self.send("forward", "send", "pp", self.layout.pp, size, forward_out)
        self.send("forward", "receive", "pp", self.layout.pp, size, forward_in)
        self.send("backward", "send", "pp", self.layout.pp, size, forward_in)
        self.send("backward", "receive", "pp", self.layout.pp, size, forward_out)

    # ---- weights, gradients and moments

    @cached_property
    def _weights(self) -> dict[str, float]:
        """Numbers of weights of this rank, whole over the data-parallel ranks: those of a block, of its experts, and of
        all that is outside the blocks."""
        model, tp = self.model, self.layout.tp
        norm = model.width * (2 if model.norm == "layernorm" and model.bias else 1)
        size = model.head_size
        attention = model.width * (2 * model.heads + 2 * model.kv_heads) * size / tp
        biases = 0.0
        if model.bias or model.qkv_bias:
            biases += (model.heads + 2 * model.kv_heads) * size / tp
        if model.bias:
            biases += 2 * model.width + (2 if model.gated else 1) * model.mlp_width / tp
        matrices = 3 if model.gated else 2
        mlp = matrices * model.width * model.mlp_width / tp
        if model.experts:
            mlp = model.width * model.experts + matrices * model.width * model.shared_experts * model.expert_width / tp
        experts = matrices * model.width * model.expert_width * model.experts / tp / self.layout.ep
        table = model.padded_vocab * model.width / tp
        outside = 0.0
        if self.is_first:
            outside += table + (longest(self.config) * model.width if model.positions == "learned" else 0)
        if self.is_last:
            outside += norm + (table if not (model.tied_embeddings and self.is_first) else 0)
        placed = 4 if model.norm_placement == "both" else 2
        block = attention + biases + mlp + placed * norm + (2 * size if model.qk_norm else 0)
        return {"block": block, "experts": experts if model.experts else 0.0, "outside": outside}

    @property
    def _total(self) -> float:
        weights = self._weights
        return self.blocks * (weights["block"] + weights["experts"]) + weights["outside"]

    def _states(self) -> None:
        """Count gathering, reducing and updating of weights."""
        layout, stack, e = self.layout, self.stack, self.e
        shards, replicas = layout.dp_shard * layout.cp, layout.dp_replicate
        weights = self._weights
        mine = self._total / (shards if self._sharded_moments else 1)
        # gradient norm, then AdamW: weight, gradient and moments read, all but the gradient written
        self.memory("update", "norm", 4 * mine, 1)
        self.memory("update", "update", (16 + 12) * mine, 1, 4)
        if shards * replicas == 1:
            return
        axes = "dp_shard_cp" if layout.cp > 1 else "dp_shard"
        units = {"block": (self.blocks, weights["block"]), "outside": (1, weights["outside"])}
        for count, size in units.values():
            if not count or not size:
                continue
            if stack.states == "megatron":
                self._reduce_once(count * size, count * stack.calls_per_block, axes)
                continue
            zero, count_ = self.parallel.zero_level, self.count
            gathers = {1: (1, 0), 2: (count_, 0), 3: (count_, count_)}[zero]
            self.send("forward", "all-gather", axes, shards, e * size, count * gathers[0])
            self.send("backward", "all-gather", axes, shards, e * size, count * gathers[1])
            copied = (2 if stack.states == "fsdp2" else 0) * e * size + (4 + e) * size / shards
            self.memory("forward", "gather", copied, count * gathers[0], 2)
            self.memory("backward", "gather", copied, count * gathers[1], 2)
            reductions = count_ if self.parallel.reduce == "every" else 1
            if shards > 1:
                self.send("backward", "reduce-scatter", axes, shards, stack.reduced_bytes * size, count * reductions)
            self.send(
                "backward",
                "all-reduce",
                "dp_replicate",
                replicas,
                stack.reduced_bytes * size / shards,
                count * reductions,
            )
            self.memory("backward", "reduce", 2 * stack.reduced_bytes * size, count * reductions, 1)
            if count_ > 1:  # accumulated: made in half precision, made wide, added
                self.memory(
                    "backward", "accumulate", (2 * e + 4 + 3 * stack.gradient_bytes) * size, count * (count_ - 1), 2
                )

    def _reduce_once(self, size: float, calls: int, axes: str) -> None:
        """Count what Megatron does once a step: gradients summed in buffers, weights gathered after the update."""
        stack, dp = self.stack, self.layout.dp
        phase: Phase = "backward" if stack.hides_reduction else "update"
        if self.parallel.zero >= 1:
            self.send(phase, "reduce-scatter", axes, dp, stack.reduced_bytes * size / calls, calls)
            self.send("update", "all-gather", axes, dp, self.e * size / calls, calls)
        else:
            self.send(phase, "all-reduce", axes, dp, stack.reduced_bytes * size / calls, calls)
        # main gradients: added to in every backward pass
        self.memory("backward", "accumulate", (self.e + 2 * stack.gradient_bytes) * size, self.count, 1)

    @property
    def _sharded_moments(self) -> bool:
        return self.stack.states != "megatron" or self.parallel.zero >= 1

    # ---- memory

    def _peak(self) -> Counter[str]:
        stack, layout, e = self.stack, self.layout, self.e
        shards = layout.dp_shard * layout.cp
        weights, total = self._weights, self._total
        unit = max(weights["block"] + weights["experts"], weights["outside"])
        peak: Counter[str] = Counter()
        if stack.states == "megatron":
            peak["weights"] = int(e * total)
            peak["gradients"] = int(stack.gradient_bytes * total)
            peak["moments"] = int(12 * total / (layout.dp if self._sharded_moments else 1))
        else:
            peak["weights"], peak["moments"] = int(4 * total / shards), int(8 * total / shards)
            whole = self.count > 1 and self.parallel.reduce == "once"
            if layout.dp * layout.cp == 1:
                peak["gradients"] = int(4 * total)
            else:
                peak["gradients"] = int(stack.gradient_bytes * total if whole else 4 * total / shards)
                held = (
                    total
                    if self.parallel.zero_level < 3
                    else weights["outside"] + 2 * (weights["block"] + weights["experts"])
                )
                peak["gathered"] = int(e * min(held, total))
                peak["temporary"] += int((e + stack.reduced_bytes) * unit)
        peak["activations"] = int(self._activations())
        peak["temporary"] += int(self._temporary())
        return peak

    def _in_flight(self) -> dict[int, int]:
        """Return how many microbatches a stage keeps activations of at most, at the moment when all together are most."""
        if self.layout.pp == 1:
            return {stage: 1 for stage in self.stages}
        few, _ = steady(self.parallel, self.count)
        held = dict.fromkeys(self.stages, 0)
        most = dict(held)
        for kind, stage, _ in rank_actions(self.rank, self.parallel, few):
            held[stage] += {"F": 1, "B": -1, "W": -1, "I": 0}[kind]
            if sum(held.values()) > sum(most.values()):
                most = dict(held)
        return most

    def _activations(self) -> float:
        """Return the bytes that the forward passes keep for the backward ones."""
        layers = self._in_flight()
        kept = sum(self._kept_of_block(n) * layers[stage] for stage, blocks in self.stages.items() for n in blocks)
        d, last = self.model.width, max(self.stages)
        if self.is_last:
            kept += (
                2 * self.e * self.r * d
                + (4 if self.stack.whole_logits else 0) * self.t * self.model.padded_vocab / self.layout.tp
            ) * layers[last]
            vocabulary = self.model.padded_vocab // self.layout.tp
            if not self.stack.whole_logits and self.t * vocabulary * self.e <= KEPT:
                kept += self.t * vocabulary * self.e * layers[last]
        return kept

    def _kept_of_block(self, index: int) -> float:
        recompute, *_ = self.kind(index)
        return self.e * (self.r * self.model.width if recompute == "full" else self._tensors(recompute, index))

    def _tensors(self, recompute: str, index: int) -> float:
        """Return the numbers of activations that a block's backward pass reads."""
        model, t, r, tp = self.model, self.t, self.r, self.layout.tp
        queries, keys = model.heads * model.head_size / tp, max(model.kv_heads / tp, 1) * model.head_size
        dense = index < model.layers - model.expert_layers
        hidden, rows = model.mlp_width / tp, t
        if not dense:
            hidden, rows = model.expert_width / tp, t * model.experts_per_token
        lean = self.stack.compiled or recompute == "selective"
        stream = 2 * model.width * r if lean else 4 * model.width * r
        whole = 2 * model.width * t if self.parallel.sequence_parallel else 0  # gathered inputs of both branches
        attention = (2 * queries + 2 * keys) * t + queries * t
        wide = (2 if lean else 4) if model.gated else 2
        scores = 0.0
        if not self.stack.fused_attention and recompute == "none":
            cells = self.sequences * model.heads / tp * self.length * self.length / self.layout.cp
            scores = cells * (2.5 if self.stack.dropout else 1)
        dropped = model.width * r if self.stack.dropout else 0  # two masks of a byte
        return (
            stream
            + whole
            + attention
            + wide * hidden * rows
            + scores
            + dropped
            + (0 if dense else 2 * model.width * rows)
        )

    def _temporary(self) -> float:
        """Return the bytes beside, where most are needed: in the loss, or in the backward pass of one block."""
        model, t, e = self.model, self.t, self.e
        block = 0.0
        if self.config.compute.recompute != "none":
            block = e * self._tensors("none", 0)
        hidden = model.mlp_width / self.layout.tp
        block += e * t * (3 * hidden + 2 * model.width)
        loss = 0.0
        if self.is_last:
            vocabulary = model.padded_vocab / self.layout.tp
            rows = vocabulary if self.stack.whole_logits else min(vocabulary, rows_at_once(t, model.width))
            loss = t * rows * (4 + 2 * e) + 4 * t * model.width
            if not self.stack.whole_logits:
                loss += e * vocabulary * model.width
        return max(block, loss)
