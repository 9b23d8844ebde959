"""How large a model's activations are, and how much of a layer's change is only linear: what must not depend on the
model's size where learning is to transfer. `megahp coordinate-check` fits and judges them over a family of sizes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megahp.config import Config
from megahp.data.loader import Batch
from megahp.diagnose.verify import Trial
from megahp.model.attention import Attention
from megahp.model.mlp import MLP, activate
from megahp.parallel.mesh import Mesh
from megahp.scaling.batch import StepPlan

Weights = dict[str, Tensor]
Samples = Callable[[np.ndarray], Tensor]  # their ids -> tokens [samples, 1 + length]
QUANTITIES = ("stream", "attention", "mlp", "logits")


class Watched(Trial):
    """A model, whole on one rank, trained from these samples, and looked at on the first batch's."""

    def __init__(self, config: Config, mesh: Mesh, samples: Samples) -> None:
        super().__init__(config, mesh)
        self.source = samples
        (self.model,) = self.engine.stages
        self.tokens = samples(np.arange(config.batch.global_batch))[:, :-1].to(mesh.device)

    def batches(self, plan: StepPlan) -> Iterator[Batch]:
        for ids in self.samples(plan):
            yield Batch(self.source(ids).to(self.mesh.device), None, ids)

    @torch.no_grad()
    def look(self, hooks: Mapping[nn.Module, Any]) -> Tensor:
        """The logits; hooks: module -> what is called with (module, inputs, output) as it computes them."""
        handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
        try:
            return self.model(self.tokens)
        finally:
            for handle in handles:
                handle.remove()
            self.engine.reshard()


def activations(config: Config, mesh: Mesh, steps: int, samples: Samples) -> list[dict[str, float]]:
    """Mean |activation| at init and after so many steps: of the last block's output ("stream"), of all blocks'
    attention output before it is added to the stream, of all blocks' MLP pre-activations, of the logits."""
    trial = Watched(config, mesh, samples)
    found = [_activations(trial)]
    for _ in range(steps):
        trial.step()
    return [*found, _activations(trial)]


def _activations(trial: Watched) -> dict[str, float]:
    seen: dict[str, list[float]] = defaultdict(list)

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: seen[name].append(output.abs().mean().item())

    modules = trial.model.modules
    hooks: dict[nn.Module, Any] = {list(trial.model.blocks.values())[-1]: keep("stream")}
    hooks |= {module: keep("attention") for module in modules() if isinstance(module, Attention)}
    hooks |= {module.up: keep("mlp") for module in modules() if isinstance(module, MLP)}
    keep("logits")(None, None, trial.look(hooks))
    return {name: float(np.mean(seen[name])) for name in QUANTITIES if name in seen}


def nonlinearity(config: Config, mesh: Mesh, samples: Samples) -> float:
    """How far one step moves the MLPs' outputs from where their linearisation in the weights would: the norm of
    (change - linear change) over that of the linear change, its mean in log over the blocks.

    h(w) is an MLP's output on its inputs at init, w all of its weights, the linear change the Jacobian-vector product
    of h at init with their change. Where this vanishes as the model grows, learning becomes lazy. (CompleteP, arXiv
    2505.01618, section on complete feature learning; its authors look at one neuron of a toy residual MLP of which one
    matrix is trained.)
    """
    trial = Watched(config, mesh, samples)
    inputs: dict[str, Tensor] = {}
    mlps = {name: module for name, module in trial.model.named_modules() if isinstance(module, MLP)}
    trial.look({mlp: lambda _m, given, _out, name=name: inputs.update({name: given[0]}) for name, mlp in mlps.items()})
    before = trial.weights()
    trial.step()
    after = trial.weights()
    ratios = []
    for name in mlps:
        old, new = (_of(weights, f"{name}.") for weights in (before, after))
        h = partial(mlp_output, x=inputs[name].to(old["up.weight"]), activation=config.model.activation)
        ratios.append(relative_distance(h, old, new))
    return float(np.exp(np.mean(np.log(ratios))))


def relative_distance(h: Callable[[Weights], Tensor], old: Weights, new: Weights) -> float:
    """||h(new) - h(old) - J (new - old)|| / ||J (new - old)||, J the Jacobian of h at the old weights."""
    change = {name: new[name] - old[name] for name in old}
    start, linear = torch.func.jvp(h, (old,), (change,))[:2]
    return ((h(new) - start - linear).norm() / linear.norm()).item()


def mlp_output(weights: Weights, x: Tensor, activation: str) -> Tensor:
    """What megahp.model.mlp.MLP computes, as a function of its whole weights."""

    def layer(name: str, given: Tensor) -> Tensor:
        return F.linear(given, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    gate = layer("gate", x) if "gate.weight" in weights else None
    return layer("down", activate(activation, layer("up", x), gate))


def _of(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): w.double() for name, w in weights.items() if name.startswith(prefix)}
