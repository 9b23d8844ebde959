"""The loss in slices of the vocabulary against the loss from whole logits: values, gradients, memory, collectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import world
from distributed.training import Training, mesh_of, settings_of, synthetic_batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megahp.parallel import cross_entropy
from megahp.parallel.cross_entropy import Teachers, level_of, linear_cross_entropy, outside
from megahp.parallel.layout import Layout
from megahp.parallel.mesh import Axis
from megahp.parallel.tensor import enter

ALONE = Axis(1, 0, None)  # type: ignore[arg-type]
VOCABULARY = 100
SLICES = (1, 7, 50, 99, 100, 1000)


def plain_losses(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    axis: Axis,
    softcap: float = 0.0,
    vocabulary: int | None = None,
    levels: Sequence[int] = (),
    teachers: Teachers | None = None,
) -> Tensor:
    """The same losses, on one rank, from whole logits; within a level, from its logits alone."""
    logits = whole_logits(x, weight, softcap, vocabulary)
    if teachers:
        heard = zip(teachers.x, teachers.rows, teachers.softcaps, strict=True)
        mean = sum(whole_logits(*teacher, teachers.vocabulary).softmax(-1) for teacher in heard) / len(teachers.x)
        hard = F.one_hot(targets.flatten(), logits.shape[-1]).to(logits.dtype)
        chances = teachers.weight * F.pad(mean, (0, logits.shape[-1] - mean.shape[-1])) + (1 - teachers.weight) * hard
        return F.cross_entropy(logits, chances, reduction="none").view_as(targets).clone()
    if levels:
        flat, losses = targets.flatten(), torch.zeros(targets.numel(), dtype=logits.dtype)
        for level, size in enumerate(levels):
            first = sum(levels[:level])
            own = ((flat >= first) & (flat < first + size)).nonzero().squeeze(1)
            there = F.cross_entropy(logits[own, first : first + size], flat[own] - first, reduction="none")
            losses = losses.index_put((own,), there)
        return losses.view_as(targets)
    return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets).clone()


def whole_logits(x: Tensor, weight: Tensor, softcap: float, vocabulary: int | None) -> Tensor:
    logits = F.linear(x, weight.to(x.dtype)[:vocabulary])
    logits = logits.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, -2)
    return (logits / softcap).tanh() * softcap if softcap else logits


def in_slices_of(rows: int) -> Any:
    return mock.patch.object(cross_entropy, "rows_at_once", lambda *_: rows)


def inputs(
    dtype: torch.dtype, tokens: tuple[int, ...] = (3, 11), width: int = 16, vocabulary: int = VOCABULARY
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(*tokens, width, generator=generator).to(dtype),
        "weight": (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(dtype),
        "targets": torch.randint(0, vocabulary, tokens, generator=generator),
        "upstream": torch.randn(tokens, generator=generator),
    }


def outcome(losses_of: Any, given: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Losses, and the gradients of x and weight, whose upstream gradients differ by token in size and sign."""
    x, weight = (given[name].to(dtype, copy=True).requires_grad_() for name in ("x", "weight"))
    losses = losses_of(x, weight, given["targets"], ALONE)
    losses.backward(given["upstream"].to(losses.dtype))
    return [losses.detach(), x.grad, weight.grad]


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("rows", SLICES)
def test_equals_the_plain_loss_in_float64(rows: int, softcap: float) -> None:
    given, capped = inputs(torch.float64), {"softcap": softcap}
    with in_slices_of(rows):
        found = outcome(partial(linear_cross_entropy, **capped), given, torch.float64)
    wanted = outcome(partial(plain_losses, **capped), given, torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("levels", [(12, 30, 9), (100,), (2, 2)])
@pytest.mark.parametrize("rows", SLICES)
def test_levels(rows: int, levels: tuple[int, ...], softcap: float) -> None:
    """A target is predicted among its level alone, wherever slices end; one of no level has no loss. With and without
    logits kept."""
    given, settings = inputs(torch.float64), {"levels": levels, "softcap": softcap}
    wanted = outcome(partial(plain_losses, **settings), given, torch.float64)
    for kept in (cross_entropy.KEPT, 0):
        with in_slices_of(rows), mock.patch.object(cross_entropy, "KEPT", kept):
            found = outcome(partial(linear_cross_entropy, **settings), given, torch.float64)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    alone = given["targets"] >= sum(levels)
    assert (found[0] == 0).equal(alone) and not found[1][alone].any()


def test_a_level_is_a_distribution() -> None:
    """Probabilities of a level's ids sum to 1, so that those of all digits of a value do; an id of no level has 1."""
    given = inputs(torch.float64)
    x, targets = given["x"][0, :1].expand(VOCABULARY, -1), torch.arange(VOCABULARY)
    with in_slices_of(7):
        chances = (-linear_cross_entropy(x, given["weight"], targets, ALONE, levels=(12, 30, 9))).exp()
    sums = torch.stack([part.sum() for part in chances.split((12, 30, 9, *[1] * 49))])
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_levels_in_whole_logits(dtype: torch.dtype) -> None:
    given = inputs(dtype)
    logits = F.linear(given["x"], given["weight"])
    hidden = logits.masked_fill(outside(logits, level_of(given["targets"], (12, 30, 9))), -torch.inf)
    found = F.cross_entropy(hidden.flatten(0, 1).float(), given["targets"].flatten(), reduction="none")
    wanted = plain_losses(given["x"], given["weight"], given["targets"], ALONE, levels=(12, 30, 9))
    torch.testing.assert_close(found.view_as(wanted), wanted, rtol=1e-5, atol=1e-6)


def two_teachers(weight: float, dtype: torch.dtype = torch.float64, tokens: tuple[int, ...] = (3, 11)) -> Teachers:
    """Of other widths than the student's, one of capped logits, over the first 73 ids."""
    x, rows = [], []
    for number, width in enumerate((24, 8)):
        generator = torch.Generator().manual_seed(number + 1)
        x.append(torch.randn(*tokens, width, generator=generator).to(dtype))
        rows.append(torch.randn(VOCABULARY, width, generator=generator).to(dtype))
    return Teachers(weight, 73, x, rows, [0.0, 1.5])


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("kept", [0, 2**28])
@pytest.mark.parametrize("rows", SLICES)
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_teachers(weight: float, rows: int, kept: int, softcap: float) -> None:
    """The gradients are those of torch's kl_div to the mean of the teachers' probabilities, and of the plain loss, in
    their shares; the loss is theirs and the entropy."""
    given, teachers = inputs(torch.float64), two_teachers(weight)
    given["targets"] %= 73
    settings = {"softcap": softcap, "vocabulary": 73, "teachers": teachers}
    with in_slices_of(rows), mock.patch.object(cross_entropy, "KEPT", kept):
        found = outcome(partial(linear_cross_entropy, **settings), given, torch.float64)
    chances = [
        (logits / 1.5).tanh().mul(1.5).softmax(-1) if capped else logits.softmax(-1)
        for x, matrix, capped in zip(teachers.x, teachers.rows, (False, True), strict=True)
        for logits in [x @ matrix[:73].T]
    ]
    mean = torch.stack(chances).mean(0)

    def mixed(x: Tensor, matrix: Tensor, targets: Tensor, axis: Axis) -> Tensor:
        logits = x @ matrix[:73].T
        learned = ((logits / softcap).tanh() * softcap if softcap else logits).log_softmax(-1)
        divergence = F.kl_div(learned, mean, reduction="none").sum(-1)
        plain = -learned.gather(-1, targets[..., None]).squeeze(-1)
        return weight * (divergence - torch.special.xlogy(mean, mean).sum(-1)) + (1 - weight) * plain

    torch.testing.assert_close(found, outcome(mixed, given, torch.float64), rtol=1e-11, atol=1e-12)
    assert not found[2][73:].any()


@pytest.mark.parametrize("rows", [7, 1000])
def test_teachers_within_a_level(rows: int) -> None:
    """A level is a distribution of its own, for teachers too; a target of no level has no loss."""
    given, teachers, levels = inputs(torch.float64), two_teachers(1.0), (12, 30, 9)
    given["targets"] %= 73
    with in_slices_of(rows):
        losses, *_ = outcome(partial(linear_cross_entropy, levels=levels, teachers=teachers), given, torch.float64)
    student, *taught = (
        whole_logits(*model, None).view(3, 11, -1)
        for model in [
            (given["x"], given["weight"], 0.0),
            *zip(teachers.x, teachers.rows, teachers.softcaps, strict=True),
        ]
    )
    for place in np.ndindex(3, 11):
        target = int(given["targets"][place])
        begin, end = next(((b, e) for b, e in ((0, 12), (12, 42), (42, 51)) if b <= target < e), (target, target + 1))
        mean = torch.stack([logits[place][begin:end].softmax(-1) for logits in taught]).mean(0)
        expected = F.cross_entropy(student[place][begin:end], mean)
        torch.testing.assert_close(losses[place], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_teacher_is_held_whole_either(dtype: torch.dtype) -> None:
    tokens, vocabulary = 2048, 2**15
    given = inputs(dtype, (tokens,), vocabulary=vocabulary)
    other = inputs(dtype, (tokens,), vocabulary=vocabulary, width=8)
    teachers = Teachers(1.0, vocabulary, [other["x"]] * 2, [other["weight"]] * 2, [0.0, 0.0])
    with Largest() as largest:
        outcome(partial(linear_cross_entropy, teachers=teachers), given, dtype)
    assert largest.numel <= tokens * vocabulary / 16


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("kept", [0, 2**28])
@pytest.mark.parametrize("rows", SLICES)
def test_rows_that_pad_take_no_part(rows: int, kept: int, softcap: float) -> None:
    """Against numpy's logarithm of a sum over the tokens' rows alone; the others' gradients are exactly 0."""
    given, vocabulary = inputs(torch.float64), 73
    given["targets"] %= vocabulary
    function = partial(linear_cross_entropy, softcap=softcap, vocabulary=vocabulary)
    with in_slices_of(rows), mock.patch.object(cross_entropy, "KEPT", kept):
        losses, grad_x, grad_weight = outcome(function, given, torch.float64)
    x, weight, targets = (given[name].numpy() for name in ("x", "weight", "targets"))
    logits = x @ weight[:vocabulary].T
    logits = softcap * np.tanh(logits / softcap) if softcap else logits
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses.numpy(), np.log(np.exp(logits).sum(-1)) - chosen, rtol=1e-12)
    wanted = outcome(partial(plain_losses, softcap=softcap, vocabulary=vocabulary), given, torch.float64)
    torch.testing.assert_close([losses, grad_x, grad_weight], wanted, rtol=1e-12, atol=1e-13)
    assert not grad_weight[vocabulary:].any()


@pytest.mark.parametrize("vocabulary", [None, 73])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kept_logits_change_no_bit(dtype: torch.dtype, softcap: float, vocabulary: int | None) -> None:
    given, function = inputs(dtype), partial(linear_cross_entropy, softcap=softcap, vocabulary=vocabulary)
    with in_slices_of(7):
        kept = outcome(function, given, dtype)
        with mock.patch.object(cross_entropy, "KEPT", 0):
            again = outcome(function, given, dtype)
    assert all(map(torch.equal, kept, again))


@pytest.mark.parametrize("rows", SLICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_as_exact_as_the_plain_loss(dtype: torch.dtype, rows: int) -> None:
    """Within twice the plain loss's own error, against float64 on the same inputs, in norm and largest element."""
    given = inputs(dtype, tokens=(8, 33), width=32)
    exact = outcome(plain_losses, given, torch.float64)
    plain = outcome(plain_losses, given, dtype)
    with in_slices_of(rows):
        found = outcome(linear_cross_entropy, given, dtype)
    for name, ours, theirs, right in zip(("losses", "x", "weight"), found, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype
        for size in (torch.norm, lambda difference: difference.abs().max()):
            error, plain_error = size(ours.double() - right), size(theirs.double() - right)
            assert error <= 2 * plain_error, (name, error / plain_error)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_extreme_logits(scale: float) -> None:
    """Neither flat nor saturated distributions overflow, whichever slice holds the largest logit."""
    given = inputs(torch.float32)
    given["weight"] *= scale * torch.linspace(-1, 1, VOCABULARY)[:, None]
    with in_slices_of(7):
        found = outcome(linear_cross_entropy, given, torch.float32)
    torch.testing.assert_close(found, outcome(plain_losses, given, torch.float32), rtol=1e-5, atol=1e-5 * scale)


def test_what_is_not_finite_shows() -> None:
    given = inputs(torch.float32)
    given["x"][1, 2, 3] = torch.nan
    with in_slices_of(7):
        losses, grad_x, grad_weight = outcome(linear_cross_entropy, given, torch.float32)
    assert losses.isnan().nonzero().tolist() == [[1, 2]]
    assert grad_x[1, 2].isnan().all() and grad_weight.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_of_another_type(dtype: torch.dtype) -> None:
    """fp32 masters are multiplied in x's type; their gradient is fp32, as through `weight.to(x.dtype)`."""
    given = inputs(dtype)
    weight = inputs(torch.float32)["weight"].requires_grad_()
    grads = []
    for losses_of in (plain_losses, linear_cross_entropy):
        losses = losses_of(given["x"], weight, given["targets"], ALONE)
        grads += torch.autograd.grad(losses, weight, given["upstream"])
    assert grads[1].dtype == torch.float32
    torch.testing.assert_close(*grads, rtol=2**-7, atol=1e-5)


def test_no_tokens() -> None:
    losses, grad_x, grad_weight = outcome(linear_cross_entropy, inputs(torch.float32, tokens=(0, 5)), torch.float32)
    assert losses.shape == (0, 5) and grad_x.shape == (0, 5, 16) and not grad_weight.any()


def test_gradients_do_not_pretend_to_have_gradients() -> None:
    given = inputs(torch.float64)
    x = given["x"].requires_grad_()
    losses = linear_cross_entropy(x, given["weight"], given["targets"], ALONE)
    (grad,) = torch.autograd.grad(losses.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_never_stand_in_memory(dtype: torch.dtype) -> None:
    tokens, vocabulary = 2048, 2**15
    given = inputs(dtype, (tokens,), vocabulary=vocabulary)
    with Largest() as largest:
        outcome(linear_cross_entropy, given, dtype)
    assert largest.numel <= tokens * vocabulary / 16
    with Largest() as largest:
        outcome(plain_losses, given, dtype)
    assert largest.numel == tokens * vocabulary


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, on the compiler's first use
def test_the_compiler_does_not_keep_the_logits_either() -> None:
    given, saved = inputs(torch.float32, tokens=(8, 33)), []
    backend = "aot_eager_decomp_partition"  # all of the default backend but the code it writes
    compiled = torch.compile(lambda x, *others: linear_cross_entropy(x * 2, *others) / 2, backend=backend)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x)
    with in_slices_of(7), mock.patch.object(cross_entropy, "KEPT", 0), hooks:
        found = outcome(compiled, given, torch.float32)
    wanted = outcome(lambda x, *others: plain_losses(x * 2, *others) / 2, given, torch.float32)
    torch.testing.assert_close(found, wanted)
    assert given["x"].numel() < sum(saved) < 8 * 33 * VOCABULARY / 3


def largest_of_a_step(model: str) -> int:
    """Elements of the largest tensor in forward and backward of 128 tokens at a vocabulary of 4096 and width 32."""
    config = settings_of(model, "model.vocab_size=4096", "batch.micro_batch=8")
    training = Training(config)
    batch = synthetic_batch(training.samples(training.next_step())[0], config)
    with in_slices_of(512), Largest() as largest:
        training.engine.forward_backward([batch], 1, 128)
    return largest.numel


def largest_of_steps() -> list[int]:
    return [largest_of_a_step(model) for model in ("llama", "gpt2")]


def test_a_training_step_holds_no_logits() -> None:
    """With an unembedding of its own or a tied one, nothing is larger than the embedding."""
    assert world.run(1, largest_of_steps)[0] == [4096 * 32] * 2


def losses_and_collectives(
    sequence_parallel: bool, dtype: torch.dtype, rows: int, vocabulary: int | None, taught: bool = False
) -> tuple[list[Tensor], list[str]]:
    """This rank's losses and gradients, the latter gathered, and the collectives they took after `enter`."""
    axis = mesh_of(Layout(tp=2)).tensor_axis(sequence_parallel)
    given = below(vocabulary, inputs(dtype, tokens=(3, 10)))
    own = given["x"].chunk(2, 1)[axis.rank] if sequence_parallel else given["x"]
    x, weight = own.clone().requires_grad_(), given["weight"].chunk(2)[axis.rank].clone().requires_grad_()
    entered = enter(x, axis)
    teachers = two_teachers(0.7, dtype, (3, 10)) if taught else None
    if teachers:
        teachers = replace(teachers, rows=[each.chunk(2)[axis.rank] for each in teachers.rows])
    with in_slices_of(rows), Collectives() as collectives:
        settings = {"vocabulary": vocabulary, "teachers": teachers}
        losses = linear_cross_entropy(entered, weight, given["targets"], axis, **settings)
        losses.backward(given["upstream"].to(losses.dtype))
    grads = [torch.empty_like(weight) for _ in range(2)]
    dist.all_gather(grads, weight.grad)
    parts = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(parts, x.grad.contiguous())
    return [losses.detach(), torch.cat(parts, 1) if sequence_parallel else x.grad, torch.cat(grads)], collectives.names


class Collectives(TorchDispatchMode):
    """Names of the collectives that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.names.append(function._opname.rstrip("_"))
        return function(*args, **(kwargs or {}))


def below(vocabulary: int | None, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**given, "targets": given["targets"] % (vocabulary or VOCABULARY)}


Case = tuple[bool, torch.dtype, int, int | None, bool]
CASES: list[Case] = [
    (sp, dtype, rows, None, False)
    for sp in (False, True)
    for dtype in (torch.float64, torch.bfloat16)
    for rows in (3, 50)
]
# the second rank's rows pad the vocabulary, some of them or all
CASES += [(False, torch.float64, 7, vocabulary, False) for vocabulary in (73, 50, 30)]
CASES += [(sp, torch.float64, 7, vocabulary, True) for sp in (False, True) for vocabulary in (None, 73)]


def all_cases() -> list[Any]:
    return [losses_and_collectives(*case) for case in CASES]


@pytest.fixture(scope="module")
def on_two_ranks() -> list[list[Any]]:
    return [dict(zip(CASES, found, strict=True)) for found in world.run(2, all_cases)]


@pytest.mark.parametrize("case", CASES)
def test_vocabulary_split_over_ranks(on_two_ranks: Any, case: Case) -> None:
    sequence_parallel, dtype, _, vocabulary, taught = case
    given = below(vocabulary, inputs(dtype, tokens=(3, 10)))
    teachers = two_teachers(0.7, dtype, (3, 10)) if taught else None
    exact = outcome(partial(plain_losses, vocabulary=vocabulary, teachers=teachers), given, torch.float64)
    rtol, atol = (1e-12, 1e-13) if dtype == torch.float64 else (2**-7, 2**-5)
    for rank in range(2):
        found, collectives = on_two_ranks[rank][case]
        for ours, right in zip(found, exact, strict=True):
            torch.testing.assert_close(ours.double(), right, rtol=rtol, atol=atol)
        adjoint = "_reduce_scatter_base" if sequence_parallel else "allreduce"
        assert collectives == ["allreduce", "allreduce"] * (3 if taught else 1) + [adjoint]
