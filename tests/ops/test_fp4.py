"""Simulated FP4: values against torchao's and a reference that looks them up, rounding at random against its mean, the
three products one block at a time, and a model that multiplies so."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from corpus import write_corpus
from distributed import runs, world
from distributed.training import Training, differences, settings_of, train
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

from megahp import checkpoint
from megahp.checkpoint.shards import Tensors
from megahp.config import ComputeConfig
from megahp.config.schema import FP4_BLOCKS
from megahp.ops.fp4 import SCALES, Rounding, fp4_linear

FORMATS = list(FP4_BLOCKS)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operand() -> torch.Tensor:
    """Of many sizes, with zeros, an outlier and elements halfway between values."""
    x = drawn(48, 64) * torch.logspace(-6, 3, 48)[:, None]
    x[3, :32] = 0
    x[5] = 0
    x[7, 9] = -1e4
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6])
    x[9] = torch.cat((ties, -ties)).repeat(4)
    return x


def exact(x: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that can be the tensor's scale."""
    return 2 ** per_tensor_amax_to_scale(x.abs().max()).log2().ceil()


def test_mxfp4_is_torchaos() -> None:
    x = operand()
    scale, codes = to_mx(x, torch.float4_e2m1fn_x2, 32)
    theirs = to_dtype(codes, scale, torch.float4_e2m1fn_x2, 32, torch.float32)
    assert torch.equal(Rounding("mxfp4")(x), theirs)


def test_mxfp4_rounded_at_random_has_torchaos_upper_scales() -> None:
    x = operand()
    scale, _ = to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.RCEIL)
    largest = x.unflatten(-1, (-1, 32)).abs().amax(-1)
    ours = Rounding("mxfp4", stochastic=True)._scales(largest)
    assert torch.equal(ours[largest > 0], scale.float()[largest > 0])


def test_nvfp4_is_torchaos() -> None:
    """With one scale for the tensor that is a power of two. Theirs may be any number, and changes the digits."""
    x = operand()
    for scale, same in ((exact(x), True), (exact(x) * 0.7, False)):
        blocks, codes = nvfp4_quantize(x, 16, scale)
        values = f4_unpacked_to_f32(unpack_uint4(codes)).unflatten(-1, (-1, 16))
        theirs = (values * blocks.float()[..., None] * scale).flatten(-2)
        assert torch.equal(Rounding("nvfp4")(x), theirs) is same


def looked_up(value: float, values: np.ndarray) -> float:
    """The nearest of ascending values; of two as near, the one whose last bit is 0."""
    distance = np.abs(values - value)
    near = np.flatnonzero(distance == distance.min())
    return values[near[near % 2 == 0][0] if len(near) > 1 else near[0]]


