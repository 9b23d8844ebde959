"""The contract of the adapters to other engines, against stand-ins that take what the real ones' signatures take."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import world
from distributed.training import Training, settings_of
from ops.engine_signatures import PLACES, RECORDED, signatures, taking
from torch import Tensor, nn
from torch.func import functional_call

from megahp.errors import UserError
from megahp.ops.engines import linear_of, norm_of


def fused_rms_norm_affine(x: Tensor, weight: Tensor, shape: Any, eps: float = 1e-6) -> Tensor:
    assert weight.dtype == x.dtype
    return F.rms_norm(x, tuple(shape), weight, eps)


def fused_layer_norm_affine(x: Tensor, weight: Tensor, bias: Tensor, shape: Any, eps: float = 1e-6) -> Tensor:
    assert weight.dtype == bias.dtype == x.dtype
    return F.layer_norm(x, tuple(shape), weight, bias, eps)


class _Norm(torch.autograd.Function):
    """Its backward pass reads the weights from the module, as Transformer Engine's does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: RMSNorm, *_: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        return module.normalized(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (x, *ctx.module.parameters())]
            y = functional_call(ctx.module, dict(zip(ctx.module._parameters, inputs[1:], strict=True)), inputs[0])
            dx, *gradients = torch.autograd.grad(y, inputs, dy)
        return dx, None, *gradients


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float = 1e-5, device: str = "cuda") -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.empty(size, device=device))

    def normalized(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        inside = torch._C._current_graph_task_id() != -1
        return self.normalized(x) if inside else _Norm.apply(x, self, *self.parameters())


class LayerNorm(RMSNorm):
    def __init__(self, size: int, eps: float = 1e-5, device: str = "cuda") -> None:
        super().__init__(size, eps, device)
        self.bias = nn.Parameter(torch.empty(size, device=device))

    def normalized(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Linear(nn.Module):
    """Multiplies only while the recipe of its `autocast` is in force, and only by weights of its own size."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, device: str = "cuda") -> None:
        super().__init__()
        assert not bias
        self.weight = nn.Parameter(torch.empty(outputs, inputs, device=device))
        self.shape = self.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        assert RECIPES and self.weight.shape == self.shape and self.weight.dtype == x.dtype
        return F.linear(x, self.weight)


@dataclass(frozen=True)
class QParams:
    power_2_scale: bool = False


class Float8CurrentScaling:
    fp8_quant_fwd_inp = fp8_quant_fwd_weight = fp8_quant_bwd_grad = QParams()


RECIPES: list[Float8CurrentScaling] = []  # those in force


@contextlib.contextmanager
def autocast(enabled: bool = True, recipe: Float8CurrentScaling | None = None) -> Iterator[None]:
    assert enabled and recipe and not RECIPES
    assert recipe.fp8_quant_fwd_inp.power_2_scale and recipe.fp8_quant_fwd_weight.power_2_scale
    assert recipe.fp8_quant_bwd_grad.power_2_scale
    RECIPES.append(recipe)
    yield
    RECIPES.pop()


def install(names: dict[str, Any]) -> None:
    for package in ("apex", "apex.normalization", "transformer_engine", "transformer_engine.common"):
        names[package] = ModuleType(package)
    names["fused_layer_norm_cuda"] = ModuleType("fused_layer_norm_cuda")
    apex: Any = ModuleType("fused_layer_norm")
    engine: Any = ModuleType("pytorch")
    recipes: Any = ModuleType("recipe")
    names["apex.normalization.fused_layer_norm"] = apex
    names["transformer_engine.pytorch"], names["transformer_engine.common.recipe"] = engine, recipes
    for function in (fused_rms_norm_affine, fused_layer_norm_affine):
        place = f"apex/normalization/fused_layer_norm.py:{function.__name__}"
        setattr(apex, function.__name__, taking(function, place))
    pytorch = "transformer_engine/pytorch"
    engine.RMSNorm = taking(RMSNorm, f"{pytorch}/module/rmsnorm.py:RMSNorm", f"{pytorch}/ops/basic/rmsnorm.py:RMSNorm")
    engine.LayerNorm = taking(
        LayerNorm, f"{pytorch}/module/layernorm.py:LayerNorm", f"{pytorch}/ops/basic/layer_norm.py:LayerNorm"
    )
    engine.Linear = taking(Linear, f"{pytorch}/module/linear.py:Linear")
    engine.autocast = taking(autocast, f"{pytorch}/quantization.py:autocast")
    recipe = "transformer_engine/common/recipe/__init__.py"
    recipes.Float8CurrentScaling = taking(Float8CurrentScaling, f"{recipe}:Float8CurrentScaling")
    recipes.QParams = taking(QParams, f"{recipe}:QParams")


def test_a_stand_in_takes_what_the_real_one_takes() -> None:
    """Or what an adapter may pass would show nothing."""
    linear = taking(lambda *_, **__: None, "transformer_engine/pytorch/module/linear.py:Linear")
    linear(8, 4, bias=False, device="meta")
    with pytest.raises(TypeError, match="dtype"):
        linear(8, 4, dtype=torch.float32)
    place, base = (f"transformer_engine/pytorch/{file}.py:RMSNorm" for file in ("module/rmsnorm", "ops/basic/rmsnorm"))
    norm = taking(lambda *_, **__: None, place, base)
    norm(8, 1e-5, device="meta")
    with pytest.raises(TypeError, match="elementwise_affine"):
        norm(8, 1e-5, elementwise_affine=False)


@pytest.mark.parametrize("package", ["apex", "transformer_engine"])
def test_signatures_are_those_recorded(package: str) -> None:
    """Of the installed package's source, which needs no GPU. After a change: tests/ops/engine_signatures.py."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    folder = Path(found.submodule_search_locations[0]).parent
    recorded = json.loads(RECORDED.read_text())["signatures"]
    for file in (file for file in PLACES if file.startswith(f"{package}/")):
        for name, text in signatures(folder, file).items():
            assert text == recorded[name], name


@pytest.mark.parametrize("engine", ["apex", "transformer-engine"])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_an_engine_gets_what_it_asks_for(
    monkeypatch: pytest.MonkeyPatch, engine: str, kind: str, with_bias: bool
) -> None:
    names: dict[str, Any] = {}
    install(names)
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, generator=generator).bfloat16().requires_grad_()
    weight, bias = (torch.randn(8, generator=generator).requires_grad_() for _ in range(2))
    norm = norm_of(engine, kind)
    y = norm(x, weight, bias if with_bias and kind == "layernorm" else None, 1e-3)
    if kind == "rmsnorm":
        wanted = F.rms_norm(x, (8,), weight.bfloat16(), 1e-3)
    else:
        wanted = F.layer_norm(x, (8,), weight.bfloat16(), (bias if with_bias else 0 * bias).bfloat16(), 1e-3)
    assert torch.equal(y, wanted) and y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0 and x.grad is not None


def test_transformer_engine_gets_what_it_asks_for_to_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    install(names)
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((3, 5, 8), (4, 8), (4,)))
    linear = linear_of("transformer-engine", torch.device("cpu"), 4, 8)
    for b in (bias, None):
        torch.testing.assert_close(linear(x, weight, b), F.linear(x, weight, b))
    linear(x, weight, None).sum().backward()
    assert weight.grad is not None and x.grad is not None and RECIPES == []


