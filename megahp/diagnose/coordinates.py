"""Activation sizes, and how nonlinear a layer's change is: both must not depend on the model's size where
hyperparameters transfer. `megahp coordinate-check` fits and judges them over a family of sizes.
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
QUANTITIES = ("stream", "attention", "mlp", "pre-activation", "logits")


class HookedTrial(Trial):
    """A model on one rank that trains on these samples, and whose modules' outputs on the first batch can be read."""

    def __init__(self, config: Config, mesh: Mesh, samples: Samples) -> None:
        super().__init__(config, mesh)
        self.source = samples
        (self.model,) = self.engine.stages
        self.tokens = samples(np.arange(config.batch.global_batch))[:, :-1].to(mesh.device)

    def batches(self, plan: StepPlan) -> Iterator[Batch]:
        for ids in self.samples(plan):
            yield Batch(self.source(ids).to(self.mesh.device), None, ids)

    @torch.no_grad()
    def forward_with_hooks(self, hooks: Mapping[nn.Module, Any]) -> Tensor:
        """Return the first batch's logits; hooks: module -> function of (module, inputs, output)."""
        handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
        try:
            return self.model(self.tokens)
        finally:
            for handle in handles:
                handle.remove()
            self.engine.reshard()


def activations(config: Config, mesh: Mesh, steps: int, samples: Samples) -> list[dict[str, float]]:
    """Return mean |activation| at init and after `steps` steps: of the last block's output ("stream"); over all blocks,
    of what attention and MLP give before it is added to the stream ("mlp", with experts too, as in CompleteP's own
    check), and of dense MLPs' first product ("pre-activation"); of the logits."""
    trial = HookedTrial(config, mesh, samples)
    at_init = _activations(trial)
    for _ in range(steps):
        trial.step()
    return [at_init, _activations(trial)]


def _activations(trial: HookedTrial) -> dict[str, float]:
    means: dict[str, list[float]] = defaultdict(list)

    def record(name: str) -> Any:
        return lambda _module, _inputs, output: means[name].append(output.abs().mean().item())

    modules = trial.model.modules
    blocks = list(trial.model.blocks.values())
    hooks: dict[nn.Module, Any] = {blocks[-1]: record("stream")}
    hooks |= {module: record("attention") for module in modules() if isinstance(module, Attention)}
    hooks |= {block.get_submodule("mlp"): record("mlp") for block in blocks}
    hooks |= {module.up: record("pre-activation") for module in modules() if isinstance(module, MLP)}
    means["logits"] = [trial.forward_with_hooks(hooks).abs().mean().item()]
    return {name: float(np.mean(means[name])) for name in QUANTITIES if name in means}


def nonlinearity(config: Config, mesh: Mesh, samples: Samples) -> float:
    """Return how far one step moves the MLPs' outputs from where their linearisation in the weights would.

    The norm of (change - linear change) over that of the linear change, its mean in log over the blocks. h(w) is an
    MLP's output on its inputs at init, w all of its weights, the linear change the Jacobian-vector product of h at init
    with their change. Where this vanishes as the model grows, learning becomes lazy. (CompleteP, arXiv 2505.01618,
    section on complete feature learning; its authors look at one neuron of a toy residual MLP, of which one matrix is
    trained.)
    """
    trial = HookedTrial(config, mesh, samples)
    inputs: dict[str, Tensor] = {}
    mlps = {name: module for name, module in trial.model.named_modules() if isinstance(module, MLP)}
    trial.forward_with_hooks(
        {mlp: lambda _mlp, args, _output, name=name: inputs.update({name: args[0]}) for name, mlp in mlps.items()}
    )
    before = trial.weights()
    trial.step()
    after = trial.weights()
    ratios = []
    for name in mlps:
        old, new = (
            {key.removeprefix(f"{name}."): w.double() for key, w in weights.items() if key.startswith(f"{name}.")}
            for weights in (before, after)
        )
        h = partial(mlp_output, x=inputs[name].to(old["up.weight"]), activation=config.model.activation)
        ratios.append(relative_distance(h, old, new))
    return float(np.exp(np.mean(np.log(ratios))))


def relative_distance(h: Callable[[Weights], Tensor], old: Weights, new: Weights) -> float:
    """Return ||h(new) - h(old) - J (new - old)|| / ||J (new - old)||, J the Jacobian of h at the old weights."""
    change = {name: new[name] - old[name] for name in old}
    start, linear = torch.func.jvp(h, (old,), (change,))[:2]
    return ((h(new) - start - linear).norm() / linear.norm()).item()


def mlp_output(weights: Weights, x: Tensor, activation: str) -> Tensor:
    """Compute megahp.model.mlp.MLP as a function of its whole weights."""

    def layer(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    gate = layer("gate", x) if "gate.weight" in weights else None
    alphas = [weights[name] for name in ("alpha_p", "alpha_n") if name in weights]
    return layer("down", activate(activation, layer("up", x), gate, alphas))
