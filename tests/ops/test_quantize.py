"""Quantized weights against torchao's, which users quantize exports with; their gradient; and a model that has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import world
from distributed.training import settings_of
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.quantization.quant_primitives import MappingType

from megahp.config import with_values
from megahp.evaluate.decode import arrange_products
from megahp.evaluate.sample import single_rank_model
from megahp.ops.quantize import BITS, quantized, quantized_linear
from megahp.parallel.parameters import parameters, storage
from megahp.parallel.tensor import ColumnParallelLinear, RowParallelLinear

TORCHAO = {"int4": torch.int4, "int8": torch.int8}


def weights() -> torch.Tensor:
    """Of many sizes, with a group of zeros and one whose largest is negative."""
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, 48)[:, None]
    weight[3, :32] = 0
    weight[5, 7] = -1e4
    return weight


@pytest.mark.parametrize("kind", BITS)
def test_equals_torchao(kind: str) -> None:
    weight = weights()
    layer = nn.Linear(64, 48, bias=False)
    layer.weight.data.copy_(weight)
    mapping = MappingType.SYMMETRIC_NO_CLIPPING_ERR
    config = IntxWeightOnlyConfig(weight_dtype=TORCHAO[kind], granularity=PerGroup(32), mapping_type=mapping)
    quantize_(layer, config)
    torch.testing.assert_close(quantized(weight, BITS[kind], 32), layer.weight.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_is_on_the_grid_and_passes_gradients(dtype: torch.dtype) -> None:
    """The weight's gradient is that of the rounded weight."""
    weight = (weights() / 1e4).to(dtype).requires_grad_()
    rounded = quantized(weight.detach(), 4, 32).requires_grad_()
    assert rounded.dtype == dtype and not rounded[3, :32].any()
    assert all(len(group.unique()) <= 16 for group in rounded.detach().unflatten(-1, (-1, 32)).flatten(0, 1))
    generator, found = torch.Generator().manual_seed(2), []
    x, gradient = (torch.randn(3, 5, size, generator=generator).to(dtype) for size in (64, 48))
    for linear, matrix in ((quantized_linear(4, 32), weight), (F.linear, rounded)):
        own = x.clone().requires_grad_()
        y = linear(own, matrix, None)
        y.backward(gradient)
        found.append((y, own.grad, matrix.grad))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def rounded_by_hand() -> dict[str, Any]:
    """A quantized model's logits, and those of a plain model whose hidden matrices are quantized ones."""
    config = settings_of("llama", "model.quantize=int4", "model.quantize_group=8", "train.dtype=float64")
    model = single_rank_model(config)
    plain = single_rank_model(with_values(config, {"model.quantize": "none", "model.quantize_group": 32}))
    originals = dict(parameters(model))
    products = {
        f"{name}.weight"
        for name, module in plain.named_modules()
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and ".blocks." in f".{name}"
    }
    for name, weight in parameters(plain):
        original = storage(originals[name])
        storage(weight).copy_(quantized(original, 4, 8) if name in products else original)
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():
        found = {"quantized": model(tokens), "by hand": plain(tokens), "products": len(products)}
        arrange_products(model)
        return found | {"arranged": model(tokens)}


def test_a_model_multiplies_by_them() -> None:
    (found,) = world.run(1, rounded_by_hand)
    assert found["products"] == 10  # of two blocks: queries, keys and values; output; up; gate; down
    for kind in ("quantized", "arranged"):
        torch.testing.assert_close(found[kind], found["by hand"], rtol=1e-12, atol=1e-12)
