"""Causal self-attention over this rank's heads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megahp.config import ModelConfig
from megahp.model.norm import HeadsNorm, RMSNorm
from megahp.model.positions import Tile, rotate
from megahp.ops.compiler import uncompiled
from megahp.parallel.collectives import gather_from
from megahp.parallel.context import gather_sequence
from megahp.parallel.mesh import TensorAxis
from megahp.parallel.tensor import ColumnParallelLinear, RowParallelLinear, enter
from megahp.scaling.parameterization import Role

# From the keys and values of new tokens to those of all tokens up to them: a block's part of a cache.
Past = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Positions:
    """What the attention of all blocks of a kind needs to know of a batch's positions, computed once a forward pass."""

    rotary: tuple[Tensor, Tensor] | None  # cos, sin: [s, rotated dimensions / 2]
    tiles: tuple[Tile, ...]
    fused: bool  # whether torch's fused kernel computes a tile
    changing: bool  # whether the tiles' keys depend on the batch's documents


class Attention(nn.Module):
    """Multi-head or grouped-query attention. [b, s, width] -> [b, s, width].

    The fused projection holds, for each key/value head in turn, its query heads, the key head and the value head,
    as Megatron lays it out: splitting its rows over tp gives every rank whole groups. With fewer key/value heads than
    tp ranks a rank computes a part of a group's outputs; all are gathered, and each rank of a group takes its queries
    and a copy of the key and value heads. So weights and checkpoints are those of any other layout.
    """

    def __init__(self, model: ModelConfig, scale: float, axis: TensorAxis, probe: bool) -> None:
        super().__init__()
        self.scale, self.softcap, self.axis = scale, model.attention_softcap, axis
        self.head_size, self.queries = model.head_size, model.heads // model.kv_heads
        self.copies = max(1, axis.size // model.kv_heads)  # ranks that share a key/value head
        group = (self.queries * model.head_size, model.head_size, model.head_size)
        self.qkv = ColumnParallelLinear(
            model.width, model.kv_heads * sum(group), model.bias or model.qkv_bias, fused=group
        )
        self.out = RowParallelLinear(model.heads * model.head_size, model.width, model.bias, axis)
        self.query_norm: RMSNorm | HeadsNorm | None = None
        self.key_norm: RMSNorm | HeadsNorm | None = None
        if model.qk_norm_whole:
            self.query_norm = HeadsNorm(model.heads, model.head_size, model.norm_eps, axis)
            self.key_norm = HeadsNorm(model.kv_heads, model.head_size, model.norm_eps, axis)
        elif model.qk_norm:
            # one gain for all heads, which are spread over tp: so its gradient is summed over tp, always
            self.query_norm, self.key_norm = (
                RMSNorm(model.head_size, model.norm_eps, Role.NORM, ("tp",), axis.heads, probe=probe) for _ in range(2)
            )

    def forward(self, x: Tensor, positions: Positions, past: Past | None = None) -> Tensor:
        # s: the rank's tokens, length / cp; with sequence parallelism x is [b, s / tp, width]
        qkv = self.qkv(enter(x, self.axis))  # [b, s, kv_heads / tp * (queries + 2) * head_size]
        if self.copies > 1:
            qkv = gather_from(qkv, -1, self.axis.group)  # its adjoint adds up what the copies' gradients are
        qkv = qkv.unflatten(-1, (-1, self.queries + 2, self.head_size))  # [b, s, kv_heads / tp, queries + 2, head_size]
        query, key, value = qkv.split((self.queries, 1, 1), -2)
        if self.copies > 1:
            group, member = divmod(self.axis.rank, self.copies)
            query, key, value = (part[:, :, group, None] for part in (query, key, value))
            query = query.chunk(self.copies, 3)[member]
        query, key, value = query.flatten(2, 3), key.squeeze(3), value.squeeze(3)  # [b, s, (kv) heads / tp, head_size]
        if self.query_norm and self.key_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if positions.rotary:
            query, key = rotate(query, *positions.rotary), rotate(key, *positions.rotary)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # [b, (kv) heads, s, head_size]
        if self.axis.context.size > 1:
            # after norm and rotary, so that every rank does these for its own tokens alone; one collective for both
            key, value = gather_sequence(torch.cat((key, value), -1), 2, self.axis.context).chunk(2, -1)
        if past:
            key, value = past(key, value)
        function = partial(attend, scale=self.scale)
        if not positions.fused:
            function = partial(attend_by_products, scale=self.scale, softcap=self.softcap)
        attend_tiles = attend_in_changing_tiles if positions.changing else attend_in_tiles
        mixed = attend_tiles(query, key, value, positions.tiles, function)
        return self.out(mixed.transpose(1, 2).flatten(2))  # [b, s, heads / tp * head_size] -> [b, s (/ tp), width]


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return attention of [b, heads, queries, size] over [b, kv heads, keys, size] by torch's fused kernel."""
    causal = bias is None and query.shape[2] > 1  # one query is the last: it attends to all keys
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=query.shape[1] > key.shape[1]
    )


def attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, softcap: float = 0.0
) -> Tensor:
    """Return the same by plain products.

    The logits are in the tensors' dtype: in bfloat16 the result is about twice as far from float32's as the fused
    kernel's. softcap: c tanh(logits / c), 0 = none. (Gemma 2, arXiv 2408.00118, section 2)
    """
    kv_heads = key.shape[1]
    # the queries that share a key head in one product: [b kv heads, queries of all of them, size]
    together = query.unflatten(1, (kv_heads, -1)).flatten(2, 3).flatten(0, 1)
    transposed = key.transpose(-1, -2).flatten(0, 1)
    if bias.dim() == 2 and not softcap:  # the same for all heads: it is added within the product
        logits = torch.baddbmm(bias.repeat(query.shape[1] // kv_heads, 1), together, transposed, alpha=scale)
    else:
        logits = (together @ transposed * scale).view(*query.shape[:3], key.shape[2])
        logits = softcap * (logits / softcap).tanh() if softcap else logits
        logits = logits + bias
    weights = logits.softmax(-1).view(*together.shape[:2], key.shape[2])
    return (weights @ value.flatten(0, 1)).view(query.shape)


def attend_in_tiles(
    query: Tensor, keys: Tensor, values: Tensor, tiles: Sequence[Tile], function: Callable[..., Tensor]
) -> Tensor:
    """Return the attention of the rank's queries [b, heads, s, size] over whole sequences [b, kv heads, length, size].

    function: of (query, key, value, bias), for each tile.
    """
    mixed = [
        function(query[:, :, tile.queries], keys[:, :, tile.keys], values[:, :, tile.keys], tile.bias) for tile in tiles
    ]
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed, 2)


# The keys that a tile skips because of its documents differ from batch to batch; each time they would be compiled anew.
attend_in_changing_tiles = uncompiled(attend_in_tiles)
