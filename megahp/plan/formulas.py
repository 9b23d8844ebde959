"""Count by formulas what trace.py finds by tracing: the work of one rank's step, in milliseconds.

Of megahp's own step the products, and the bytes of collectives, are those of a trace exactly (tests/plan/
test_formulas.py). `Stack` says what other training stacks do differently, so that their published measurements are
predicted by the same formulas. Operations bound by memory are counted in passes over a tensor, a read or a write each.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

from megahp.config import Config
from megahp.parallel.layout import EXPERT_SHARDS, SHARDS, WITHIN_REPLICA, fit
from megahp.parallel.logits import KEPT, rows_at_once
from megahp.plan.peak import peak
from megahp.plan.rank import BYTES, Rank, Stack, stack_of
from megahp.plan.work import Collective, Kernel, Phase, Work


class Passes(NamedTuple):
    """Passes over the numbers of a token, and the kernels that make them, (forward, backward)."""

    norms: tuple[int, int]  # of width: both norms of a block, the second with the sum of stream and branch
    sums: tuple[int, int]  # of width: the stream and the second branch
    rotation: tuple[int, int]  # of queries and keys
    gated: tuple[int, int]  # of the hidden layer
    plain: tuple[int, int]  # of the hidden layer, without a gate
    kernels: tuple[int, int]


PASSES = {
    "eager": Passes((6, 10), (3, 6), (9, 9), (5, 10), (2, 3), (24, 36)),
    "fused": Passes((4, 7), (1, 2), (2, 2), (3, 5), (2, 3), (8, 8)),
    "compiled": Passes((4, 7), (1, 2), (2, 2), (3, 5), (2, 3), (8, 8)),
}
DROPOUT = 5  # passes over the width of a token in each direction: two branches, and their masks of a byte
ITERATIONS = 5  # of Newton and Schulz, in Muon (train/optimizer.py)
EXPERTS = (8, 12)  # passes over the width of each token sent to an expert: sorting, sending, weighing, adding up


def rank_works(config: Config, ranks: int, stack: Stack | None = None) -> list[Work]:
    """Return the work of a rank of each pipeline position in the first step, by default of megahp. Of ranks with blocks
    alike that of the first is returned for all: it holds the activations of most microbatches."""
    stack = stack or stack_of(config)
    layout = fit(config.parallel, ranks)
    found: dict[Hashable, Work] = {}
    works = []
    for position in range(layout.pp):
        rank = Rank(config, layout, position, stack)
        key = rank.likeness()
        if key not in found:
            found[key] = _Counted(rank).work()
        works.append(found[key])
    return works


class _Counted:
    """Collects the kernels and collectives of one rank's step."""

    def __init__(self, rank: Rank) -> None:
        self.rank, self.stack, self.layout, self.model = rank, rank.stack, rank.layout, rank.model
        self.t, self.r, self.e, self.count = rank.t, rank.r, rank.e, rank.count
        self.tp, self.sequence = rank.layout.tp, rank.parallel.sequence_parallel
        self.passes = PASSES[rank.stack.elementwise]
        self.kernels: Counter[Kernel] = Counter()
        self.collectives: Counter[Collective] = Counter()

    def work(self) -> Work:
        for kind, alike in Counter(map(self.rank.kind, self.rank.blocks)).items():
            self._block(*kind, alike * self.count)
        if self.rank.is_first:
            self._embedding()
        if self.rank.is_last:
            self._loss()
        if self.layout.pp > 1:
            self._pipeline()
        self._states()
        allocated = peak(self.rank)
        return Work(self.kernels, self.collectives, allocated, allocated["weights"])

    def product(self, phase: Phase, m: int, n: int, k: int, count: float, batch: int = 1, dtype: str = "") -> None:
        dtype = dtype or self.rank.dtype
        size = batch * (BYTES[dtype] * (m * k + k * n) + self.e * m * n)
        name = "mm" if batch == 1 else "bmm"
        kernel = Kernel(name, "product", (batch, m, n, k), dtype, 2 * batch * m * n * k, size, phase)
        self.kernels[kernel] += round(count)

    def linear(
        self, outputs: int, inputs: int, rows: int, count: float, again: float = 0, dtype: str = "", backward: int = 1
    ) -> None:
        """Count a linear layer of these rows: forward, and in `backward` passes `again`, and gradients of input and
        weight."""
        self.product("forward", rows, outputs, inputs, count, dtype=dtype)
        if again:
            self.product("backward", rows, outputs, inputs, again * count * backward, dtype=dtype)
        self.product("backward", rows, inputs, outputs, count * backward, dtype=dtype)
        self.product("backward", outputs, inputs, rows, count * backward, dtype=dtype)
        if dtype == "float8":  # largest values, then copies in rows and columns: of input and weight, of the gradient
            passes = 2 * self.e + 2
            self.memory("forward", "quantize", passes * (rows + outputs) * inputs, (1 + again) * count, 4)
            self.memory("backward", "quantize", passes * rows * outputs, count, 2)

    def memory(self, phase: Phase, name: str, size: float, count: float = 1, kernels: int = 1) -> None:
        """Count `count` times so many kernels, which read and write `size` bytes together."""
        if size and count:
            kernel = Kernel(name, "memory", (), self.rank.dtype, 0, int(size / kernels), phase)
            self.kernels[kernel] += round(count * kernels)

    def send(self, phase: Phase, name: str, axes: str, ranks: int, size: float, count: int = 1) -> None:
        if ranks > 1 and count and size:
            self.collectives[Collective(name, axes, ranks, int(size), phase)] += count

    # count: microbatches times blocks of the kind

    def _block(self, recompute: str, dense: bool, count: int) -> None:
        again = {"full": 1.0, "selective": 1 - self.stack.kept_products}.get(recompute, 0.0)
        rank, dtype, width = self.rank, self.stack.products_dtype, self.model.width
        self.linear(rank.fused, width, self.t, count, again, dtype)
        self._attention(recompute, count)
        self.linear(width, rank.queries, self.t, count, again, dtype)
        if dense:
            self._mlp(rank.hidden, self.t, count, again)
        else:
            self._experts(recompute, again, count)
        self._elementwise(recompute, dense, count)
        self._tensor_parallel(recompute, count)
        # context parallelism gathers all keys and values
        cp, size = self.layout.cp, self.e * self.t * self.layout.cp * 2 * rank.keys
        self.send("forward", "all-gather", "cp", cp, size, count)
        self.send("backward", "all-gather", "cp", cp, size, count * (recompute == "full"))
        self.send("backward", "reduce-scatter", "cp", cp, size, count)

    def _mlp(self, hidden: int, rows: int, count: int, again: float) -> None:
        width, dtype = self.model.width, self.stack.products_dtype
        self.linear(hidden, width, rows, count * (2 if self.model.gated else 1), again, dtype)
        self.linear(width, hidden, rows, count, again * self.stack.recomputes_all, dtype)

    def _experts(self, recompute: str, again: float, count: int) -> None:
        """Count router, experts under equal load, and the exchange of tokens over ep."""
        model, rank, ep = self.model, self.rank, self.layout.ep
        hidden, chosen, mine = model.expert_width // self.tp, self.t * model.experts_per_token, model.experts // ep
        self.linear(model.experts, model.width, self.t, count, again, "float32")
        # as many rows as this rank sends, since others send as many
        if rank.dtype == "bfloat16" and not (model.width % 8 or hidden % 8):  # one product of all (model/moe.py)
            self._mlp(hidden, chosen, count, again)
            weights = rank.e * (mine - 1) * (3 if model.gated else 2) * model.width * hidden  # beside one expert's
            self.memory("forward", "experts", weights, count)
            self.memory("backward", "experts", weights, (2 + again) * count)
        else:
            self._mlp(hidden, chosen // mine, count * mine, again)
        if model.shared_experts:
            self._mlp(model.shared_experts * hidden, self.t, count, again)
        activation = self.passes.gated if model.gated else self.passes.plain
        forward = rank.e * chosen * (EXPERTS[0] * model.width + activation[0] * hidden)
        backward = rank.e * chosen * (EXPERTS[1] * model.width + activation[1] * hidden)
        redone = count * (recompute != "none")
        self.memory("forward", "experts", forward, count, 8 * mine)
        self.memory("backward", "experts", forward, redone, 8 * mine)
        self.memory("backward", "experts", backward, count, 8 * mine)
        self.send("forward", "all-to-all", "ep", ep, rank.e * chosen * model.width, 2 * count)
        self.send("backward", "all-to-all", "ep", ep, rank.e * chosen * model.width, 2 * (count + redone))

    def _elementwise(self, recompute: str, dense: bool, count: int) -> None:
        """Count norms, rotation, activation and sums."""
        rank, model, passes = self.rank, self.model, self.passes
        activation = passes.gated if model.gated else passes.plain
        sizes = []
        for forward_or_backward in (0, 1):
            of_width = passes.norms[forward_or_backward] + passes.sums[forward_or_backward]
            of_width += 2 * DROPOUT * self.stack.dropout
            size = of_width * model.width * self.r + 2 * rank.queries * self.t
            if model.positions == "rope":
                size += passes.rotation[forward_or_backward] * (rank.queries + rank.keys) * self.t
            if dense:
                size += activation[forward_or_backward] * rank.hidden * self.t
            sizes.append(self.e * size)
        self.memory("forward", "elementwise", sizes[0], count, passes.kernels[0])
        self.memory("backward", "elementwise", sizes[0], count * (recompute != "none"), passes.kernels[0])
        self.memory("backward", "elementwise", sizes[1], count, passes.kernels[1])

    def _attention(self, recompute: str, count: int) -> None:
        """Count attention over all scores; the time of a fused kernel leaves the masked half out."""
        rank, model, again = self.rank, self.model, count * (recompute == "full")
        heads, chunk = rank.queries // model.head_size, rank.length // (2 * self.layout.cp)
        # under context parallelism the first and the last chunk of the sequence, as rank 0 has them, each over the keys
        # up to its end
        spans = [(chunk, chunk), (chunk, rank.length)] if self.layout.cp > 1 else [(rank.length, rank.length)]
        if not self.stack.fused_attention:
            # recomputation that is selective is of the scores, for these stacks
            for queries, keys in spans:
                self._scores(rank.sequences * heads, queries, keys, count, count * (recompute != "none"))
            return
        size = self.e * self.t * 2 * (rank.queries + rank.keys)
        passes: tuple[tuple[Phase, str, int, int], ...] = (
            ("forward", "attention", 2, count),
            ("backward", "attention", 2, again),
            ("backward", "attention_backward", 5, count),  # the scores again, and four products
        )
        for queries, keys in spans:
            shape = (rank.sequences, heads, queries, keys, model.head_size)
            for phase, name, products, times in passes:
                flops = 2 * products * math.prod(shape)
                self.kernels[Kernel(name, "attention", shape, rank.dtype, flops, size // len(spans), phase)] += times

    def _scores(self, batch: int, queries: int, keys: int, count: int, again: int) -> None:
        """Count attention whose scores are in memory: products, and a fused softmax of two passes, three backward."""
        size, cells = self.model.head_size, self.e * batch * queries * keys
        dropped = 2.5 * cells * self.stack.dropout  # read and written, and a mask of a byte
        passes: tuple[tuple[Phase, int], ...] = (("forward", count), ("backward", again))
        for phase, times in passes:
            self.product(phase, queries, keys, size, times, batch)
            self.product(phase, queries, size, keys, times, batch)
            self.memory(phase, "softmax", 2 * cells + dropped, times, 2)
        self.product("backward", queries, size, keys, count, batch)
        self.product("backward", keys, size, queries, 2 * count, batch)
        self.product("backward", queries, keys, size, count, batch)
        self.memory("backward", "softmax", 3 * cells + dropped, count, 2)

    def _tensor_parallel(self, recompute: str, count: int) -> None:
        """Count what enters and leaves the two branches of a block."""
        size = self.e * self.t * self.model.width
        entered = 2 * (recompute == "full")
        left = 1 + self.stack.recomputes_all if recompute == "full" else 0  # the last sum is of no use backward
        if not self.sequence:
            self.send("forward", "all-reduce", "tp", self.tp, size, 2 * count)
            self.send("backward", "all-reduce", "tp", self.tp, size, (2 + left) * count)
            return
        if self.stack.states == "megatron" and not entered:
            entered = 2  # gathered again for the weights' gradients, rather than kept
        self.send("forward", "all-gather", "tp", self.tp, size, 2 * count)
        self.send("forward", "reduce-scatter", "tp", self.tp, size, 2 * count)
        self.send("backward", "all-gather", "tp", self.tp, size, (2 + entered) * count)
        self.send("backward", "reduce-scatter", "tp", self.tp, size, (2 + left) * count)
        self._probes(2 * count)

    def _probes(self, norms: int) -> None:
        """Count the sums of norms' gradients of each example, of which ranks that split the sequence have parts."""
        if self.rank.config.train.noise_scale:
            self.send("backward", "all-reduce", "tp", self.tp, 4 * self.rank.sequences * self.model.width, norms)

    # once a microbatch

    def _embedding(self) -> None:
        size, table = self.e * self.t * self.model.width, self.rank.vocabulary * self.model.width
        if self.sequence:
            self.send("forward", "reduce-scatter", "tp", self.tp, size, self.count)
            self.send("backward", "all-gather", "tp", self.tp, size, self.count)
        else:
            self.send("forward", "all-reduce", "tp", self.tp, size, self.count)
        widened = 6 * table if self.stack.states == "fsdp2" else 0  # the table in float32, for its gradient's sake
        self.memory("forward", "embedding", 3 * size + widened, self.count, 2)
        self.memory("backward", "embedding", 3 * size + 4 * table * (4 if self.count > 1 else 1), self.count, 3)

    def _loss(self) -> None:
        t, e, count, width = self.t, self.e, self.count, self.model.width
        self.memory("forward", "norm", 2 * e * self.r * width, count)
        self.memory("backward", "norm", 3 * e * self.r * width, count)
        if self.sequence:
            self._probes(count)
            self.send("forward", "all-gather", "tp", self.tp, e * t * width, count)
        self.send("backward", "reduce-scatter" if self.sequence else "all-reduce", "tp", self.tp, e * t * width, count)
        self.send("forward", "all-reduce", "tp", self.tp, 4 * t, count)
        self.send("forward", "all-reduce", "tp", self.tp, 8 * t, count)
        logits = t * self.rank.vocabulary
        if self.stack.whole_logits:
            self.linear(self.rank.vocabulary, width, t, count)
            # to float32, three passes of the loss; two of its gradient, back to half precision
            self.memory("forward", "loss", logits * (e + 4 + 12), count, 5)
            self.memory("backward", "loss", logits * (8 + 4 + e), count, 3)
            return
        # the loss makes both of its gradients at once, and schedules that ask for one after the other run it twice
        passes = 2 if self.rank.parallel.schedule in ("zero-bubble", "zbv") else 1
        rows = rows_at_once(t, width)
        whole, rest = divmod(self.rank.vocabulary, rows)
        for part, slices in ((rows, whole), (rest, 1)):
            if part and slices:
                self.linear(part, width, t, slices * count, float(e * logits > KEPT), backward=passes)
                # float32 copy, maximum, difference, exponential, sum
                self.memory("forward", "loss", t * part * (e + 4 + 4 + 16 + 4), slices * count, 18)
                # copy, difference, exponential, scale, half precision; the sum of the stream's gradients
                size = t * part * (e + 4 + 24 + 4 + e) + t * width * (12 + 4 + e)
                self.memory("backward", "loss", size, slices * count * passes, 18)

    def _pipeline(self) -> None:
        size = self.e * self.r * self.model.width
        if self.stack.states == "megatron" and not self.stack.whole_stream:
            size //= self.tp if not self.sequence else 1  # each tp rank sends its part, and all gather
        inner = len(self.rank.stages) * self.count
        sent, received = inner - self.rank.is_last * self.count, inner - self.rank.is_first * self.count
        pp = self.layout.pp
        self.send("forward", "send", "pp", pp, size, sent)
        self.send("forward", "receive", "pp", pp, size, received)
        self.send("backward", "send", "pp", pp, size, received)
        self.send("backward", "receive", "pp", pp, size, sent)

    # once a step, or as often as weights are gathered

    def _states(self) -> None:
        """Count gathering, reducing and updating of weights."""
        rank = self.rank
        mine = rank.own_weights
        self.memory("update", "norm", 4 * mine)
        if rank.config.optimizer.name != "adamw":
            self._matrices(mine - rank.own_outer_weights)
            mine = rank.own_outer_weights
        # weight, gradient and both moments are read, all but the gradient written
        self.memory("update", "update", (16 + 12) * mine, 1, 4)
        if self.layout.dp * self.layout.cp == 1:
            return
        axes, blocks = rank.named(*SHARDS), len(rank.blocks)
        if self.stack.states == "megatron":
            calls = self.stack.calls_per_block
            self._reduce_in_buffers(blocks * (rank.block_weights + rank.expert_weights), blocks * calls, axes)
            self._reduce_in_buffers(rank.outer_weights, 1, axes)
            return
        if not self.layout.is_sharded:  # the replicas' gradients are summed in one flat tensor, and copied back
            self.send("backward", "all-reduce", "dp_replicate", self.layout.dp_replicate, 4 * rank.weights)
            self.memory("backward", "reduce", 16 * rank.weights, 1, 2)
            return
        self._shard(rank.block_weights, blocks, axes, self.layout.dp_shard * self.layout.cp)
        self._shard(rank.outer_weights, 1, axes, self.layout.dp_shard * self.layout.cp)
        shards = self.layout.dp_shard * self.layout.cp // self.layout.ep
        self._shard(rank.expert_weights, blocks, rank.named(*EXPERT_SHARDS), shards)

    def _matrices(self, mine: int) -> None:
        """Count the updates of whole matrices that rank 0 of the stage owns, which are the largest, and the exchange of
        parts with the owners (parallel/owners.py). mine: this rank's part of the hidden weights. The choice of a new
        subspace, in one of optimizer.refresh updates, is left out."""
        layout, optimizer = self.layout, self.rank.config.optimizer
        replicas, ranks = layout.dp_replicate, layout.dp_shard * layout.cp * layout.tp
        weights = sorted(self._hidden_weights(), key=_numbers, reverse=True)
        sizes = [*map(_numbers, weights)]
        within, stage = self.rank.named(*WITHIN_REPLICA), replicas * ranks
        for first in range(0, len(weights), stage):
            parts = [sum(sizes[of : of + ranks]) / ranks for of in range(first, min(first + stage, len(sizes)), ranks)]
            self.send("update", "all-to-all", within, ranks, 4 * max(parts[0], sizes[first]), 2)  # there and back
            for part in parts:
                self.send("update", "broadcast", "dp_replicate", replicas, 4 * part)
            self.memory("update", "exchange", 4 * 8 * sizes[first], 1, 4)
            for shape in weights[first]:
                self._direction(*sorted(shape))
        momentum = 6 if optimizer.name == "muon" else 0  # and decay and update of the parts
        self.memory("update", "update", 4 * (momentum + 7) * mine, 1, len(weights))

    def _hidden_weights(self) -> Iterator[list[tuple[int, int]]]:
        """Yield each hidden weight of this rank's stages as the shapes of the whole matrices that it is made of."""
        model = self.model
        inner, width, queries = 2 if model.gated else 1, model.width, model.heads * model.head_size
        keys = model.kv_heads * model.head_size
        for block in self.rank.blocks:
            yield [(queries, width), (keys, width), (keys, width)]
            yield [(width, queries)]
            _, dense = self.rank.kind(block)
            yield from [[(model.mlp_width, width)]] * ((inner + 1) * dense)
            if not dense:
                yield from [[(model.expert_width, width)] * model.experts] * (inner + 1)
                if model.shared_experts:
                    yield from [[(model.shared_experts * model.expert_width, width)]] * (inner + 1)

    def _direction(self, side: int, larger: int) -> None:
        """Count the update of one whole matrix, in float32."""
        optimizer = self.rank.config.optimizer
        if optimizer.name == "muon":
            for k in (larger, side):
                self.product("update", side, side, k, ITERATIONS, dtype="float32")
            self.product("update", side, larger, side, ITERATIONS, dtype="float32")
            # sums and multiples of Gram matrix and matrix; norms, and divisions by them
            size = ITERATIONS * (7 * side * side + 5 * side * larger) + 10 * side * larger
            self.memory("update", "orthogonal", 4 * size, 1, 6 * ITERATIONS + 8)
            return
        rank = min(optimizer.rank, side)
        self.product("update", larger, rank, side, 1, dtype="float32")
        self.product("update", larger, side, rank, 1 + optimizer.remainder, dtype="float32")
        size = (6 + 8 * optimizer.remainder) * side * larger + 22 * rank * larger
        self.memory("update", "low rank", 4 * size, 1, 30)
        if optimizer.name == "dct":  # the columns, from their indices
            self.memory("update", "low rank", 4 * 20 * rank * side, 1, 12)

    def _shard(self, weights: int, units: int, axes: str, shards: int) -> None:
        """Count FSDP's collectives for units of so many weights, and the copies that FSDP2 makes beside them."""
        if not weights:
            return
        e, stack, replicas, count = self.e, self.stack, self.layout.dp_replicate, self.count
        forward, backward = {1: (1, 0), 2: (count, 0), 3: (count, count)}[self.rank.parallel.zero_level]
        copied = (2 * e * weights if stack.states == "fsdp2" else 0) + (4 + e) * weights / shards
        passes: tuple[tuple[Phase, int], ...] = (("forward", forward), ("backward", backward))
        for phase, gathers in passes:
            self.send(phase, "all-gather", axes, shards, e * weights, units * gathers)
            self.memory(phase, "gather", copied, units * gathers * (shards > 1), 2)
        times = units * (count if self.rank.parallel.reduce == "every" else 1)
        self.send("backward", "reduce-scatter", axes, shards, stack.reduced_bytes * weights, times)
        self.send("backward", "all-reduce", "dp_replicate", replicas, stack.reduced_bytes * weights / shards, times)
        self.memory("backward", "reduce", 2 * stack.reduced_bytes * weights, times)
        if self.rank.parallel.reduce == "once":  # a gradient in half precision is made wide and added
            size = (2 * e + 4 + 3 * stack.gradient_bytes) * weights
            self.memory("backward", "accumulate", size, units * (count - 1), 2)

    def _reduce_in_buffers(self, weights: int, calls: int, axes: str) -> None:
        """Count what Megatron does once a step: gradients are summed in buffers, weights gathered after the update."""
        stack, dp = self.stack, self.layout.dp
        phase: Phase = "backward" if stack.hides_reduction else "update"
        # each backward pass adds to the buffers
        self.memory("backward", "accumulate", (self.e + 2 * stack.gradient_bytes) * weights, self.count)
        if not calls:
            return
        if self.rank.parallel.zero:
            self.send(phase, "reduce-scatter", axes, dp, stack.reduced_bytes * weights / calls, calls)
            self.send("update", "all-gather", axes, dp, self.e * weights / calls, calls)
        else:
            self.send(phase, "all-reduce", axes, dp, stack.reduced_bytes * weights / calls, calls)


def _numbers(shapes: Sequence[tuple[int, int]]) -> int:
    """Return the numbers of a weight made of matrices of these shapes."""
    return sum(map(math.prod, shapes))
