"""The norm ops, by reference and by kernel, against torch.nn.functional in float64."""

import contextlib
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megahp.ops import add_and_normalize, norm, normalize

KINDS = ["rms", "layer", "layer without bias"]
ALPHA = 0.5  # of the fused residual addition; a product with it is exact
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
CSRC = Path(__file__).resolve().parents[2] / "csrc"
OPS = torch.ops.megahp
NAMES = ["norm", "norm_backward"]


@contextlib.contextmanager
def references_only() -> Iterator[None]:
    """While open, the PyTorch references serve the CPU too, beside the kernels."""
    with torch.library._scoped_library("megahp", "IMPL") as library:
        with warnings.catch_warnings():
            # Overriding the kernels is the intention.
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            library.impl("norm", norm.norm_reference, "CPU")
            library.impl("norm_backward", norm.norm_backward_reference, "CPU")
        yield


def kernel_loaded() -> bool:
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(f"megahp::{op}", "CPU") for op in NAMES)


@pytest.fixture(params=["reference", "kernel"])
def served_by(request):
    """Runs a test once on the PyTorch references and once on the C++ kernels."""
    if request.param == "reference":
        with references_only():
            yield
    elif kernel_loaded():
        yield
    else:
        pytest.skip("the C++ kernels are not built: run `make install`")


