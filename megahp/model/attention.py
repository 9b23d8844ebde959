"""Causal self-attention over this rank's heads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megahp.config import ModelConfig
from megahp.model.norm import HeadsNorm, RMSNorm
from megahp.model.positions import rotate
from megahp.parallel.collectives import gather_from
from megahp.parallel.context import gather_sequence, spans
from megahp.parallel.mesh import Axis, TensorAxis
from megahp.parallel.tensor import ColumnParallelLinear, RowParallelLinear, enter
from megahp.scaling.parameterization import Role


@dataclass(frozen=True)
class Positions:
    """Hold what the attention of all blocks of a kind needs to know of a batch's positions; computed once a forward
    pass."""

    rotary: tuple[Tensor, Tensor] | None  # cos, sin: [s, rotated dimensions / 2]
    biases: tuple[Tensor | None, ...]  # added to the logits, one for each of the rank's spans; None = causal mask only


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

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
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
        query, key, value = (
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
        )  # [b, heads, s, head_size]
        if self.axis.context.size == 1:
            mixed = attend(query, key, value, positions.biases[0], self.scale, self.softcap)
        else:
            # after norm and rotary, so that every rank does these for its own tokens alone; one collective for both
            keys, values = gather_sequence(torch.cat((key, value), -1), 2, self.axis.context).chunk(2, -1)
            mixed = attend_by_span(query, keys, values, positions.biases, self.scale, self.axis.context, self.softcap)
        return self.out(mixed.transpose(1, 2).flatten(2))  # [b, s, heads / tp * head_size] -> [b, s (/ tp), width]


def attend_by_span(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    biases: Sequence[Tensor | None],
    scale: float,
    context: Axis,
    softcap: float = 0.0,
) -> Tensor:
    """Return causal attention of the rank's queries [b, heads, s/cp, size] over whole sequences [b, kv heads, s, size].

    Each span attends to the keys up to its own end alone; later ones are masked anyway.
    """
    local = spans(keys.shape[2], context)
    mixed = [
        attend(part, keys[:, :, : span.stop], values[:, :, : span.stop], bias, scale, softcap)
        for part, span, bias in zip(query.chunk(len(local), 2), local, biases, strict=True)
    ]
    return torch.cat(mixed, 2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, softcap: float = 0.0
) -> Tensor:
    """Return attention of [b, heads, queries, size] over [b, kv heads, keys, size], causal where there is no bias.

    softcap: of the logits, 0 = none; no fused kernel has it, so all logits of a block are held. (Gemma 2, arXiv
    2408.00118, section 2)
    """
    if softcap:
        from torch.nn.attention.bias import CausalBias  # here: it imports torch._dynamo, which takes half a second

        queries = query.unflatten(1, (key.shape[1], -1))  # [b, kv heads, queries of each, queries, size]
        logits = queries @ key[:, :, None].transpose(-1, -2) * (scale / softcap)
        logits = softcap * logits.to(torch.promote_types(logits.dtype, torch.float32)).tanh()
        if bias is None or isinstance(bias, CausalBias):  # causal, aligned to the last key
            later = torch.ones_like(logits[0, 0, 0], dtype=torch.bool).triu(1 + logits.shape[-1] - logits.shape[-2])
            logits = logits.masked_fill(later, -torch.inf)
        else:
            logits = logits.flatten(1, 2).add(bias).view_as(logits)
        return (logits.softmax(-1).to(value.dtype) @ value[:, :, None]).flatten(1, 2)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, is_causal=bias is None, scale=scale, enable_gqa=query.shape[1] > key.shape[1]
    )
