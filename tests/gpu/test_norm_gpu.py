"""The norm ops on a GPU, where the PyTorch references serve, against torch.nn.functional in float64."""

import pytest
import torch
import torch.nn.functional as F

from megahp.ops import layer_norm, rms_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 130, 257), (4, 2, 65, 1024)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)], ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_equals_float64(kind, dtype, tolerance, shape):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).to("cuda", dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=generator).to("cuda") for _ in range(2))
    probe = torch.zeros((), device="cuda", requires_grad=True)
    parameters = [weight] if kind == "rms" else [weight, bias]
    inputs = [t.requires_grad_() for t in (x, *parameters)]
    exact = [t.detach().double().requires_grad_() for t in inputs]

    def functional(x):
        if kind == "rms":
            return F.rms_norm(x, x.shape[-1:], *exact[1:], eps=1e-5)
        return F.layer_norm(x, x.shape[-1:], *exact[1:], eps=1e-5)

    y = rms_norm(x, weight, probe, 1e-5) if kind == "rms" else layer_norm(x, weight, bias, probe, 1e-5)
    *gradients, squared = torch.autograd.grad(y, [*inputs, probe], dy)
    wanted = functional(exact[0])
    wanted_gradients = torch.autograd.grad(wanted, exact, dy.double())
    wanted_squared = sum(
        g.square().sum()
        for example, d in zip(exact[0], dy.double(), strict=True)
        for g in torch.autograd.grad(functional(example), exact[1:], d)
    )

    def assert_near(got, want, tolerance):
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max().clamp(min=1)

    assert y.dtype == gradients[0].dtype == dtype
    assert_near(y, wanted, tolerance)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        assert_near(got, want, tolerance)
    assert_near(squared, wanted_squared, 1e-5)
