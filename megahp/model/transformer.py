"""The decoder: embedding, blocks, final norm, unembedding. Forward multipliers come from the parameterization table."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megahp.config import ModelConfig
from megahp.model.attention import Attention, Positions
from megahp.model.mlp import MLP
from megahp.model.moe import MoE
from megahp.model.norm import LayerNorm, RMSNorm
from megahp.model.positions import alibi_slopes, attention_bias, rotary
from megahp.parallel.context import shard_sequence, spans
from megahp.parallel.cross_entropy import linear_cross_entropy
from megahp.parallel.mesh import TensorAxis
from megahp.parallel.parameters import local
from megahp.parallel.tensor import ColumnParallelLinear, PositionEmbedding, VocabParallelEmbedding, enter
from megahp.scaling.parameterization import Role, Table


def make_norm(model: ModelConfig, role: Role, axis: TensorAxis, probe: bool) -> RMSNorm | LayerNorm:
    """A norm over the residual stream, which sequence parallelism spreads over tp."""
    common = (model.width, model.norm_eps, role, axis.spread, axis.tokens)
    if model.norm == "rmsnorm":
        return RMSNorm(*common, probe=probe)
    return LayerNorm(*common, bias=model.bias, probe=probe)


class Block(nn.Module):
    """x + r attention(norm(x)), then x + r mlp(norm(x)), r the table's residual multiplier; not dense: with experts.

    `compute` does it; megahp/model/compute.py may compile it, or have parts of it computed again in the backward pass.
    """

    def __init__(self, model: ModelConfig, table: Table, axis: TensorAxis, probe: bool, dense: bool) -> None:
        super().__init__()
        self.residual = table.residual
        self.compute: Callable[[Tensor, Positions], Tensor] = self.branches
        self.attention_norm = make_norm(model, Role.NORM, axis, probe)
        self.attention = Attention(model, table.attention, axis, probe)
        self.mlp_norm = make_norm(model, Role.NORM, axis, probe)
        self.mlp = MLP(model, model.mlp_width, axis) if dense else MoE(model, axis)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        return self.compute(x, positions)

    def branches(self, x: Tensor, positions: Positions) -> Tensor:
        branch = self.attention(self.attention_norm(x), positions)
        x, normal = self.mlp_norm.add(x, branch, self.residual)
        # The next norm would take this addition too, but then blocks, and pipeline stages, would exchange two tensors.
        return torch.add(x, self.mlp(normal), alpha=self.residual)


class Transformer(nn.Module):
    """tokens [b, s] -> per-token losses [b, s] in nats when targets [b, s] are given, else logits [b, s, vocab / tp].
    As a pipeline stage that is not the first it takes the residual stream instead of tokens, and one that is not the
    last returns it.

    documents [b, s] number the document of each token, where attention must not cross documents. Under context
    parallelism tokens and targets are the rank's own, [b, s/cp], and documents those of whole sequences. longest: the
    most tokens it is trained on; ALiBi is interpolated beyond.
    """

    def __init__(
        self, model: ModelConfig, longest: int, table: Table, axis: TensorAxis, dtype: torch.dtype, probe: bool
    ) -> None:
        super().__init__()
        self.model, self.longest, self.table, self.axis, self.dtype = model, longest, table, axis, dtype
        self.is_first = self.is_last = True  # stage of a pipeline
        self.embedding = VocabParallelEmbedding(model.padded_vocab, model.width, axis, model.tied_embeddings)
        self.positions = PositionEmbedding(longest, model.width, axis) if model.positions == "learned" else None
        dense = model.layers - model.expert_layers
        self.blocks = nn.ModuleDict({str(n): Block(model, table, axis, probe, n < dense) for n in range(model.layers)})
        self.final_norm = make_norm(model, Role.FINAL_NORM, axis, probe)
        self.unembedding = None
        if not model.tied_embeddings:
            self.unembedding = ColumnParallelLinear(model.width, model.padded_vocab, False, Role.UNEMBEDDING)

    def keep(self, blocks: range) -> None:
        """Become the pipeline stage of these blocks. The embedding goes with the first block; final norm and
        unembedding, and with them the embedding if it is tied, go with the last."""
        self.is_first, self.is_last = blocks.start == 0, blocks.stop == self.model.layers
        if not self.is_first:
            self.positions = None
            if not (self.is_last and self.model.tied_embeddings):
                del self.embedding
        if not self.is_last:
            del self.final_norm, self.unembedding
        for number in set(map(str, range(self.model.layers))) - set(map(str, blocks)):
            del self.blocks[number]

    def forward(self, x: Tensor, targets: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        length = x.shape[1] * self.axis.context.size * (1 if self.is_first else self._split)
        positions = self._positions(length, x.device, documents)
        if self.is_first:
            x = self.embedding(x, self.dtype)
            if self.positions:
                x = x + self.positions(length, self.dtype)
            x = x * self.table.embedding
        for block in self.blocks.values():
            x = block(x, positions)
        if not self.is_last:
            return x
        x = enter(self.final_norm(x), self.axis) * self.table.logits
        if targets is not None:
            return linear_cross_entropy(x, local((self.unembedding or self.embedding).weight), targets, self.axis)
        return self.unembedding(x) if self.unembedding else F.linear(x, local(self.embedding.weight).to(x.dtype))

    def stream(self, tokens: Tensor) -> Tensor:
        """What a stage gives to the next for these tokens, on `meta`: [b, s or s/tp, width]."""
        length = tokens.shape[1] // self._split
        return torch.empty(len(tokens), length, self.model.width, dtype=self.dtype, device="meta")

    @property
    def _split(self) -> int:
        """Ranks that share out the residual stream of a rank's tokens."""
        return self.axis.size if self.axis.sequence_parallel else 1

    def _positions(self, length: int, device: torch.device, documents: Tensor | None) -> Positions:
        model, context = self.model, self.axis.context
        turns = slopes = None
        if model.positions == "rope":
            own = shard_sequence(torch.arange(length, device=device), 0, context)
            turns = rotary(own, model.head_size, model.rope_theta)
        if model.positions == "alibi":
            heads = alibi_slopes(model.heads, length / self.longest).chunk(self.axis.size)[self.axis.rank]
            slopes = heads.to(device)
        biases = (attention_bias(span, slopes, documents, self.dtype) for span in spans(length, context))
        return Positions(turns, tuple(biases))