WAYS = {
    "plain": (),
    "norms of apex": ("compute.norms=apex",),
    "norms of transformer-engine": ("compute.norms=transformer-engine",),
    "products of transformer-engine": ("compute.fp8=transformer-engine", "train.dtype=float32"),
}


def losses_of_every_way() -> dict[str, list[float]]:
    install(sys.modules)  # type: ignore[arg-type]
    found = {}
    for name, words in WAYS.items():
        size = ("model.head_size=16", "train.noise_scale=false", "train.dtype=float64")
        training = Training(settings_of("gpt2", *size, *words))
        found[name] = [training.step()["measured"]["loss"] for _ in range(2)]
    return found


def test_a_model_trains_the_same_with_another_engine() -> None:
    found = world.run_afresh(1, losses_of_every_way)[0]
    for name, words in WAYS.items():
        rtol = 1e-6 if "train.dtype=float32" in words else 1e-12
        assert found[name] == pytest.approx(found["plain"], rel=rtol), name


def test_a_missing_engine_is_a_users_mistake() -> None:
    for engine, words in (("apex", "github.com/NVIDIA/apex"), ("transformer-engine", "pip install transformer-engine")):
        with pytest.raises(UserError, match=words):
            norm_of(engine, "rmsnorm")
    with pytest.raises(UserError, match="compute.fp8 = 'transformer-engine' is not installed"):
        linear_of("transformer-engine", torch.device("cpu"), 16, 16)


def test_a_half_installed_engine_is_one_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the empty package says that PyPI has under the name, without the parts that compute."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine/__init__.py").write_text("raise RuntimeError('Found empty meta package')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="not installed .Found empty meta package"):
        norm_of("transformer-engine", "rmsnorm")
