"""The squared norms of every example's gradient, of every weight, exactly, out of backward passes over many examples.

What a layer's weights gain from one example is known from the layer's input and from the gradient of its output, both
of which an ordinary backward pass has (Gray et al., arXiv 2411.00999). The model is training's own, whole on one rank;
but its logits are held, and so are the gradients of all layers' outputs. A diagnosis: training measures norm layers
alone, at no cost.
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
from megahp.parallel.parameters import local, parameters, probes
from megahp.parallel.tensor import ColumnParallelLinear, RowParallelLinear

Seen = Mapping[str, tuple[Tensor, Tensor]]  # layer -> what it was given [b, t, ...], what it gave [b, t, ...]


@dataclass(frozen=True)
class Squares:
    """Mean squared gradient norms of one batch, layer -> number, over the layer's weight and bias. Gradients are of
    losses in nats per token, an example's own its mean over its tokens; of a tied matrix both uses are one gradient."""

    example: dict[str, float]  # mean_b ||g_b||^2
    micro: dict[str, float]  # mean over microbatches of the squared norm of their mean gradient
    batch: dict[str, float]  # ||G||^2, G the mean over the batch


def measure(model: Transformer, microbatches: Iterable[Batch]) -> Squares:
    """The squares of one batch, given as microbatches of equally many examples. The model computes in float32 or
    float64, without recomputation; its weights stay as they are, gradients are left at None. Raises ValueError for a
    model with experts, over which an example's tokens are scattered."""
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
    """One backward pass from the sum of the examples' losses: sum_b ||g_b||^2 by layer, and every weight's gradient,
    sum_b g_b. Gradients there are, are forgotten."""
    model.zero_grad()
    targets = batch.tokens[:, 1:]
    with _watched(model) as seen:
        logits = model(batch.tokens[:, :-1], documents=batch.documents)
    logits.retain_grad()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    losses.mean(1).sum().backward()
    with torch.no_grad():
        squares = {layer: square.item() for layer, square in _squares(model, seen, logits)}
        grads = {name: local(weight.grad) for name, weight in parameters(model)}  # type: ignore[arg-type]
    assert squares.keys() == {_layer(name) for name in grads}  # no weight is left out
    return squares, grads


@contextmanager
def _watched(model: Transformer) -> Iterator[Seen]:
    """While open, what layers are given and what they give is kept, and a backward pass will leave its gradient."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, _: object, given: tuple[Any, ...], gave: Tensor) -> None:
        gave.retain_grad()
        seen[name] = given[0].detach(), gave

    watched = {"embedding": model.embedding, "final_norm": model.final_norm, **_linear_layers(model)}
    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in watched.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _linear_layers(model: Transformer) -> dict[str, ColumnParallelLinear | RowParallelLinear]:
    kinds = (ColumnParallelLinear, RowParallelLinear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _squares(model: Transformer, seen: Seen, logits: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Layer, sum_b ||g_b||^2."""
    ids, embedded = seen["embedding"]
    grad = _grad(embedded)
    square = scattered(ids, grad)
    if model.unembedding is None:
        x = seen["final_norm"][1].detach() * model.table.logits
        square = square + contracted(x, _grad(logits)) + 2 * crossed(ids, grad, x, _grad(logits))
    yield "embedding", square
    if model.positions:  # of which an example uses each row once, and adds it to a token's
        yield "positions", _squared(grad)
    yield from ((norm, _grad(probe)) for norm, probe in probes(model).items())
    for name, layer in _linear_layers(model).items():
        x, y = seen[name]
        yield name, linear(x, _grad(y), "bias" in layer.rows)


def linear(x: Tensor, grad: Tensor, bias: bool) -> Tensor:
    """`contracted`, and the same of the bias, if there is one: its gradient is the sum over tokens."""
    return contracted(x, grad) + _squared(grad.sum(1)) if bias else contracted(x, grad)


def contracted(x: Tensor, grad: Tensor) -> Tensor:
    """sum_b ||G_b^T A_b||^2, a linear layer's, from its inputs A [b, t, i] and its outputs' gradients G [b, t, o].

    Either those products themselves, 2 t i o operations an example, or sum_st (A A^T)_st (G G^T)_st, 2 t^2 (i + o)
    (Gray et al., whose second form is Li et al.'s), whichever are fewer; the fewer also hold less.
    """
    (length, inputs), outputs = x.shape[1:], grad.shape[2]
    if length * (inputs + outputs) < inputs * outputs:
        return (x @ x.mT).mul_(grad @ grad.mT).sum(dtype=torch.float64)
    return _squared(grad.mT @ x)


def scattered(ids: Tensor, grad: Tensor) -> Tensor:
    """sum_b of the squared norm of an embedding's gradient, from ids [b, t] and the gradients of what was looked up
    [b, t, d]: those of an id that an example holds more than once are one row's, and add up before they are squared."""
    apart = ids + (ids.max() + 1) * torch.arange(len(ids), device=ids.device)[:, None]
    rows, places = apart.unique(return_inverse=True)
    return _squared(grad.new_zeros(len(rows), grad.shape[2]).index_add_(0, places.flatten(), grad.flatten(0, 1)))


def crossed(ids: Tensor, grad: Tensor, x: Tensor, logits_grad: Tensor) -> Tensor:
    """sum_b of the inner product of a tied matrix's two gradients, the embedding's (as in `scattered`) and the
    unembedding's, from its inputs [b, t, d] and the gradients of its logits [b, t, vocabulary]."""
    at_ids = logits_grad.gather(2, ids[:, None].expand(-1, ids.shape[1], -1))  # [b, t, s]: at token t, of the s-th's id
    return (x @ grad.mT).mul_(at_ids).sum(dtype=torch.float64)


def _squared(x: Tensor) -> Tensor:
    return x.square().sum(dtype=torch.float64)


def _grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def _by_layer(grads: Mapping[str, Tensor]) -> dict[str, float]:
    """Squared norms of the gradients of each layer's parameters together."""
    squares: dict[str, float] = {}
    norms = torch.stack(torch._foreach_norm(list(grads.values()), 2, torch.float64))
    for name, norm in zip(grads, norms.tolist(), strict=True):
        _add(squares, {_layer(name): norm**2})
    return squares


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _add(totals: dict[str, float], more: Mapping[str, float]) -> None:
    for layer, number in more.items():
        totals[layer] = totals.get(layer, 0.0) + number
