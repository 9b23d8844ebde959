"""The exact squared norm of every example's gradient in every weight, from backward passes over many examples.

What one example adds to a layer's gradient follows from the layer's input and the gradient of its output, which an
ordinary backward pass has (Gray et al., arXiv 2411.00999). The model is training's own, on one rank, but its logits and
the gradients of all layers' outputs are kept in memory. A diagnosis: training measures norm layers only, at no cost.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megahp.data.loader import Batch
from megahp.model.transformer import Transformer
from megahp.parallel.cross_entropy import level_of, outside
from megahp.parallel.parameters import local, parameters, probes
from megahp.parallel.tensor import ColumnParallelLinear, RowParallelLinear

Recorded = Mapping[str, tuple[Tensor, Tensor]]  # layer -> its input [b, t, ...] and output [b, t, ...]


@dataclass(frozen=True)
class Squares:
    """Mean squared gradient norms of one batch, by layer, over its weight and bias.

    Gradients are of losses in nats per token, an example's loss being the mean over its tokens; the gradient of a tied
    matrix is the sum over both uses.
    """

    example: dict[str, float]  # mean_b ||g_b||^2
    micro: dict[str, float]  # mean over microbatches of the squared norm of their mean gradient
    batch: dict[str, float]  # ||G||^2, G the mean over the batch


def measure(model: Transformer, microbatches: Iterable[Batch]) -> Squares:
    """Measure one batch, given as microbatches of equally many examples.

    The model computes in float32 or float64, without recomputation; weights do not change, gradients end as None.
    Raises ValueError for a model with experts, whose layers receive an example's tokens scattered.
    """
    if model.model.experts:
        raise ValueError("per-example gradients of experts cannot be measured")
    examples = count = 0
    example: dict[str, float] = {}
    micro: dict[str, float] = {}
    total: list[Tensor] = []
    for batch in microbatches:
        squares, grads = backward(model, batch)
        size = len(batch.tokens)
        examples, count = examples + size, count + 1
        _add(example, squares)
        _add(micro, {layer: square / size**2 for layer, square in _by_layer(grads).items()})
        if total:
            torch._foreach_add_(total, list(grads.values()))
        else:
            total = list(grads.values())
    batch_squares = _by_layer(dict(zip(grads, total, strict=True)))
    model.zero_grad()
    return Squares(
        example={layer: square / examples for layer, square in example.items()},
        micro={layer: square / count for layer, square in micro.items()},
        batch={layer: square / examples**2 for layer, square in batch_squares.items()},
    )


def backward(model: Transformer, batch: Batch) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return sum_b ||g_b||^2 by layer, and every weight's gradient sum_b g_b, of the sum of the examples' losses.

    Existing gradients are dropped.
    """
    model.zero_grad()
    targets = batch.tokens[:, 1:]
    with _recorded(model) as recorded:
        logits = model(batch.tokens[:, :-1], documents=batch.documents)
    logits.retain_grad()
    levels, scored = model.model.levels, logits[..., : model.model.softmax_size]
    scored = scored.masked_fill(outside(scored, level_of(targets, levels)), -torch.inf) if levels else scored
    losses = F.cross_entropy(scored.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    losses.mean(1).sum().backward()
    with torch.no_grad():
        squares = {layer: square.item() for layer, square in _squares(model, recorded, logits)}
        grads = {name: local(weight.grad) for name, weight in parameters(model)}  # type: ignore[arg-type]
    assert squares.keys() == {name.rpartition(".")[0] for name in grads}  # every weight is counted
    return squares, grads


@contextmanager
def _recorded(model: Transformer) -> Iterator[Recorded]:
    """Record layers' inputs and outputs while open; a backward pass will leave the outputs' gradients."""
    recorded: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str, _: object, inputs: tuple[Any, ...], output: Tensor) -> None:
        output.retain_grad()
        recorded[name] = inputs[0].detach(), output

    layers = {"embedding": model.embedding, "final_norm": model.final_norm, **_linear_layers(model)}
    hooks = [layer.register_forward_hook(partial(record, name)) for name, layer in layers.items()]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def _linear_layers(model: Transformer) -> dict[str, ColumnParallelLinear | RowParallelLinear]:
    kinds = (ColumnParallelLinear, RowParallelLinear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _squares(model: Transformer, recorded: Recorded, logits: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield each layer and its sum_b ||g_b||^2."""
    ids, embedded = recorded["embedding"]
    grad = _grad(embedded)
    square = embedding_square(ids, grad)
    if model.unembedding is None:  # tied: ||e + u||^2 = ||e||^2 + ||u||^2 + 2 <e, u>
        x = recorded["final_norm"][1].detach() * model.table.logits
        square = square + linear_square(x, _grad(logits)) + 2 * tied_inner_product(ids, grad, x, _grad(logits))
    yield "embedding", square
    if model.positions:  # an example uses each row once, and adds it to the token's embedding
        yield "positions", _squared(grad)
    yield from ((norm, _grad(probe)) for norm, probe in probes(model).items())
    for name, layer in _linear_layers(model).items():
        x, y = recorded[name]
        yield name, layer_square(x, _grad(y), "bias" in layer.rows)


def layer_square(x: Tensor, grad: Tensor, bias: bool) -> Tensor:
    """Return `linear_square`, plus the bias's if there is one: its gradient is the sum over tokens."""
    return linear_square(x, grad) + _squared(grad.sum(1)) if bias else linear_square(x, grad)


def linear_square(x: Tensor, grad: Tensor) -> Tensor:
    """Return sum_b ||G_b^T A_b||^2 of a matrix, from its inputs A [b, t, i] and its outputs' gradients G [b, t, o].

    Either by these products, 2 t i o operations per example, or as sum_st (A A^T)_st (G G^T)_st, 2 t^2 (i + o)
    (Gray et al., whose second form is Li et al.'s), whichever takes fewer; that one also needs less memory.
    """
    (length, inputs), outputs = x.shape[1:], grad.shape[2]
    if length * (inputs + outputs) < inputs * outputs:
        return (x @ x.mT).mul_(grad @ grad.mT).sum(dtype=torch.float64)
    return _squared(grad.mT @ x)


def embedding_square(ids: Tensor, grad: Tensor) -> Tensor:
    """Return sum_b of the squared norm of an embedding's gradient, from ids [b, t] and outputs' gradients [b, t, d].

    Gradients of an id that an example holds more than once belong to one row: they are summed before they are squared.
    """
    distinct = ids + (ids.max() + 1) * torch.arange(len(ids), device=ids.device)[:, None]  # by example
    rows, index = distinct.unique(return_inverse=True)
    return _squared(grad.new_zeros(len(rows), grad.shape[2]).index_add_(0, index.flatten(), grad.flatten(0, 1)))


def tied_inner_product(ids: Tensor, grad: Tensor, x: Tensor, logits_grad: Tensor) -> Tensor:
    """Return sum_b of the inner product of a tied matrix's two gradients: the embedding's, as in `embedding_square`,
    and the unembedding's, from its inputs x [b, t, d] and the gradients of the logits [b, t, vocabulary]."""
    at_ids = logits_grad.gather(2, ids[:, None].expand(-1, ids.shape[1], -1))  # [b, t, s]: at token t, of the s-th's id
    return (x @ grad.mT).mul_(at_ids).sum(dtype=torch.float64)


def _squared(x: Tensor) -> Tensor:
    return x.square().sum(dtype=torch.float64)


def _grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def _by_layer(grads: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the squared norm of the gradients of each layer's parameters together."""
    squares: dict[str, float] = {}
    norms = torch.stack(torch._foreach_norm(list(grads.values()), 2, torch.float64))
    for name, norm in zip(grads, norms.tolist(), strict=True):
        _add(squares, {name.rpartition(".")[0]: norm**2})
    return squares


def _add(totals: dict[str, float], more: Mapping[str, float]) -> None:
    for layer, number in more.items():
        totals[layer] = totals.get(layer, 0.0) + number