@dataclass
class Case:
    """Inputs of one norm; `bias` is None for an RMSNorm and a LayerNorm without."""

    kind: str
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    dy: Tensor

    def __call__(self, x: Tensor, probe: Tensor | None = None, group: str = "") -> Tensor:
        return normalize(x, self.weight, self.bias, probe, centered=self.centered, eps=EPS, group=group)

    @property
    def centered(self) -> bool:
        return self.kind != "rms"

    def parameters(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


@dataclass
class Outcome:
    y: Tensor
    dx: Tensor
    gradients: list[Tensor]  # of weight and bias
    squared: Tensor  # the probe's gradient


def make(kind: str, shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Case:
    generator = torch.Generator().manual_seed(len(kind) + sum(shape))

    def draw(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    weight_dtype = weight_dtype or dtype
    width = shape[-1]
    x = draw(*shape, dtype=dtype).requires_grad_()
    weight = (1 + draw(width, dtype=weight_dtype)).requires_grad_()
    bias = draw(width, dtype=weight_dtype).requires_grad_() if kind == "layer" else None
    return Case(kind, x, weight, bias, draw(*shape, dtype=dtype))


def measured(case: Case) -> Outcome:
    probe = torch.zeros((), requires_grad=True)
    y = case(case.x, probe)
    dx, *gradients, squared = torch.autograd.grad(y, [case.x, *case.parameters(), probe], case.dy)
    return Outcome(y.detach(), dx, gradients, squared)


def expected(case: Case) -> Outcome:
    """The same by float64 autograd: one backward pass over the batch, and one for each example."""
    x, *parameters = (t.detach().double().requires_grad_() for t in [case.x, *case.parameters()])
    dy = case.dy.double()
    examples = list(zip(x, dy, strict=True)) if x.dim() > 1 else [(x, dy)]

    def functional(x: Tensor) -> Tensor:
        if case.kind == "rms":
            return F.rms_norm(x, x.shape[-1:], *parameters, eps=EPS)
        return F.layer_norm(x, x.shape[-1:], *parameters, eps=EPS)

    def squares(x: Tensor, dy: Tensor) -> Tensor:
        return sum(g.square().sum() for g in torch.autograd.grad(functional(x), parameters, dy))

    y = functional(x)
    dx, *gradients = torch.autograd.grad(y, [x, *parameters], dy)
    squared = sum((squares(*example) for example in examples), torch.zeros((), dtype=torch.float64))
    return Outcome(y.detach(), dx, gradients, squared)


def plain(case: Case) -> Outcome:
    """What torch.nn.functional makes of it in the dtype of x, whose error is the yardstick. It measures no squares."""
    x, *parameters = (t.detach().to(case.x.dtype).requires_grad_() for t in [case.x, *case.parameters()])
    functional = F.rms_norm if case.kind == "rms" else F.layer_norm
    y = functional(x, x.shape[-1:], *parameters, eps=EPS)
    dx, *gradients = torch.autograd.grad(y, [x, *parameters], case.dy)
    return Outcome(y.detach(), dx, gradients, torch.zeros(()))


def error(actual: Tensor, wanted: Tensor) -> float:
    assert actual.shape == wanted.shape
    return (actual.double() - wanted).abs().max().item() if wanted.numel() else 0.0


def assert_near(actual: Tensor, wanted: Tensor, tolerance: float, scale: float = 0.0) -> None:
    """Every element within `tolerance` of the greatest magnitude, or of `scale` where terms are greater."""
    if wanted.numel():
        assert error(actual, wanted) <= tolerance * max(wanted.abs().max().item(), scale)


def assert_as_good(actual: Tensor, torchs: Tensor, wanted: Tensor, scale: float) -> None:
    """An error of at most twice torch's own, plus one rounding to the dtype and some in float32; 1e-12 in float64."""
    if actual.dtype == torch.float64:  # torch's own error is not known
        assert_near(actual, wanted, 1e-12, scale)
    elif wanted.numel():
        roundings = torch.finfo(actual.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
        magnitude = max(wanted.abs().max().item(), scale)
        assert error(actual, wanted) <= 2 * error(torchs, wanted) + roundings * magnitude


def assert_same(case: Case, actual: Outcome, wanted: Outcome) -> None:
    yardstick = plain(case)
    assert actual.y.dtype == actual.dx.dtype == case.x.dtype
    assert [g.dtype for g in actual.gradients] == [p.dtype for p in case.parameters()]
    assert_as_good(actual.y, yardstick.y, wanted.y, scale=1.0)
    # dx is a difference of terms as large as dy weight rstd.
    assert_as_good(actual.dx, yardstick.dx, wanted.dx, scale=largest_term(case))
    for got, torchs, want in zip(actual.gradients, yardstick.gradients, wanted.gradients, strict=True):
        assert_as_good(got, torchs, want, scale=sum_of_rows(case))
    assert_near(actual.squared, wanted.squared, 1e-5, scale=1.0)


def sum_of_rows(case: Case) -> float:
    """The size of a gradient summed over rows of normal numbers, which the final value may be far below."""
    return max(1.0, case.x[..., 0].numel() ** 0.5)


def largest_term(case: Case) -> float:
    if not case.x.numel():
        return 0.0
    x = case.x.detach().double()
    center = x.mean(-1, keepdim=True) if case.centered else 0.0
    rstd = ((x - center).square().mean(-1, keepdim=True) + EPS).rsqrt()
    return (case.dy.double() * case.weight.detach().double() * rstd).abs().max().item()


@pytest.mark.parametrize("width", [1, 3, 7, 64, 257, 1000])
@pytest.mark.parametrize("rows", [0, 1, 5, 130])
@pytest.mark.parametrize("examples", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64(served_by, kind, dtype, examples, rows, width):
    case = make(kind, (examples, rows, width), dtype)
    assert_same(case, measured(case), expected(case))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 2, 7, 64), (2, 3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64_in_any_dimension(served_by, kind, shape):
    case = make(kind, shape, torch.float32)
    assert_same(case, measured(case), expected(case))


@pytest.mark.parametrize("shape", [(3, 70, 4097), (2, 3, 65536), (2, 129, 1023)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64_in_wide_rows(served_by, kind, dtype, shape):
    case = make(kind, shape, dtype)
    assert_same(case, measured(case), expected(case))


@pytest.mark.parametrize("asked", ["avx2", "default"])
def test_equals_float64_on_lesser_processors(asked):
    """The kernels of other instruction sets, which torch's own variable asks for as the extension loads."""
    which = "kernel and (wide_rows or any_dimension or residual)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", which, __file__]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": asked}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def fused(case: Case, x: Tensor, branch: Tensor, alpha: float, probe: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return add_and_normalize(x, branch, alpha, case.weight, case.bias, probe, centered=case.centered, eps=EPS)


@pytest.mark.parametrize("shape", [(3, 70, 64), (2, 5, 257), (2, 3, 4, 7), (1, 0, 3), (0, 2, 3), (5,), (2, 3, 4097)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_residual_addition(served_by, kind, dtype, shape):
    case = make(kind, shape, dtype)
    generator = torch.Generator().manual_seed(1)
    branch, dstream = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    branch.requires_grad_()
    probe = torch.zeros((), requires_grad=True)
    stream, y = fused(case, case.x, branch, ALPHA, probe)
    # torch too adds in float32 and rounds once.
    torch.testing.assert_close(stream, torch.add(case.x, branch, alpha=ALPHA), rtol=0, atol=0)

    inputs = [case.x, branch, *case.parameters(), probe]
    dx, dbranch, *gradients, squared = torch.autograd.grad([stream, y], inputs, [dstream, case.dy])
    torch.testing.assert_close(dbranch, ALPHA * dx, rtol=0, atol=0)
    alone = Case(kind, stream.detach(), case.weight, case.bias, case.dy)  # the norm of what was rounded
    wanted, yardstick = expected(alone), plain(alone)
    assert_as_good(y.detach(), yardstick.y, wanted.y, scale=1.0)
    assert_as_good(dx, yardstick.dx + dstream, wanted.dx + dstream.double(), scale=largest_term(alone))
    for got, torchs, want in zip(gradients, yardstick.gradients, wanted.gradients, strict=True):
        assert_as_good(got, torchs, want, scale=sum_of_rows(case))
    assert_near(squared, wanted.squared, 1e-5, scale=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_residual_addition_with_one_output_used(served_by, kind):
    case = make(kind, (3, 5, 64), torch.float32)
    branch = torch.randn(3, 5, 64, requires_grad=True)
    probe = torch.zeros((), requires_grad=True)
    stream, _ = fused(case, case.x, branch, ALPHA, probe)
    inputs = [case.x, branch, case.weight, probe]
    dx, dbranch, *unused = torch.autograd.grad(stream, inputs, case.dy, allow_unused=True)
    assert torch.equal(dx, case.dy) and torch.equal(dbranch, ALPHA * case.dy) and unused == [None, None]
    stream, y = fused(case, case.x, branch, 1.0, probe)
    dx, dbranch = torch.autograd.grad(y, [case.x, branch], case.dy)
    alone = Case(kind, stream.detach().requires_grad_(), case.weight, case.bias, case.dy)
    assert torch.equal(dx, measured(alone).dx) and torch.equal(dbranch, dx)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_residual_addition(served_by, kind):
    case = make(kind, (2, 3, 5), torch.float64)
    branch = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, branch, *_: fused(case, x, branch, 0.3), (case.x, branch, case.weight))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_offsets_beyond_32_bits(kind):
    width = 65536
    rows = 2**31 // width + 2
    available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    if not available or int(available[1]) * 1024 < 9 * rows * width:
        pytest.skip("takes 18 GiB of memory")
    case = make(kind, (1, 2, width), torch.bfloat16)
    x = torch.zeros(1, rows, width, dtype=torch.bfloat16)
    dy = torch.zeros_like(x)
    x[:, -2:], dy[:, -2:] = case.x.detach(), case.dy
    large, wanted = Case(kind, x.requires_grad_(), case.weight, case.bias, dy), measured(case)
    outcome = measured(large)
    assert torch.equal(outcome.y[:, -2:], wanted.y) and torch.equal(outcome.dx[:, -2:], wanted.dx)
    torch.testing.assert_close(outcome.gradients, wanted.gradients)
    torch.testing.assert_close(outcome.squared, wanted.squared)


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(served_by, kind):
    case = make(kind, (3, 10, 64), torch.float32)
    wanted = expected(case)
    scattered = Case(kind, spread(case.x), spread(case.weight), case.bias, case.dy.mT.contiguous().mT)
    assert not scattered.x.is_contiguous() and not scattered.weight.is_contiguous()
    assert_same(scattered, measured(scattered), wanted)
    branch = spread(case.dy)
    for got, want in zip(
        fused(scattered, scattered.x, branch, ALPHA), fused(case, case.x, case.dy, ALPHA), strict=True
    ):
        assert torch.equal(got, want)


def spread(tensor: Tensor) -> Tensor:
    """The same values, every other element of memory."""
    return tensor.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_()


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_weight_of_another_dtype(served_by, kind, dtype, weight_dtype):
    case = make(kind, (3, 5, 64), dtype, weight_dtype)
    wanted = expected(case)
    outcome = measured(case)
    assert [g.dtype for g in outcome.gradients] == [weight_dtype] * len(outcome.gradients)
    tolerance = max(1e-5, torch.finfo(weight_dtype).eps / 2)
    for got, want in zip(outcome.gradients, wanted.gradients, strict=True):
        assert_near(got, want, tolerance, scale=1.0)
    assert_near(outcome.squared, wanted.squared, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_probe_is_the_loop_over_examples(served_by, kind):
    case = make(kind, (4, 70, 64), torch.float32)
    loop = torch.zeros(())
    for b in range(4):
        gradients = torch.autograd.grad(case(case.x[b : b + 1]), case.parameters(), case.dy[b : b + 1])
        loop += sum(g.square().sum() for g in gradients)
    torch.testing.assert_close(measured(case).squared, loop, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_microbatches_accumulate(served_by, kind):
    case = make(kind, (4, 70, 64), torch.float32)
    probe = torch.zeros((), requires_grad=True)
    for x, dy in zip(case.x.split(2), case.dy.split(2), strict=True):
        case(x, probe).backward(dy)
    torch.testing.assert_close(probe.grad, measured(case).squared, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_probe_keeps_its_dtype(served_by, dtype):
    case = make("layer", (3, 5, 7), torch.float32)
    probe = torch.zeros((), dtype=dtype, requires_grad=True)
    case(case.x, probe).backward(case.dy)
    assert probe.grad.dtype == dtype
    assert_near(probe.grad, expected(case).squared, 1e-2)


def test_gradients_nobody_asks_for_are_none(served_by):
    case = make("layer", (3, 5, 7), torch.float32)
    case.weight.requires_grad_(False)
    for probe in (None, torch.zeros(())):
        case(case.x, probe).backward(case.dy)
    assert case.weight.grad is None and case.bias.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(served_by, kind):
    case = make(kind, (2, 3, 5), torch.float64)
    probe = torch.zeros((), dtype=torch.float64)
    run = partial(normalize, centered=case.centered, eps=EPS)
    assert torch.autograd.gradcheck(run, (case.x, case.weight, case.bias, probe))


def test_a_second_derivative_is_refused(served_by):
    case = make("rms", (2, 3, 5), torch.float32)
    dx = torch.autograd.grad(case(case.x).sum(), case.x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 5), (2, 0, 4), (0, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(served_by, dtype, shape):
    case, probe = make("layer", shape, dtype), torch.zeros((), requires_grad=True)
    x, weight, bias, dy = case.x, case.weight, case.bias, case.dy
    for branch in (None, dy):
        for arguments in ((weight, None, probe, False), (weight, bias, probe, True), (weight, None, None, True)):
            torch.library.opcheck(OPS.norm.default, (x, branch, 0.3, *arguments, EPS, ""))
    x, weight = x.detach(), weight.detach()
    statistics = OPS.norm(x, None, 1.0, weight, None, None, True, EPS, "")[2]
    for dstream in (None, dy):
        for by_example in (False, True):
            arguments = (dy, dstream, x, weight, statistics[1:], False, by_example, False)
            torch.library.opcheck(OPS.norm_backward.default, arguments)
            for biased in (False, True):
                arguments = (dy, dstream, x, weight, statistics, True, by_example, biased)
                torch.library.opcheck(OPS.norm_backward.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_example_leaves_the_sum_to_the_caller(served_by, dtype):
    case = make("layer", (3, 70, 65), dtype)
    x, weight = case.x.detach(), case.weight.detach()
    statistics = OPS.norm(x, None, 1.0, weight, None, None, True, EPS, "")[2]
    backward = partial(OPS.norm_backward, case.dy, None, x, weight, statistics, True)
    dx, dweight, dbias, squares = backward(True, True)
    dx_too, *summed, squared = backward(False, True)
    assert dweight.shape == dbias.shape == (3, 65) and squares == 0 and torch.equal(dx, dx_too)
    torch.testing.assert_close([dweight.sum(0), dbias.sum(0)], summed)
    torch.testing.assert_close(dweight.square().sum() + dbias.square().sum(), squared)
    _, dweight_too, empty, squares = backward(False, False)
    assert torch.equal(dweight_too, summed[0]) and empty.shape == (0,)
    torch.testing.assert_close(squares, dweight.square().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_counts_once(served_by, kind):
    case = make(kind, (3, 5, 64), torch.float32)
    probe = torch.zeros((), requires_grad=True)
    checkpoint(case, case.x, probe, use_reentrant=False).backward(case.dy)
    torch.testing.assert_close(probe.grad, measured(case).squared, rtol=0, atol=0)

    def gradients(run) -> tuple[Tensor, ...]:
        probe = torch.zeros((), requires_grad=True)
        stream, y = run(lambda x, probe: fused(case, x, x.tanh(), 1.0, probe), case.x, probe)
        return torch.autograd.grad(stream.sin() + y, [case.x, *case.parameters(), probe], case.dy)

    recomputed = gradients(lambda *work: checkpoint(*work, use_reentrant=False))
    torch.testing.assert_close(recomputed, gradients(lambda f, *inputs: f(*inputs)), rtol=0, atol=0)


def test_compiles_as_one_graph(served_by):
    rms, layer = make("rms", (3, 5, 64), torch.float32), make("layer", (3, 5, 64), torch.float32)

    def block(x: Tensor, probe: Tensor) -> Tensor:
        stream, y = fused(rms, x, layer(rms(x, probe).tanh(), probe), 0.3, probe)
        stream, y = fused(layer, stream, y, 1.0, probe)
        return stream + y

    def gradients(f) -> tuple[Tensor, ...]:
        probe = torch.zeros((), requires_grad=True)
        inputs = [rms.x, *rms.parameters(), *layer.parameters(), probe]
        return torch.autograd.grad(f(rms.x, probe), inputs, rms.dy)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(gradients(compiled), gradients(block), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bitwise_the_same_from_run_to_run_and_thread_to_thread(served_by, kind, dtype):
    case = make(kind, (3, 130, 1000), dtype)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (threads, threads, 1, 3):
            torch.set_num_threads(count)
            runs.append(measured(case))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        torch.testing.assert_close(vars(run), vars(runs[0]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(2, 3), torch.ones(4), "weight and bias must be"),
        (torch.ones(2, 3), torch.ones(1, 3), "weight and bias must be"),
        (torch.ones(2, 0), torch.ones(0), "D >= 1"),
        (torch.tensor(1.0), torch.ones(1), "D >= 1"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(3), "x must be float"),
    ],
)
def test_misuse_is_told(served_by, x, weight, message):
    for centered in (False, True):
        with pytest.raises(RuntimeError, match=message):
            normalize(x, weight, centered=centered, eps=EPS)


def test_misuse_of_the_backward_and_the_bias_is_told(served_by):
    x, weight = torch.ones(2, 3), torch.ones(3)
    rms, layer = torch.ones(1, 2), torch.ones(2, 2)  # statistics
    with pytest.raises(RuntimeError, match="same shape"):
        OPS.norm_backward(torch.ones(2, 4), None, x, weight, rms, False, False, False)
    with pytest.raises(RuntimeError, match="dstream and x must have the same shape"):
        OPS.norm_backward(x, torch.ones(2, 4), x, weight, rms, False, False, False)
    with pytest.raises(RuntimeError, match="same dtype"):
        OPS.norm_backward(x.double(), None, x, weight, layer, True, False, True)
    for statistics, centered in ((torch.ones(1, 3), False), (layer, False), (rms, True), (layer.double(), True)):
        with pytest.raises(RuntimeError, match="those the forward returned"):
            OPS.norm_backward(x, None, x, weight, statistics, centered, False, False)
    with pytest.raises(RuntimeError, match="not centered has no bias"):
        OPS.norm_backward(x, None, x, weight, rms, False, False, True)
    with pytest.raises(RuntimeError, match="not centered has no bias"):
        normalize(x, weight, weight, centered=False, eps=EPS)
    with pytest.raises(RuntimeError, match="branch and x must have the same dtype"):
        add_and_normalize(x, x.double(), 1.0, weight, centered=False, eps=EPS)
    with pytest.raises(RuntimeError, match="weight and bias must be"):
        normalize(x, weight, torch.ones(4), centered=True, eps=EPS)


def test_there_is_one_forward_and_one_backward():
    """One schema each, which the kernels' objects serve and do not repeat."""
    registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("megahp::")]
    assert sorted(name for name in registered if "norm" in name) == [f"megahp::{op}" for op in NAMES]
    assert not any(".def(" in path.read_text() for path in CSRC.iterdir())


# The tests tested: each of these mistakes must be caught by the comparison above.


def rows_of_the_next_example(terms: Tensor) -> Tensor:
    return terms.flatten(0, 1).roll(-1, 0).unflatten(0, terms.shape[:2]).sum(1)


def all_rows_apart(terms: Tensor) -> Tensor:
    return terms.flatten(0, 1)


def one_row_too_few(terms: Tensor) -> Tensor:
    return terms[:, 1:].sum(1)


@pytest.mark.parametrize("mistake", [rows_of_the_next_example, all_rows_apart, one_row_too_few])
@pytest.mark.parametrize("kind", KINDS)
def test_misplaced_boundaries_between_examples_are_caught(monkeypatch, kind, mistake):
    assert_caught(monkeypatch, "_sum_by_example", mistake, make(kind, (3, 5, 64), torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_squares_without_their_sum_over_rows_are_caught(monkeypatch, kind):
    def squared_too_early(gradients: Tensor, by_example: bool) -> tuple[Tensor, Tensor]:
        return gradients.sum(0), gradients.sum(0).square().sum()

    assert_caught(monkeypatch, "_sum_examples", squared_too_early, make(kind, (3, 5, 64), torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_in_bfloat16_are_caught(monkeypatch, kind, dtype):
    def rounded(mean_square: Tensor) -> Tensor:
        return mean_square.rsqrt().bfloat16().to(mean_square.dtype)

    assert_caught(monkeypatch, "_inverse_root", rounded, make(kind, (3, 5, 64), dtype))


def assert_caught(monkeypatch, name: str, mistake, case: Case) -> None:
    with references_only():
        assert_same(case, measured(case), expected(case))
        monkeypatch.setattr(norm, name, mistake)
        with pytest.raises(AssertionError):
            assert_same(case, measured(case), expected(case))


def test_another_eps_is_caught():
    case = make("layer", (3, 5, 3), torch.float32)
    outcome = measured(case)
    outcome.y = normalize(case.x, case.weight, case.bias, centered=True, eps=1e-3).detach()
    with pytest.raises(AssertionError):
        assert_same(case, outcome, expected(case))


# Without the extension.


# Rows of each example split over two ranks, as under sequence parallelism.


def test_group_is_summed_before_squaring(tmp_path):
    torch.multiprocessing.spawn(check_group, args=(tmp_path / "rendezvous",), nprocs=2)


def check_group(rank: int, rendezvous: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    group = dist.group.WORLD.group_name
    for kind in KINDS:
        whole = make(kind, (3, 10, 64), torch.float32)
        wanted = measured(whole)
        half = Case(kind, whole.x.chunk(2, 1)[rank], whole.weight, whole.bias, whole.dy.chunk(2, 1)[rank])
        for run in (half.__call__, torch.compile(half.__call__, fullgraph=True, backend="aot_eager")):
            squared, gradients = probe_and_gradients(half, run, group)
            torch.testing.assert_close(squared, wanted.squared, rtol=1e-5, atol=0)
            for local, total in zip(gradients, wanted.gradients, strict=True):
                dist.all_reduce(local)
                torch.testing.assert_close(local, total, rtol=1e-5, atol=1e-5)
        alone, _ = probe_and_gradients(half, half.__call__, group="")
        assert (alone - wanted.squared).abs() > 1e-2 * wanted.squared
    dist.barrier()
    os._exit(0)  # gloo's threads race with an orderly exit


def probe_and_gradients(case: Case, run, group: str) -> tuple[Tensor, list[Tensor]]:
    probe = torch.zeros((), requires_grad=True)
    y = run(case.x, probe, group)
    *gradients, squared = torch.autograd.grad(y, [*case.parameters(), probe], case.dy)
    return squared, gradients
