"""Compare per-example gradient norms of every weight with one backward pass per example, with training's loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed import world
from distributed.training import mesh_of, settings_of
from torch import Tensor

from megahp.config import Config
from megahp.data.loader import Batch
from megahp.diagnose import example_norms
from megahp.diagnose.example_norms import embedding_square, linear_square, measure, tied_inner_product
from megahp.diagnose.verify import Trial, synthetic_batch
from megahp.model.build import build_model
from megahp.model.transformer import Transformer
from megahp.parallel.layout import Layout
from megahp.parallel.parameters import local, parameters, storage
from megahp.train.engine import Engine

EXAMPLES = 8
SPLITS = (1, 2, 4, 8)  # examples of a microbatch
DENSE = ("llama", "gpt2", "alibi")
DTYPES = {"float32": 1e-5, "float64": 1e-10}
CASES = {f"{model} {dtype}": (model, dtype, rtol) for model in DENSE for dtype, rtol in DTYPES.items()}
CASES["series"] = ("gpt2 model.levels=[36,30,20]", "float64", 1e-10)  # a model, and a setting


def mean_over_the_microbatch(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(logits, targets, reduction=reduction) * 16 / len(targets)


# a mistake, and a model that shows it
BUGS: dict[str, tuple[str, dict[str, Any]]] = {
    "the uses of a tied matrix squared apart": ("gpt2", {"tied_inner_product": lambda *_: 0.0}),
    "the uses of a token squared apart": (
        "llama",
        {"embedding_square": lambda ids, grad: grad.double().square().sum()},
    ),
    "tokens squared apart": ("llama", {"linear_square": lambda x, g: (x.square().sum(2) * g.square().sum(2)).sum()}),
    "biases forgotten": ("gpt2", {"layer_square": lambda x, grad, bias: linear_square(x, grad)}),
    "the loss a mean over examples": ("llama", {"F": SimpleNamespace(cross_entropy=mean_over_the_microbatch)}),
}


def model_of(config: Config) -> Transformer:
    (model,) = build_model(config, mesh_of(Layout())).stages.values()
    for weight in model.parameters():
        if weight.dim() == 1:  # no norm at 1, no bias at 0
            storage(weight).add_(torch.linspace(-0.2, 0.3, len(weight)))
    return model


def microbatches(config: Config, size: int) -> list[Batch]:
    return [synthetic_batch(np.arange(start, start + size), config) for start in range(0, EXAMPLES, size)]


def reference(model: Transformer, config: Config, size: int) -> dict[str, float]:
    """Return the mean squared norm, by layer, of the mean gradients of groups of `size` examples."""
    squares: dict[str, float] = {}
    for batch in microbatches(config, size):
        model.zero_grad()
        model(batch.tokens[:, :-1], batch.tokens[:, 1:], batch.documents).mean().backward()
        for name, weight in parameters(model):
            layer, square = name.rpartition(".")[0], local(weight.grad).double().square().sum().item()  # type: ignore[arg-type]
            squares[layer] = squares.get(layer, 0.0) + square * size / EXAMPLES
    model.zero_grad()
    return squares


def trained(model_name: str, dtype: str) -> tuple[dict[str, float], dict[str, float]]:
    """Return what a training step measures in its norm layers."""
    config = settings_of(model_name, f"train.dtype={dtype}")
    engine = Engine(build_model(config, mesh_of(Layout())), mesh_of(Layout()), config.parallel)
    batches = microbatches(config, 2)
    loss = engine.forward_backward(batches, len(batches), EXAMPLES * config.data.sequence_length)
    measured = engine.measure(loss, engine.gradients(), EXAMPLES)
    return measured.grad_sq_example, measured.grad_sq_batch


def calibrated() -> list[tuple[float, float]]:
    """Return what training's calibration measures of each example."""
    config = settings_of("llama", "train.dtype=float64")
    trial = Trial(config, mesh_of(Layout()))
    plan = trial.next_step()
    assert plan
    for example in range(EXAMPLES):
        trial.calibrate(synthetic_batch(np.full(plan.micro_batch, example), config), plan)
    assert all(weight.grad is None for weight in trial.engine.weights.values())
    return trial.noise.examples


