"""Where numbers stopped being finite: found by doing the step again, and looking at what every layer gives."""

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
WEIGHT, OUTPUT, BEFORE, GRADIENT = range(len(KINDS))


@dataclass(frozen=True, order=True)
class Suspect:
    """Something not finite on one rank. The least is the first to look at: a weight, else the first layer's output,
    else the last layer's gradient; of the first microbatch."""

    kind: int  # of KINDS
    microbatch: int
    place: int  # along the pass
    layer: str
    rank: int
    samples: tuple[int, ...] = ()  # global ids

    def __str__(self) -> str:
        of = f", microbatch {self.microbatch}, samples {', '.join(map(str, self.samples))}" if self.samples else ""
        return f"{KINDS[self.kind]} {self.layer} is not finite on rank {self.rank}{of}"


@contextlib.contextmanager
def watch_layers(stages: Mapping[int, nn.Module], samples: Sequence[np.ndarray]) -> Iterator[list[Suspect]]:
    """Gather what is not finite on this rank while a step is computed. samples: global ids of each microbatch."""
    found: list[Suspect] = []
    rank = dist.get_rank()

    def note(kind: int, depth: int, name: str, microbatch: int, value: Tensor) -> None:
        wrong = ~torch.isfinite(value.detach()).flatten(1).all(1)
        if wrong.any():
            ids = samples[microbatch][wrong.cpu().numpy()].tolist()
            found.append(Suspect(kind, microbatch, depth if kind == OUTPUT else -depth, name, rank, tuple(ids)))

    def hook(depth: int, name: str) -> Callable[..., None]:
        microbatches = count()  # every schedule takes them in order

        def look(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            microbatch = next(microbatches)
            note(OUTPUT, depth, name, microbatch, output)
            if output.requires_grad:
                output.register_hook(lambda gradient: note(BEFORE, depth, name, microbatch, gradient))

        return look

    hooks = [
        layer.register_forward_hook(hook(depth, name))
        for number, stage in stages.items()
        for depth, (name, layer) in enumerate(_layers(stage), start=number << 20)
    ]
    try:
        yield found
    finally:
        for each in hooks:
            each.remove()


def find_in_weights(weights: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> list[Suspect]:
    """The weights, and the gradients, of which this rank's part is not finite."""
    rank, places = dist.get_rank(), {name: place for place, name in enumerate(weights)}
    spoilt = [name for name, weight in weights.items() if not torch.isfinite(storage(weight)).all()]
    found = [Suspect(WEIGHT, 0, places[name], name, rank) for name in spoilt]
    spoilt = [name for name, grad in grads.items() if not torch.isfinite(grad).all()]
    return found + [Suspect(GRADIENT, 0, -places[name], name, rank) for name in spoilt]


def first_suspects(found: Sequence[Suspect]) -> list[Suspect]:
    """The first suspects of all ranks: the same layer's, where several ranks saw it. Equal on all ranks."""
    gathered = all_gather_json([asdict(each) for each in sorted(found)[:1]])
    suspects = sorted(Suspect(**told | {"samples": tuple(told["samples"])}) for of_rank in gathered for told in of_rank)
    return [each for each in suspects if (each.kind, each.layer) == (suspects[0].kind, suspects[0].layer)]


def _layers(stage: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a pipeline stage by name, in the order of the forward pass; last the stage itself, which gives the
    losses."""
    for name, module in stage.named_children():
        if isinstance(module, nn.ModuleDict):
            yield from ((f"{name}.{number}", block) for number, block in module.items())
        elif name in ("embedding", "final_norm"):
            yield name, module
    yield "the stage's end", stage
