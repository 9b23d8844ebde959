"""Locating numbers that are not finite, by repeating a step and checking what every layer computes."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megahp.parallel.messages import all_gather_json
from megahp.parallel.parameters import storage

KINDS = ("weight", "output of", "gradient at the output of", "gradient of")
WEIGHT, OUTPUT, OUTPUT_GRADIENT, GRADIENT = range(len(KINDS))


@dataclass(frozen=True, order=True)
class Suspect:
    """Something not finite on one rank, ordered by how near it is to the cause: a weight, else the first layer's
    output, else the last layer's gradient, in the first microbatch."""

    kind: int  # of KINDS
    microbatch: int
    position: int  # along the pass: negative, from the last layer on, in the backward pass
    layer: str
    rank: int
    samples: tuple[int, ...] = ()  # global ids

    def __str__(self) -> str:
        of = f", microbatch {self.microbatch}, samples {', '.join(map(str, self.samples))}" if self.samples else ""
        return f"{KINDS[self.kind]} {self.layer} is not finite on rank {self.rank}{of}"


@contextlib.contextmanager
def watch_layers(stages: Mapping[int, nn.Module], samples: Sequence[np.ndarray]) -> Iterator[list[Suspect]]:
    """Yield a list that collects what is not finite on this rank while a step is computed.

    samples: global ids of each microbatch.
    """
    found: list[Suspect] = []
    rank = dist.get_rank()

    def check(kind: int, position: int, name: str, microbatch: int, value: Tensor) -> None:
        is_bad = ~torch.isfinite(value.detach()).flatten(1).all(1)
        if is_bad.any():
            ids = samples[microbatch][is_bad.cpu().numpy()].tolist()
            found.append(Suspect(kind, microbatch, position, name, rank, tuple(ids)))

    def hook(depth: int, name: str) -> Callable[..., None]:
        microbatches = count()  # counted in forward passes: every schedule takes microbatches in order

        def check_output(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            microbatch = next(microbatches)
            check(OUTPUT, depth, name, microbatch, output)
            if output.requires_grad:
                output.register_hook(lambda gradient: check(OUTPUT_GRADIENT, -depth, name, microbatch, gradient))

        return check_output

    handles = [
        layer.register_forward_hook(hook(depth, name))
        for number, stage in stages.items()
        for depth, (name, layer) in enumerate(_layers(stage), start=number << 20)  # stages one after another
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def find_in_weights(weights: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> list[Suspect]:
    """Return the weights, and the gradients, of which this rank's part is not finite."""
    rank, positions = dist.get_rank(), {name: position for position, name in enumerate(weights)}
    bad_weights = [name for name, weight in weights.items() if not torch.isfinite(storage(weight)).all()]
    bad_grads = [name for name, grad in grads.items() if not torch.isfinite(grad).all()]
    return [Suspect(WEIGHT, 0, positions[name], name, rank) for name in bad_weights] + [
        Suspect(GRADIENT, 0, -positions[name], name, rank) for name in bad_grads
    ]


def first_suspects(found: Sequence[Suspect]) -> list[Suspect]:
    """Return the first suspect of all ranks, and those of other ranks in the same layer. Equal on all ranks."""
    gathered = all_gather_json([asdict(suspect) for suspect in sorted(found)[:1]])
    suspects = sorted(Suspect(**each | {"samples": tuple(each["samples"])}) for of_rank in gathered for each in of_rank)
    return [each for each in suspects if (each.kind, each.layer) == (suspects[0].kind, suspects[0].layer)]


def _layers(stage: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers of a pipeline stage by name, in the order of the forward pass; last the stage itself, which
    returns the losses."""
    for name, module in stage.named_children():
        if isinstance(module, nn.ModuleDict):
            yield from ((f"{name}.{number}", block) for number, block in module.items())
        elif name in ("embedding", "final_norm"):
            yield name, module
    yield "the stage's end", stage
