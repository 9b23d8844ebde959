"""The decoder: embedding, blocks, final norm, unembedding. Forward multipliers come from the parameterization table.

Shapes: b sequences of a microbatch; s tokens of each on this rank, length / cp; r = s on the residual stream, s / tp
with sequence parallelism.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megahp.config import ModelConfig
from megahp.model.attention import Attention, Past, Positions
from megahp.model.cache import Cache
from megahp.model.mlp import MLP
from megahp.model.moe import MoE
from megahp.model.norm import LayerNorm, RMSNorm
from megahp.model.positions import alibi_slopes, rotary, tiles
from megahp.parallel.context import shard_sequence, spans
from megahp.parallel.cross_entropy import Teachers, cap, linear_cross_entropy
from megahp.parallel.mesh import TensorAxis
from megahp.parallel.parameters import local
from megahp.parallel.tensor import ColumnParallelLinear, PositionEmbedding, VocabParallelEmbedding, enter
from megahp.scaling.parameterization import Role, Table

QUERIES_AT_ONCE = 256  # of attention by plain products: smaller tiles skip more keys, but their products are slower


def make_norm(model: ModelConfig, role: Role, axis: TensorAxis, probe: bool) -> RMSNorm | LayerNorm:
    """Return a norm of the residual stream, whose tokens sequence parallelism splits over tp."""
    common = (model.width, model.norm_eps, role, axis.sum_over, axis.tokens)
    if model.norm == "rmsnorm":
        return RMSNorm(*common, probe=probe)
    return LayerNorm(*common, bias=model.bias, probe=probe)


class Block(nn.Module):
    """x + a attention(norm(x)), then x + a mlp(norm(x)), a the table's residual multiplier. [b, r, width] -> the same.

    model.norm_placement adds a norm after each branch, or moves it there; with model.parallel_residual both branches
    read the same x.

    The MLP of a block that is not dense is a mixture of experts. `compute` is `branches`, or what
    megahp/model/compute.py makes of it: compiled, or recomputed in the backward pass.
    """

    def __init__(self, model: ModelConfig, table: Table, axis: TensorAxis, probe: bool, dense: bool) -> None:
        super().__init__()
        self.residual, self.parallel = table.residual, model.parallel_residual
        self.compute: Callable[[Tensor, Positions, Tensor, Past | None], Tensor] = self.branches

        def norm(*placements: str) -> RMSNorm | LayerNorm | None:
            return make_norm(model, Role.NORM, axis, probe) if model.norm_placement in placements else None

        self.attention_norm = norm("pre", "both")
        self.attention = Attention(model, table.attention, axis, probe)
        self.attention_post_norm = norm("post", "both")
        self.mlp_norm = norm("pre", "both")
        self.mlp = MLP(model, model.mlp_width, axis) if dense else MoE(model, axis)
        self.mlp_post_norm = norm("post", "both")

    def forward(self, x: Tensor, positions: Positions, loss_weight: Tensor, past: Past | None = None) -> Tensor:
        return self.compute(x, positions, loss_weight, past)

    def branches(self, x: Tensor, positions: Positions, loss_weight: Tensor, past: Past | None = None) -> Tensor:
        branch = self.attention(self.attention_norm(x) if self.attention_norm else x, positions, past)
        if self.attention_post_norm:
            branch = self.attention_post_norm(branch)
        if self.mlp_norm and not self.parallel:
            # x += a branch and its norm, in one pass over memory
            x, normal = self.mlp_norm.add(x, branch, self.residual)
        else:
            stream = torch.add(x, branch, alpha=self.residual)
            normal = x if self.parallel else stream
            x, normal = stream, self.mlp_norm(normal) if self.mlp_norm else normal
        branch = self.mlp(normal, loss_weight) if isinstance(self.mlp, MoE) else self.mlp(normal)
        if self.mlp_post_norm:
            branch = self.mlp_post_norm(branch)
        # the next block's norm would take this addition too, but then blocks, and stages, would exchange two tensors
        return torch.add(x, branch, alpha=self.residual)


class Transformer(nn.Module):
    """The decoder, or a pipeline stage of it.

    `forward` takes tokens [b, s], and returns the losses of their targets [b, s], in nats per token; without targets
    logits [b, s, vocabulary / tp]; without `unembed` what the unembedding multiplies, [b, s, width].

    As a pipeline stage that is not the first it takes the residual stream [b, r, width] instead of tokens; one that is
    not the last returns it. documents [b, length]: the document of each token of the whole sequences, where attention
    must not cross documents. loss_weight: the gradient that a token's loss will get, by which the experts'
    balance losses are scaled. longest: the most tokens trained on; ALiBi is interpolated beyond.

    teachers: what they predict for these tokens, which the targets are mixed with. cache: of the tokens before these,
    to which these are added. Raises ValueError with context or sequence parallelism, under which a rank reads a part of
    each sequence.
    """

    def __init__(
        self, model: ModelConfig, longest: int, table: Table, axis: TensorAxis, dtype: torch.dtype, probe: bool
    ) -> None:
        super().__init__()
        self.model, self.longest, self.table, self.axis, self.dtype = model, longest, table, axis, dtype
        self.is_first = self.is_last = True  # stage of a pipeline
        self.traced_for_gpu = False  # by a plan, on a CPU
        self.embedding = VocabParallelEmbedding(model.padded_vocab, model.width, axis, model.tied_embeddings)
        self.positions = PositionEmbedding(longest, model.width, axis) if model.positions == "learned" else None
        dense = model.layers - model.expert_layers
        # by their numbers in the whole model, so that names of weights are the same in every stage
        self.blocks = nn.ModuleDict({str(n): Block(model, table, axis, probe, n < dense) for n in range(model.layers)})
        self.final_norm = make_norm(model, Role.FINAL_NORM, axis, probe)
        self.unembedding = None
        if not model.tied_embeddings:
            self.unembedding = ColumnParallelLinear(model.width, model.padded_vocab, False, Role.UNEMBEDDING)

    def keep(self, blocks: range) -> None:
        """Delete all but the pipeline stage of these blocks. The embedding belongs to the first block; final norm and
        unembedding, and with them a second copy of the embedding if it is tied, to the last."""
        self.is_first, self.is_last = blocks.start == 0, blocks.stop == self.model.layers
        if not self.is_first:
            self.positions = None
            if not (self.is_last and self.model.tied_embeddings):
                del self.embedding
        if not self.is_last:
            del self.final_norm, self.unembedding
        for number in range(self.model.layers):
            if number not in blocks:
                del self.blocks[str(number)]

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        loss_weight: float = 0.0,
        cache: Cache | None = None,
        teachers: Teachers | None = None,
        unembed: bool = True,
    ) -> Tensor:
        start = cache.length if cache else 0
        if cache and (self.axis.context.size > 1 or self.axis.sequence_parallel):
            raise ValueError(
                f"a cache needs whole sequences on each rank, and parallel.cp = {self.axis.context.size}, "
                f"parallel.sequence_parallel = {self.axis.sequence_parallel}; build the model with 1 and False"
            )
        # whole sequences'
        length = start + x.shape[1] * self.axis.context.size * (1 if self.is_first else self._stream_shards)
        positions = self._positions(start, length, x.device, documents)
        if self.is_first:
            x = self.embedding(x, self.dtype)  # [b, s] -> [b, r, width]
            if self.positions:
                x = x + self.positions(start, length, self.dtype)
            x = x * self.table.embedding
        # as a tensor, since compiled blocks would be compiled again for another float; on the CPU, where it is read
        weight = torch.tensor(loss_weight, dtype=torch.float64, device="cpu")
        for number, block in self.blocks.items():
            past = partial(cache.extend, number) if cache else None
            x = block(x, positions[self._kind(int(number))], weight, past)  # [b, r, width]
        if cache:
            cache.length = length
        if not self.is_last:
            return x.contiguous()  # to be sent; a reduce-scatter leaves the sequence outermost in memory
        x = enter(self.final_norm(x), self.axis) * self.table.logits  # [b, r, width] -> [b, s, width]
        if not unembed:
            return x
        if targets is not None:
            model = self.model
            restriction = model.logits_softcap, model.softmax_size, model.levels
            return linear_cross_entropy(x, self.unembedding_rows, targets, self.axis, *restriction, teachers)
        logits = self.unembedding(x) if self.unembedding else F.linear(x, local(self.embedding.weight).to(x.dtype))
        return cap(logits, self.model.logits_softcap) if self.model.logits_softcap else logits

    def stream(self, tokens: Tensor) -> Tensor:
        """Return what a stage sends to the next for these tokens [b, s], on `meta`: [b, r, width]."""
        length = tokens.shape[1] // self._stream_shards
        return torch.empty(len(tokens), length, self.model.width, dtype=self.dtype, device="meta")

    @property
    def unembedding_rows(self) -> Tensor:
        """This rank's rows of the unembedding, [rows / tp, width]."""
        return local((self.unembedding or self.embedding).weight)

    @property
    def _stream_shards(self) -> int:
        """Return the number of tp ranks that the residual stream of s tokens is split over."""
        return self.axis.size if self.axis.sequence_parallel else 1

    def _kind(self, block: int) -> tuple[int, bool]:
        """Return what distinguishes the blocks' positions: the window, and whether they are rotated."""
        return self.model.window_of(block), self.model.rotates(block)

    def _positions(
        self, start: int, length: int, device: torch.device, documents: Tensor | None
    ) -> dict[tuple[int, bool], Positions]:
        """Return what attention needs of the rank's positions from `start` on in sequences of `length` tokens, for each
        kind of block that this stage has."""
        model, context, slopes = self.model, self.axis.context, None
        own = [slice(start, length)] if start else spans(length, context)
        local_positions = shard_sequence(torch.arange(start, length, device=device), 0, context)
        if model.positions == "alibi":
            slopes = alibi_slopes(model.heads, length / self.longest).chunk(self.axis.size)[self.axis.rank].to(device)
        found = {}
        for window, rotates in {self._kind(int(number)): None for number in self.blocks}:
            angles = rotary(local_positions, model, window > 0) if rotates else None
            # On a CPU plain products win where torch's fused kernel is slow, in bfloat16, or where they compute a part
            # of what it does (docs/benchmarks/attention.md). No fused kernel caps logits.
            skips = length > QUERIES_AT_ONCE and (documents is not None or 0 < window < length)
            on_cpu = device.type == "cpu" and not self.traced_for_gpu
            fused = not (model.attention_softcap or on_cpu and (self.dtype is torch.bfloat16 or skips))
            at_once = 0 if fused else QUERIES_AT_ONCE
            parts = tiles(own, slopes, documents, self.dtype, window, device, at_once)
            found[window, rotates] = Positions(angles, parts, fused, not fused and documents is not None)
        return found
