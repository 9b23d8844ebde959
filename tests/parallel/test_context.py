"""Context parallelism's arithmetic, rank by rank in one process: who holds which tokens, and what they attend to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megahp.model.attention import attend, attend_by_products, attend_in_tiles
from megahp.model.positions import Tile, alibi_slopes, tiles
from megahp.parallel.context import restore_order, shard_sequence, spans
from megahp.parallel.mesh import Axis

LENGTH, HEADS = 24, 4
SIZES = (2, 3, 4)


def places(size: int) -> list[Axis]:
    return [Axis(size, rank, None) for rank in range(size)]  # type: ignore[arg-type]


def together(parts: list[Tensor], dim: int) -> Tensor:
    """What the ranks' tokens are in the order of the sequence."""
    return restore_order(torch.cat(parts, dim), dim, len(parts))


@pytest.mark.parametrize("size", SIZES)
def test_every_token_has_one_rank_and_every_rank_the_same_work(size: int) -> None:
    positions = torch.arange(LENGTH)
    own = [shard_sequence(positions, 0, place) for place in places(size)]
    assert all(
        torch.equal(mine, torch.cat([positions[span] for span in spans(LENGTH, place)]))
        for mine, place in zip(own, places(size), strict=True)
    )
    assert torch.equal(together(own, 0), positions)
    assert len({len(mine) for mine in own}) == 1
    assert len({int((mine + 1).sum()) for mine in own}) == 1  # a token attends to itself and all before it


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None, documents: Tensor | None
) -> Tensor:
    """Token by token: softmax(q k / 2 - slope distance) v over what a token may see. [b, heads, s, size]."""
    key, value = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (key, value))
    mixed = torch.empty_like(query)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        seen = torch.arange(i + 1)
        if documents is not None:
            seen = seen[documents[b, : i + 1] == documents[b, i]]
        scores = key[b, h, seen] @ query[b, h, i] / 2
        if slopes is not None:
            scores = scores - slopes[h] * (i - seen)
        mixed[b, h, i] = scores.softmax(0) @ value[b, h, seen]
    return mixed


@pytest.mark.parametrize("masked", ["", "alibi", "documents", "alibi documents"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("at_once", [0, 5])
def test_the_ranks_attend_as_one(at_once: int, kv_heads: int, masked: str) -> None:
    """Outputs and gradients; the gradients of keys and values are the sum over the ranks."""
    random = torch.Generator().manual_seed(kv_heads)
    given = [
        torch.randn(2, heads, LENGTH, 8, dtype=torch.float64, generator=random, requires_grad=True)
        for heads in (HEADS, kv_heads, kv_heads)
    ]
    slopes = alibi_slopes(HEADS).double() if "alibi" in masked else None
    documents = torch.randint(0, 2, (2, LENGTH), generator=random).cumsum(1) // 8 if "documents" in masked else None
    wanted = plain_attention(*given, slopes, documents)
    towards = torch.randn(wanted.shape, dtype=torch.float64, generator=random)
    wanted_grads = torch.autograd.grad(wanted, given, towards)
    for size in SIZES:
        parts = {place: tiles_of(place, slopes, documents, torch.float64, at_once) for place in places(size)}
        function = attend_by_products if at_once else attend
        mixed = together([attended(place, given, parts[place], function) for place in parts], 2)
        torch.testing.assert_close(mixed, wanted, rtol=1e-12, atol=1e-12)
        for grad, wanted_grad in zip(torch.autograd.grad(mixed, given, towards), wanted_grads, strict=True):
            torch.testing.assert_close(grad, wanted_grad, rtol=1e-12, atol=1e-12)


def tiles_of(
    place: Axis, slopes: Tensor | None, documents: Tensor | None, dtype: torch.dtype, at_once: int = 0
) -> tuple[Tile, ...]:
    return tiles(spans(LENGTH, place), slopes, documents, dtype, 0, None, at_once)


def attended(place: Axis, given: Sequence[Tensor], parts: tuple[Tile, ...], function: Any = attend) -> Tensor:
    """One rank's part of the attention of query, keys and values."""
    query, keys, values = given
    return attend_in_tiles(shard_sequence(query, 2, place), keys, values, parts, partial(function, scale=0.5))


@pytest.mark.parametrize("size", SIZES)
def test_no_rank_computes_more_than_its_share(size: int) -> None:
    """Chunks of LENGTH / 2 cp queries over all keys up to their end: (2 cp + 1) / 4 cp of all pairs, over cp ranks."""
    query = torch.randn(1, HEADS, LENGTH, 8, dtype=torch.float64)
    flops = set()
    for place in places(size):
        parts = tiles_of(place, None, None, torch.float64)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            attended(place, [query] * 3, parts)
        flops.add(counter.get_total_flops())
    pairs = LENGTH**2 * (2 * size + 1) / (4 * size**2)
    assert flops == {HEADS * pairs * 8 * 2 * 2}  # q k and p v, an addition and a multiplication
