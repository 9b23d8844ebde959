"""The norm ops in every form, and what they should return: for their CUDA kernels, emulated and on a GPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from megahp.ops import norm

EPS = 1e-5


class Case:
    """Inputs of a shape and a dtype, drawn by its shape; mean is that of x."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        weight_dtype: torch.dtype | None = None,
        device: str = "cpu",
        mean: float = 0.0,
    ) -> None:
        generator = torch.Generator(device).manual_seed(sum(shape))
        draw = functools.partial(torch.randn, generator=generator, device=device, dtype=torch.float64)
        self.x, self.branch, self.dy, self.dstream = (draw(shape).to(dtype) for _ in range(4))
        self.x += mean
        self.weight, self.bias = (draw(shape[-1]).to(weight_dtype or dtype) for _ in range(2))

    def outcome(self, ops: Any) -> dict[str, Tensor]:
        """Every op in every form, the backward with the statistics that the forward returned; ops are a namespace of
        torch.ops, or Exact."""
        x, weight, bias, out = self.x, self.weight, self.bias, {}

        def record(form: str, *results: Tensor) -> None:
            out.update({f"{form}: {i}": result for i, result in enumerate(results)})

        def forward(form: str, branch: Tensor | None, alpha: float, bias: Tensor | None, centered: bool) -> Tensor:
            stream, y, statistics = ops.norm(x, branch, alpha, weight, bias, None, centered, EPS, "")
            record(form, stream, y, *statistics)
            return statistics

        def backward(form: str, dstream: Tensor | None, *arguments: Any) -> None:
            record(form, *ops.norm_backward(self.dy, dstream, x, weight, *arguments))

        forward("add_rms", self.branch, 0.5, None, False)
        forward("add_layer", self.branch, -2.0, bias, True)
        forward("layer without bias", None, 1.0, None, True)
        rms, layer = forward("rms", None, 1.0, None, False), forward("layer", None, 1.0, bias, True)
        for form, dstream in (("alone", None), ("with the stream's", self.dstream)):
            backward(f"rms backward {form}", dstream, rms, False, False, False)
            backward(f"rms backward {form} by example", dstream, rms, False, True, False)
        backward("layer backward", self.dstream, layer, True, False, True)
        backward("layer backward by example", None, layer, True, True, False)
        return out


class Exact:
    """The PyTorch references, whose own tests are in test_norm.py, in float64."""

    @staticmethod
    def norm(x: Tensor, branch: Tensor | None, alpha: float, *arguments: Any) -> tuple[Tensor, ...]:
        """What is normalized after an addition is the stream as rounded."""
        if branch is None:
            return norm.norm_reference(x.double(), None, alpha, *in_float64(arguments))
        dtype = norm._accumulation_dtype(x)
        stream = (x.to(dtype) + alpha * branch.to(dtype)).to(x.dtype).double()
        return stream, *norm.norm_reference(stream, None, 1.0, *in_float64(arguments))[1:]

    @staticmethod
    def norm_backward(*arguments: Any) -> tuple[Tensor, ...]:
        return norm.norm_backward_reference(*in_float64(arguments))


def in_float64(arguments: tuple[Any, ...]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) else a for a in arguments]


def assert_equals_float64(case: Case, ops: Any, precision: dict[torch.dtype, float]) -> None:
    """precision: the error allowed of the greatest value, by the dtype of a result."""
    wanted, outcome = case.outcome(Exact), case.outcome(ops)
    assert outcome.keys() == wanted.keys()
    for name, got in outcome.items():
        want = wanted[name]
        assert got.shape == want.shape and got.is_contiguous() and got.device == case.x.device, name
        if got.numel():
            error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1)
            assert error <= precision[got.dtype], f"{name}: error {error:.1e}"