@pytest.mark.parametrize(
    ("kind", "exponents", "most"), [("nvfp4", range(-6, 9), 448), ("ue5m3", range(-14, 17), 114688)]
)
def test_scales_without_one_for_the_tensor_are_looked_up(kind: str, exponents: range, most: float) -> None:
    x = (operand() / 3).double()
    scales = np.array([2.0**exponent * (1 + digits / 8) for exponent, digits in product(exponents, range(8))])
    scales = scales[scales <= most]
    assert scales[0] == SCALES[kind].least and scales[-1] == most
    wanted = torch.zeros_like(x)
    for row, block in product(range(48), range(4)):
        values = x[row, 16 * block : 16 * block + 16].numpy()
        scale = looked_up(np.abs(values).max() / 6, scales)
        rounded = [np.sign(v) * scale * looked_up(abs(v) / scale, E2M1) for v in values]
        wanted[row, 16 * block : 16 * block + 16] = torch.tensor(rounded)
    found = Rounding(kind, tensor_scale=False)(x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert found[12].any() == (kind == "ue5m3")  # below E4M3's range without a scale for the tensor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", FORMATS)
def test_rounding_twice_is_rounding_once(kind: str, dtype: torch.dtype) -> None:
    """So values are exact in the dtype. The tensor's scale is too small in fp16."""
    rounding = Rounding(kind, tensor_scale=dtype != torch.float16)
    once = rounding(drawn(8, 64).to(dtype))
    assert once.dtype == dtype and torch.equal(rounding(once), once)
    assert not Rounding(kind)(torch.zeros(2, 64, dtype=dtype)).any()


@pytest.mark.parametrize("kind", FORMATS)
def test_random_rounding_has_the_value_as_its_mean(kind: str) -> None:
    """Over seeds, for each element; and over blocks, with one seed."""
    x = drawn(4, 64)
    found = torch.stack([Rounding(kind, stochastic=True, seed=seed)(x) for seed in range(1000)]).double()
    spread = found.std(0)
    # of 256 elements 1 in 1e5 by chance; what is rarely rounded up may never have been
    assert ((found.mean(0) - x).abs() <= 4.5 * spread / 1000**0.5 + 0.002).all()
    assert (spread > 0).float().mean() > 0.9
    blocks = drawn(5000, 32)
    blocks[:, ::5] = 0.3
    blocks[:, 0] = 3.3  # sets the scale
    blocks[:, 16] = 3.3
    error = (Rounding(kind, stochastic=True)(blocks) - blocks).double()
    assert (error.mean(0).abs() <= 4.5 * error.std(0) / 5000**0.5 + 1e-6).all()
    mean_square = error.square().mean().item()
    assert error.mean().item() ** 2 < 20 * mean_square / error.numel()  # they do not err together
    assert np.corrcoef(error[:, 5], error[:, 10])[0, 1] ** 2 < 20 / 5000  # nor do those of a block
    nearest = (Rounding(kind)(blocks) - blocks).double()
    assert nearest[:, 5].mean().abs() > 4.5 * error[:, 5].std() / 5000**0.5  # which the test can see


def test_random_rounding_is_of_the_block_alone() -> None:
    """Wherever it stands; not of the last digits, which sums in another order change."""
    x = drawn(64, 64).double()
    rounding = Rounding("nvfp4", stochastic=True, tensor_scale=False)
    found = rounding(x)
    assert torch.equal(rounding(x[40:50, 16:48]), found[40:50, 16:48])
    assert torch.equal(rounding(x.view(4, 16, 64)[:, :, :]).view(64, 64), found)
    torch.testing.assert_close(rounding(x * (1 + 1e-13 * drawn(64, 64, seed=2))), found, rtol=1e-10, atol=0)
    assert not torch.equal(Rounding("nvfp4", stochastic=True, tensor_scale=False, seed=1)(x), found)


def test_a_part_is_rounded_as_the_whole() -> None:
    x = drawn(64, 64) * torch.logspace(-1, 1, 64)[:, None]
    for kind, hadamard, stochastic in product(FORMATS, (False, True), (False, True)):
        rounding = Rounding(kind, hadamard, stochastic=stochastic)
        assert torch.equal(rounding(x[:8, :32]), rounding(x)[:8, :32])


@pytest.mark.parametrize("kind", FORMATS)
def test_rotation_leaves_products_and_spreads_outliers(kind: str) -> None:
    rotation, size = Rounding(kind, hadamard=True).rotation, FP4_BLOCKS[kind]
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size).double(), rtol=0, atol=1e-15)
    torch.testing.assert_close(rotation.abs(), torch.full((size, size), size**-0.5).double())
    outlier = torch.zeros(1, size)
    outlier[0, 3] = 6
    (magnitude,) = Rounding(kind, hadamard=True)(outlier).abs().unique()
    assert 0.9 < magnitude / (6 / size**0.5) < 1.1


def chosen(**settings: Any) -> ComputeConfig:
    return ComputeConfig(**{f"fp4_{key}": value for key, value in settings.items()})


CHOICES = {
    "forward": chosen(forward="mxfp4"),
    "backward": chosen(backward="nvfp4", hadamard="backward"),
    "apart": chosen(forward="mxfp4", backward="ue5m3", hadamard="forward", tensor_scale="none", stochastic=True),
    "both": chosen(forward="nvfp4", backward="mxfp4", hadamard="both", stochastic=True),
}


def in_blocks(a: torch.Tensor, b: torch.Tensor, kind: str, rotated: bool, scaled: bool, at_random: bool) -> Any:
    """a b^T of [m, n] and [k, n], one block of n at a time; kind none: as they are."""
    if kind == "none":
        return a @ b.T
    first, second = Rounding(kind, rotated, scaled, at_random), Rounding(kind, rotated, scaled)
    size = FP4_BLOCKS[kind]
    return sum(
        first(a[:, at : at + size].contiguous()) @ second(b[:, at : at + size].contiguous()).T
        for at in range(0, a.shape[1], size)
    )


