"""The norm ops, by reference and by kernel, against torch.nn.functional in float64."""

import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import megahp.ops
from megahp.ops import _extension, layer_norm, norm, rms_norm

KINDS = ["rms", "layer", "layer without bias"]
PRECISION = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
EPS = 1e-5
OPS = torch.ops.megahp


def kernel_loaded() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("megahp::rms_norm", "CPU")


@pytest.fixture(params=["reference", "kernel"])
def served_by(request):
    """Runs a test once on the PyTorch references and once on the C++ kernels."""
    if request.param == "reference":
        with norm.references_only():
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
        if self.kind == "rms":
            return rms_norm(x, self.weight, probe, EPS, group)
        return layer_norm(x, self.weight, self.bias, probe, EPS, group)

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


def assert_near(actual: Tensor, wanted: Tensor, tolerance: float, scale: float = 0.0) -> None:
    """Every element within `tolerance` of the greatest magnitude, or of `scale` where terms are greater."""
    assert actual.shape == wanted.shape
    if wanted.numel():
        error = (actual.double() - wanted).abs().max().item()
        assert error <= tolerance * max(wanted.abs().max().item(), scale), f"error {error}"


def assert_same(case: Case, actual: Outcome, wanted: Outcome) -> None:
    data, weights = PRECISION[case.x.dtype], PRECISION[case.weight.dtype]
    assert actual.y.dtype == actual.dx.dtype == case.x.dtype
    assert [g.dtype for g in actual.gradients] == [p.dtype for p in case.parameters()]
    assert_near(actual.y, wanted.y, data, scale=1.0)
    # dx is a difference of terms as large as dy weight rstd.
    assert_near(actual.dx, wanted.dx, data, scale=largest_term(case))
    for got, want in zip(actual.gradients, wanted.gradients, strict=True):
        assert_near(got, want, weights, scale=1.0)
    assert_near(actual.squared, wanted.squared, 1e-5, scale=1.0)


def largest_term(case: Case) -> float:
    if not case.x.numel():
        return 0.0
    x = case.x.detach().double()
    center = x.mean(-1, keepdim=True) if case.kind != "rms" else 0.0
    rstd = ((x - center).square().mean(-1, keepdim=True) + EPS).rsqrt()
    return (case.dy.double() * case.weight.detach().double() * rstd).abs().max().item()


