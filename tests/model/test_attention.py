"""Attention in tiles by plain products, against torch's own."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from distributed import world
from distributed.training import Training, settings_of
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from megahp.model import transformer
from megahp.model.attention import attend, attend_by_products, attend_in_tiles
from megahp.model.positions import alibi_slopes, tiles

LENGTH, SIZE = 24, 8
WHOLE = slice(0, LENGTH)
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 17, [0] * 20 + [1] * 4])
MASKS: dict[str, tuple[Any, ...]] = {  # slopes, documents, window
    "causal": (None, None, 0),
    "later queries": (None, None, 0),
    "later queries, documents": (None, DOCUMENTS, 0),
    "documents": (None, DOCUMENTS, 0),
    "alibi": (alibi_slopes(4), None, 0),
    "window": (None, None, 3),
    "all": (alibi_slopes(4), DOCUMENTS, 7),
}


def inputs(dtype: torch.dtype, kv_heads: int, queries: int = LENGTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, queries, SIZE), (2, kv_heads, LENGTH, SIZE), (2, kv_heads, LENGTH, SIZE))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def outcome(function: Any, given: list[Tensor]) -> list[Tensor]:
    mixed = function(*given)
    upstream = torch.linspace(-1, 1, mixed.numel(), dtype=torch.float64).view_as(mixed).to(mixed.dtype)
    return [mixed.detach(), *torch.autograd.grad(mixed, given, upstream)]


def by_tiles(given: list[Tensor], *masks: Any, at_once: int, span: slice = WHOLE) -> list[Tensor]:
    """Attention of the queries of a span, and its gradients: by the fused kernel or, some queries at once, by
    products."""
    slopes, documents, window = masks
    parts = tiles([span], slopes, documents, given[0].dtype, window, None, at_once)
    function = partial(attend_by_products if at_once else attend, scale=0.3)
    return outcome(lambda q, k, v: attend_in_tiles(q, k, v, parts, function), given)


@pytest.mark.parametrize("at_once", [5, 24, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", MASKS)
def test_tiles_attend_as_the_whole(name: str, kv_heads: int, at_once: int) -> None:
    span = slice(LENGTH - 10, LENGTH) if name.startswith("later") else WHOLE
    given, masks = inputs(torch.float64, kv_heads, span.stop - span.start), MASKS[name]
    found = by_tiles(given, *masks, at_once=at_once, span=span)
    torch.testing.assert_close(found, by_tiles(given, *masks, at_once=0, span=span), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MASKS)
def test_a_flash_kernel_takes_every_bias(name: str) -> None:
    """Of two or four dimensions; others would fall back to a kernel that holds all logits."""
    span = slice(LENGTH - 10, LENGTH) if name.startswith("later") else WHOLE
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        by_tiles(inputs(torch.float32, 4, span.stop - span.start), *MASKS[name], at_once=0, span=span)


def test_tiles_skip_keys_that_no_query_of_theirs_attends_to() -> None:
    """Of 24 tokens, 6 queries at once: their own window of 3 (and the 2 tokens before it), or their document; the
    batch's two rows have other documents, and a tile serves both."""

    def keys(documents: Tensor | None, window: int) -> list[tuple[int, int]]:
        return [
            (tile.keys.start, tile.keys.stop)
            for tile in tiles([WHOLE], None, documents, torch.float64, window, None, 6)
        ]

    assert keys(None, 0) == [(0, 6), (0, 12), (0, 18), (0, 24)]
    assert keys(None, 3) == [(0, 6), (4, 12), (10, 18), (16, 24)]
    assert keys(DOCUMENTS[:1], 0) == [(0, 6), (0, 12), (7, 18), (7, 24)]
    assert keys(DOCUMENTS, 0) == [(0, 6), (0, 12), (0, 18), (0, 24)]
    assert keys(DOCUMENTS[:1], 9) == [(0, 6), (0, 12), (7, 18), (10, 24)]


def losses_and_frames(words: tuple[str, ...]) -> tuple[list[Tensor], int]:
    """Of a model whose tokens attend 5 queries at once, and 16, and of three batches with other documents how many
    frames the second and third compile."""
    training = Training(settings_of("llama", "train.dtype=float64", *words))
    (model,) = training.engine.stages
    tokens = torch.from_numpy(np.random.RandomState(0).randint(0, 128, (2, 17)))
    found, frames = [], []
    for boundary in (3, 8, 12):
        documents = (torch.arange(16) >= boundary).int().expand(2, -1) if training.config.data.mask_documents else None
        for at_once in (5, 16):
            with mock.patch.object(transformer, "QUERIES_AT_ONCE", at_once):
                loss = model(tokens[:, :-1], tokens[:, 1:], documents)
            found += [loss.detach(), *torch.autograd.grad(loss.sum(), list(model.parameters()))]
            if "compute.compile=true" in words:
                break
        frames.append(counters["frames"]["total"])
    return found, frames[2] - frames[0]


@pytest.mark.parametrize("masked", ["data.mask_documents=true", "model.window=5", "model.attention_softcap=4.0"])
def test_a_model_trains_by_tiles_as_by_the_whole(masked: str) -> None:
    (found, _) = world.run(1, losses_and_frames, (masked,))[0]
    count = len(found) // 6
    for start in range(0, 6 * count, 2 * count):
        by_tiles, whole = found[start : start + count], found[start + count : start + 2 * count]
        torch.testing.assert_close(by_tiles, whole, rtol=1e-10, atol=1e-12)


def test_other_documents_compile_nothing_anew() -> None:
    words = ("data.mask_documents=true", "compute.compile=true")
    compiled, frames = world.run_afresh(1, losses_and_frames, words)[0]
    plain, _ = world.run(1, losses_and_frames, words[:1])[0]
    count = len(plain) // 6
    torch.testing.assert_close(compiled, [x for k in range(0, 6, 2) for x in plain[k * count : (k + 1) * count]])
    assert frames == 0


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_bfloat16_is_about_as_near_as_the_fused_kernel(kv_heads: int) -> None:
    """Of the result and of each gradient, in norm: at most 2.5 times as far from float64's, on the same inputs."""
    given = inputs(torch.bfloat16, kv_heads)
    exact = by_tiles([x.detach().double().requires_grad_() for x in given], None, None, 0, at_once=0)
    fused, ours = (by_tiles(given, None, None, 0, at_once=at_once) for at_once in (0, LENGTH))
    for own, other, right in zip(ours, fused, exact, strict=True):
        error, allowed = (own.double() - right).norm(), (other.double() - right).norm()
        assert error <= 2.5 * allowed, (error / allowed).item()