@pytest.mark.parametrize("choice", CHOICES)
def test_each_product_rounds_along_what_it_sums_over(choice: str) -> None:
    compute = CHOICES[choice]
    x, weight, grad = drawn(2, 64, 96).double(), drawn(32, 96, seed=2).double(), drawn(2, 64, 32, seed=3).double() / 64
    bias = drawn(32, seed=4).double()
    ours = [each.clone().requires_grad_() for each in (x, weight, bias)]
    y = fp4_linear(compute, 0, torch.device("cpu"))(*ours)
    y.backward(grad)

    def by(direction: str, stochastic: bool = False) -> tuple[str, bool, bool, bool]:
        kind = compute.fp4.get(direction, "none")
        return kind, *(s in (direction, "both") for s in (compute.fp4_hadamard, compute.fp4_tensor_scale)), stochastic

    forward, backward = by("forward"), by("backward", compute.fp4_stochastic)
    wanted = [
        torch.stack([in_blocks(rows, weight, *forward) for rows in x]) + bias,
        torch.stack([in_blocks(rows, weight.T, *backward) for rows in grad]),
        sum(in_blocks(out.T, rows.T, *backward) for out, rows in zip(grad, x, strict=True)),
        grad.sum((0, 1)),
    ]
    plain = [F.linear(x, weight, bias), grad @ weight, grad.flatten(0, 1).T @ x.flatten(0, 1)]
    for ours_, theirs in zip((y, *(each.grad for each in ours)), wanted, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-10, atol=1e-12)
    for found, unrounded, direction in zip(wanted, plain, ("forward", "backward", "backward"), strict=False):
        error = ((found - unrounded).norm() / unrounded.norm()).item()
        assert 0.05 < error < 0.4 if direction in compute.fp4 else error < 1e-12


def test_gradients_rounded_at_random_are_right_on_average() -> None:
    """Against the gradients of the operands that are rounded to nearest."""
    x, weight, grad = drawn(1, 64, 32), drawn(32, 32, seed=2), drawn(1, 64, 32, seed=3)
    found = []
    for seed in range(400):
        ours = [each.clone().requires_grad_() for each in (x, weight)]
        fp4_linear(chosen(backward="nvfp4", stochastic=True), seed, torch.device("cpu"))(*ours, None).backward(grad)
        found.append(torch.cat([each.grad.flatten() for each in ours]))
    nearest = Rounding("nvfp4")
    wanted = [grad @ nearest(weight.T.contiguous()).T, grad[0].T @ nearest(x[0].T.contiguous()).T]
    gradients = torch.stack(found).double()
    off = gradients.mean(0) - torch.cat([each.flatten() for each in wanted])
    assert (off.abs() <= 5 * gradients.std(0) / 400**0.5).all()
    assert off.norm() < 0.1 * (gradients[0] - gradients.mean(0)).norm()


FP4 = (
    *("model.width=64", "model.heads=8", "model.kv_heads=4", "model.mlp_width=64", "data.sequence_length=32"),
    *("compute.fp4_forward=nvfp4", "compute.fp4_backward=mxfp4", "compute.fp4_hadamard=backward"),
    *("compute.fp4_stochastic=true", "train.dtype=float64"),
)
WAYS = {
    "plain": (),
    "full": ("compute.recompute=full",),
    "selective": ("compute.recompute=selective",),
    "compiled": ("compute.compile=true",),
}


def trained(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: train(settings_of("llama", *FP4, *words), 2) for name, words in WAYS.items()}
    (model,) = Training(settings_of("llama", *FP4)).engine.stages
    found["replaced"] = [module.linear is not F.linear for module in model.modules() if hasattr(module, "linear")]
    write_corpus(folder / "corpus")
    data = (f'data.train=["{folder}/corpus"]', "model.vocab_size=300", f"log.root={folder}", "checkpoint.every=2")
    for name, parts in {"whole": (4,), "cut": (2, 4)}.items():
        for steps in parts:
            words = (*FP4, *data, "train.dtype=float32", f"log.name={name}", f"train.steps={steps}")
            runs.go(settings_of("llama", *words), steps == 4)
        found[name] = dict(Tensors(checkpoint.find(folder / name)).items())
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return world.run_afresh(1, trained, tmp_path_factory.mktemp("runs"))[0]


def test_hidden_matrices_alone_are_multiplied_so(outcomes: dict[str, Any]) -> None:
    assert outcomes["replaced"] == [True] * 10 + [False]  # the unembedding


@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_every_way_rounds_alike(outcomes: dict[str, Any], way: str) -> None:
    assert differences(outcomes[way], outcomes["plain"], 1e-10, 1e-10) == []


def test_it_resumes_to_the_bit(outcomes: dict[str, Any]) -> None:
    whole, resumed = outcomes["whole"], outcomes["cut"]
    assert whole.keys() == resumed.keys() and all(whole[name].equal(resumed[name]) for name in whole)