@pytest.mark.parametrize("width", [1, 3, 7, 64, 257, 1000])
@pytest.mark.parametrize("rows", [0, 1, 5, 130])
@pytest.mark.parametrize("examples", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64(served_by, kind, dtype, examples, rows, width):
    case = make(kind, (examples, rows, width), dtype)
    assert_same(case, measured(case), expected(case))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 2, 7, 64), (2, 3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64_in_any_dimension(served_by, kind, shape):
    case = make(kind, shape, torch.float32)
    assert_same(case, measured(case), expected(case))


@pytest.mark.parametrize("kind", KINDS)
def test_float16(served_by, kind):
    case = make(kind, (3, 5, 257), torch.float16)
    assert_same(case, measured(case), expected(case))


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(served_by, kind):
    case = make(kind, (3, 10, 64), torch.float32)
    wanted = expected(case)
    scattered = Case(kind, spread(case.x), spread(case.weight), case.bias, case.dy.mT.contiguous().mT)
    assert not scattered.x.is_contiguous() and not scattered.weight.is_contiguous()
    assert_same(scattered, measured(scattered), wanted)


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
    tolerance = max(1e-6, PRECISION[weight_dtype], PRECISION[dtype] if dtype != torch.bfloat16 else 0)
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


def test_only_what_is_asked_for_is_computed(served_by, monkeypatch):
    monkeypatch.setattr(norm, "_squared_norm", lambda *_: pytest.fail("no probe asked for squares"))
    case = make("layer", (3, 5, 7), torch.float32)
    case.weight.requires_grad_(False)
    for probe in (None, torch.zeros(())):
        case(case.x, probe).backward(case.dy)
    assert case.weight.grad is None and case.bias.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(served_by, kind):
    case = make(kind, (2, 3, 5), torch.float64)
    probe = torch.zeros((), dtype=torch.float64)
    if kind == "rms":
        assert torch.autograd.gradcheck(rms_norm, (case.x, case.weight, probe))
    else:
        assert torch.autograd.gradcheck(layer_norm, (case.x, case.weight, case.bias, probe))


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
    _, mean, rstd = OPS.layer_norm(x.detach(), weight.detach(), None, None, EPS, "")
    torch.library.opcheck(OPS.rms_norm.default, (x, weight, probe, EPS, ""))
    torch.library.opcheck(OPS.layer_norm.default, (x, weight, bias, probe, EPS, ""))
    torch.library.opcheck(OPS.layer_norm.default, (x, weight, None, None, EPS, ""))
    x, weight = x.detach(), weight.detach()
    torch.library.opcheck(OPS.rms_norm_backward.default, (dy, x, weight, rstd))
    torch.library.opcheck(OPS.layer_norm_backward.default, (dy, x, weight, mean, rstd))


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_counts_once(served_by, kind):
    case = make(kind, (3, 5, 64), torch.float32)
    probe = torch.zeros((), requires_grad=True)
    checkpoint(case, case.x, probe, use_reentrant=False).backward(case.dy)
    torch.testing.assert_close(probe.grad, measured(case).squared, rtol=0, atol=0)


def test_compiles_as_one_graph(served_by):
    rms, layer = make("rms", (3, 5, 64), torch.float32), make("layer", (3, 5, 64), torch.float32)

    def block(x: Tensor, probe: Tensor) -> Tensor:
        return layer(rms(x, probe).tanh(), probe)

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
    with pytest.raises(RuntimeError, match=message):
        rms_norm(x, weight)
    with pytest.raises(RuntimeError, match=message):
        layer_norm(x, weight)


def test_misuse_of_the_backward_and_the_bias_is_told(served_by):
    x, weight, rstd = torch.ones(2, 3), torch.ones(3), torch.ones(2)
    with pytest.raises(RuntimeError, match="same shape"):
        OPS.rms_norm_backward(torch.ones(2, 4), x, weight, rstd)
    with pytest.raises(RuntimeError, match="same dtype"):
        OPS.layer_norm_backward(x.double(), x, weight, rstd, rstd)
    with pytest.raises(RuntimeError, match="those the forward returned"):
        OPS.rms_norm_backward(x, x, weight, torch.ones(3))
    with pytest.raises(RuntimeError, match="weight and bias must be"):
        layer_norm(x, weight, torch.ones(4))


# The tests tested: each of these mistakes must be caught by the comparison above.


def rows_of_the_next_example(terms: Tensor) -> Tensor:
    return terms.flatten(0, 1).roll(-1, 0).unflatten(0, terms.shape[:2]).sum(1)


def all_rows_apart(terms: Tensor) -> Tensor:
    return terms.flatten(0, 1)


@pytest.mark.parametrize("mistake", [rows_of_the_next_example, all_rows_apart])
@pytest.mark.parametrize("kind", KINDS)
def test_misplaced_boundaries_between_examples_are_caught(monkeypatch, kind, mistake):
    case = make(kind, (3, 5, 64), torch.float32)
    with norm.references_only():
        assert_same(case, measured(case), expected(case))
        monkeypatch.setattr(norm, "_sum_by_example", mistake)
        with pytest.raises(AssertionError):
            assert_same(case, measured(case), expected(case))


def test_another_eps_is_caught():
    case = make("layer", (3, 5, 3), torch.float32)
    wanted = expected(case)
    x, weight, bias = case.x.double(), case.weight.double(), case.bias.double()
    wanted.y = F.layer_norm(x, (3,), weight, bias, eps=1e-3).detach()
    with pytest.raises(AssertionError):
        assert_same(case, measured(case), wanted)


# Without the extension.


def test_a_missing_extension_is_told_once_and_the_reference_serves(tmp_path):
    package = tmp_path / "megahp"
    shutil.copytree(Path(megahp.ops.__file__).parent, package / "ops")
    (package / "__init__.py").touch()
    script = """if True:
        import torch
        from megahp.ops import rms_norm
        assert not torch._C._dispatch_has_kernel_for_dispatch_key("megahp::rms_norm", "CPU")
        x, weight = torch.randn(2, 3, 5), torch.randn(5)
        for _ in range(3):
            y = rms_norm(x, weight)
        torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (5,), weight, 1e-6))
    """
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-W", "always::UserWarning", "-c", script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("UserWarning: megahp: the slower PyTorch reference") == 1
    assert "holds no _cpu object" in run.stderr


def test_an_extension_that_does_not_load_says_why(tmp_path, monkeypatch):
    (tmp_path / "_cpu.abi3.so").write_bytes(b"not an object")
    monkeypatch.setattr(_extension, "__file__", str(tmp_path / "ops" / "_extension.py"))
    with pytest.warns(UserWarning, match=r"_cpu\.abi3\.so") as caught:
        assert not _extension.load("_cpu")
    assert len(caught) == 1


def test_an_extension_that_loads_is_silent():
    if not kernel_loaded():
        pytest.skip("the C++ kernels are not built: run `make install`")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _extension.load("_cpu")


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
