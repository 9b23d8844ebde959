"""The norm ops' CUDA kernels on a GPU, against float64, torch.nn.functional and the PyTorch references.

What needs no GPU, with planted mistakes, is in tests/ops/test_norm_cuda.py.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from ops import norm_cases
from ops.norm_cases import EPS, Exact, assert_equals_float64
from torch import Tensor

from megahp.ops import normalize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

OPS = torch.ops.megahp
KINDS = ["rms", "layer", "layer without bias"]
# Half a unit in the last place of the greatest value, and room for sums.
PRECISION = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = [
    (1, 1, 1),
    (2, 3, 7),
    (3, 130, 24),
    (5, 11, 257),
    (40, 3, 128),
    (4, 512, 8, 64),
    (5,),
    (300, 16),
    (2, 300, 1000),
    (3, 700, 4096),
    (1, 1000, 8192),
    (2, 40, 12288),
    (2, 40, 16384),
    (1, 40, 16388),
    (1, 30, 65535),
    (1, 30, 65536),
    (0, 3, 8),
    (2, 0, 8),
]


def test_the_kernels_serve():
    """Else all below would test the PyTorch references."""
    for op in ("norm", "norm_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"megahp::{op}", "CUDA"), "`make install` builds them"


Case = functools.partial(norm_cases.Case, device="cuda")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_equals_float64(dtype, shape):
    assert_equals_float64(Case(shape, dtype), OPS, PRECISION)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_the_same_from_run_to_run(dtype, shape):
    case = Case(shape, dtype)
    first = case.outcome(OPS)
    for _ in range(3):
        again = case.outcome(OPS)
        assert [name for name in first if not torch.equal(first[name], again[name])] == []


def functional(kind: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if kind == "rms":
        return F.rms_norm(x, x.shape[-1:], weight, eps=EPS)
    return F.layer_norm(x, x.shape[-1:], weight, bias if kind == "layer" else None, eps=EPS)


def ours(kind: str, x: Tensor, weight: Tensor, bias: Tensor, probe: Tensor | None = None) -> Tensor:
    return normalize(x, weight, bias if kind == "layer" else None, probe, centered=kind != "rms", eps=EPS)


@pytest.mark.parametrize("shape", [(3, 130, 257), (4, 200, 1024), (2, 64, 4096)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_further_from_float64_than_torch_is(kind, shape):
    """In bfloat16: twice torch's own error is allowed."""
    case = Case(shape, torch.bfloat16)
    inputs = [t.requires_grad_() for t in (case.x, case.weight, case.bias)]
    doubles = [t.detach().double().requires_grad_() for t in inputs]

    def results(f, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
        y = f(kind, *inputs)
        gradients = torch.autograd.grad(y, inputs, dy, allow_unused=True)
        return [y, *(g for g in gradients if g is not None)]

    wanted = results(functional, doubles, case.dy.double())
    for got, theirs, want in zip(
        results(ours, inputs, case.dy), results(functional, inputs, case.dy), wanted, strict=True
    ):
        error, allowed = ((t.double() - want).abs().max() for t in (got, theirs))
        assert error <= 2 * allowed


@pytest.mark.parametrize("kind", KINDS)
def test_probe_is_the_loop_over_examples(kind):
    case = Case((4, 70, 1024), torch.float32)
    parameters = [case.weight, case.bias] if kind == "layer" else [case.weight]
    for parameter in parameters:
        parameter.requires_grad_()
    probe = torch.zeros((), device="cuda", requires_grad=True)
    ours(kind, case.x, case.weight, case.bias, probe).backward(case.dy)
    loop = torch.zeros((), device="cuda", dtype=torch.float64)
    for b in range(4):
        y = ours(kind, case.x[b : b + 1], case.weight, case.bias)
        loop += sum(g.double().square().sum() for g in torch.autograd.grad(y, parameters, case.dy[b : b + 1]))
    torch.testing.assert_close(probe.grad.double(), loop, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_does_not_matter(dtype):
    case = Case((3, 6, 64), dtype)
    wanted = case.outcome(OPS)
    for name in vars(case):
        strided, shifted = Case((3, 6, 64), dtype), Case((3, 6, 64), dtype)
        tensor = getattr(case, name)
        setattr(strided, name, tensor.repeat_interleave(2, -1)[..., ::2])
        moved = torch.empty(tensor.numel() + 1, dtype=dtype, device="cuda")[1:].view(tensor.shape).copy_(tensor)
        setattr(shifted, name, moved)
        for other in (strided, shifted):
            for form, value in other.outcome(OPS).items():
                torch.testing.assert_close(value, wanted[form], rtol=2**-7, atol=2**-7)


def test_runs_on_the_current_stream():
    """Inputs that another stream is still writing, after a long wait, are waited for, and by that stream alone."""
    case = Case((4, 500, 4096), torch.bfloat16)
    wanted = case.outcome(OPS)
    late = Case((4, 500, 4096), torch.bfloat16)
    for tensor in vars(late).values():
        tensor.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for name, tensor in vars(case).items():
            getattr(late, name).copy_(tensor)
        got = late.outcome(OPS)
        assert not stream.query(), "an op waited for the device"
    torch.cuda.synchronize()
    assert [name for name in wanted if not torch.equal(wanted[name], got[name])] == []


def test_captured_in_a_graph():
    case = Case((4, 500, 4096), torch.bfloat16)
    case.outcome(OPS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.outcome(OPS)
    for seed in range(3):
        case.x.normal_(generator=torch.Generator("cuda").manual_seed(seed))
        graph.replay()
        wanted = case.outcome(OPS)
        assert [name for name in wanted if not torch.equal(wanted[name], captured[name])] == []


def test_without_synchronisation():
    case = Case((2, 30, 1000), torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.outcome(OPS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_on_a_device_that_is_not_current():
    wanted = Case((3, 130, 1024), torch.bfloat16, device="cuda:0").outcome(OPS)
    case = Case((3, 130, 1024), torch.bfloat16, device="cuda:0")
    for name, tensor in vars(case).items():
        setattr(case, name, tensor.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    for name, value in case.outcome(OPS).items():
        assert value.device == torch.device("cuda:1") and torch.equal(value.to("cuda:0"), wanted[name]), name


def test_tensors_of_two_devices_are_refused():
    with pytest.raises(RuntimeError, match="on the device of x"):
        normalize(torch.ones(2, 3, device="cuda"), torch.ones(3), centered=False, eps=EPS)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_and_gradcheck(kind):
    case = Case((2, 3, 5), torch.float64)
    probe = torch.zeros((), device="cuda", dtype=torch.float64)
    bias = case.bias.requires_grad_() if kind == "layer" else None
    x, weight, centered = case.x.requires_grad_(), case.weight.requires_grad_(), kind != "rms"
    run = functools.partial(normalize, centered=centered, eps=EPS)
    assert torch.autograd.gradcheck(run, (x, weight, bias, probe))
    torch.library.opcheck(OPS.norm.default, (x, None, 1.0, weight, bias, probe.requires_grad_(), centered, EPS, ""))


def test_compiles_as_one_graph():
    rms, layer = Case((3, 5, 1024), torch.float32), Case((3, 5, 1024), torch.float32)
    inputs = [t.requires_grad_() for t in (rms.x, rms.weight, layer.weight, layer.bias)]
    probe = torch.zeros((), device="cuda", requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return ours("layer", ours("rms", x, rms.weight, rms.bias, probe).tanh(), layer.weight, layer.bias, probe)

    def gradients(f) -> tuple[Tensor, ...]:
        return torch.autograd.grad(f(rms.x), [*inputs, probe], rms.dy)

    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(gradients(compiled), gradients(block), rtol=1e-4, atol=1e-4)


def test_offsets_beyond_32_bits():
    rows, width = (2**31 + 2**20) // 4096, 4096
    needed = 3 * 2 * rows * width * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory")
    x = torch.ones(1, rows, width, device="cuda", dtype=torch.bfloat16)
    x[0, -1] = torch.arange(width, device="cuda").remainder(7) - 3
    weight = torch.ones(width, device="cuda")
    last, how = x[:, -1:], (weight, None, None, False, EPS, "")
    _, y, rstd = OPS.norm(x, None, 1.0, *how)
    dx, *_ = OPS.norm_backward(x, None, x, weight, rstd, False, False, False)
    _, wanted_y, wanted_rstd = Exact.norm(last, None, 1.0, *how)
    wanted_dx, *_ = Exact.norm_backward(last, None, last, weight, wanted_rstd, False, False, False)
    assert (y[:, -1:] - wanted_y).abs().max() <= 2**-8 * wanted_y.abs().max()
    assert (dx[:, -1:] - wanted_dx).abs().max() <= 2**-6