def outcomes() -> dict[str, Any]:
    """Run every measurement of this file, on one rank."""
    results: dict[str, Any] = {}
    for case, (name, dtype, _) in CASES.items():
        config = settings_of(*name.split(), f"train.dtype={dtype}")
        model = model_of(config)
        before = [storage(weight).clone() for _, weight in parameters(model)]
        squares = {size: measure(model, microbatches(config, size)) for size in SPLITS}
        assert all(torch.equal(old, storage(w)) for old, (_, w) in zip(before, parameters(model), strict=True))
        assert all(weight.grad is None for weight in model.parameters())
        results[case] = squares, {size: reference(model, config, size) for size in SPLITS}
    for bug, (name, broken) in BUGS.items():
        config = settings_of(name, "train.dtype=float64")
        with mock.patch.multiple(example_norms, **broken):
            results[bug] = measure(model_of(config), microbatches(config, 4))
    config = settings_of("llama", "train.dtype=float64")
    (model,) = build_model(config, mesh_of(Layout())).stages.values()
    results["trained"] = trained("llama", "float64"), measure(model, microbatches(config, 4))
    results["calibrated"] = calibrated()
    experts = settings_of("moe")
    (model,) = build_model(experts, mesh_of(Layout())).stages.values()
    with pytest.raises(ValueError, match="experts"):
        measure(model, microbatches(experts, 4))
    return results


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return world.run(1, outcomes)[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", SPLITS)
def test_as_one_backward_pass_an_example(results: dict[str, Any], case: str, size: int) -> None:
    """Checks 20 and 21: for every split of the batch, in every layer."""
    squares, expected = results[case]
    rtol = CASES[case][2]
    assert squares[size].example == pytest.approx(expected[1], rel=rtol)
    assert squares[size].micro == pytest.approx(expected[size], rel=rtol)
    assert squares[size].batch == pytest.approx(expected[EXAMPLES], rel=rtol)


def test_norms_are_as_a_step_of_training_measures_them(results: dict[str, Any]) -> None:
    """Training's loss is a mean over the batch, so its probes hold sum_b ||g_b / B||^2."""
    (example, batch), squares = results["trained"]
    assert example == pytest.approx({norm: squares.example[norm] for norm in example}, rel=1e-10)
    assert batch == pytest.approx({norm: squares.batch[norm] for norm in batch}, rel=1e-10)
    assert len(example) == 9  # two blocks' two norms and norms of queries and keys, the final one


def test_calibration_is_what_the_diagnosis_measures(results: dict[str, Any]) -> None:
    """For the whole model, and for its norm layers."""
    (norms, _), squares = results["trained"]
    model, of_norms = np.mean(results["calibrated"], axis=0)
    assert len(results["calibrated"]) == EXAMPLES
    assert model == pytest.approx(sum(squares.example.values()), rel=1e-10)
    assert of_norms == pytest.approx(sum(squares.example[norm] for norm in norms), rel=1e-10)


@pytest.mark.parametrize("bug", BUGS)
def test_a_mistake_shows(results: dict[str, Any], bug: str) -> None:
    expected = results[f"{BUGS[bug][0]} float64"][1][1]
    assert results[bug].example != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("length", "inputs", "outputs"), [(3, 16, 20), (12, 16, 20), (1, 5, 7)])
def test_both_forms_of_the_contraction(length: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(4, length, inputs).double(), torch.randn(4, length, outputs).double()
    expected = torch.einsum("bti,bto->boi", x, grad).square().sum()
    torch.testing.assert_close(linear_square(x, grad), expected, rtol=1e-12, atol=0)


def test_a_tied_matrix_by_its_parts() -> None:
    """Ids repeat within an example and between examples; compare with the whole [vocabulary, width] gradients."""
    torch.manual_seed(0)
    ids = torch.tensor([[1, 4, 1, 0, 1], [4, 4, 2, 0, 3]])
    grad, x, logits_grad = (torch.randn(2, 5, size).double() for size in (3, 3, 6))
    looked_up = torch.zeros(2, 6, 3).double()
    for b in range(2):
        for t in range(5):
            looked_up[b, ids[b, t]] += grad[b, t]
    unembedded = logits_grad.mT @ x
    torch.testing.assert_close(embedding_square(ids, grad), looked_up.square().sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        tied_inner_product(ids, grad, x, logits_grad), (looked_up * unembedded).sum(), rtol=1e-12, atol=0
    )
