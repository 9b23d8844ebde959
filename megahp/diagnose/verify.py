"""Whether a layout trains the same model as one rank: a small model of a run's kind takes a few steps on both, from
made-up samples, in float64, and whatever the layout must not change is compared.

`python -m megahp.diagnose.verify SETTINGS OUTCOME` is one rank of it.
"""

import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megahp import launch
from megahp.checkpoint.shards import DTYPES
from megahp.config import (
    BatchConfig,
    ComputeConfig,
    Config,
    ParallelConfig,
    config_to_dict,
    config_to_toml,
    resolve,
    with_values,
)
from megahp.data.loader import Batch
from megahp.errors import UserError
from megahp.parallel.device import check_devices, cuda_wanted, device_of
from megahp.parallel.layout import Layout, fit
from megahp.parallel.mesh import Mesh, make_mesh
from megahp.parallel.messages import all_gather_json
from megahp.parallel.parameters import storage, whole
from megahp.scaling.batch import StepPlan, least_batch
from megahp.train.trainer import Trainer

Outcome = Mapping[str, Any]  # what `train` returns
STEPS = 5  # the global batch doubles after the first
RTOL = 1e-9  # of the largest magnitude; float64 rounds to 1e-16, and a wrong sum is off by far more


def verify(config: Config, ranks: int) -> list[str]:
    """What differs between a small run of this kind on so many ranks, laid out as it says, and on one: empty if nothing
    does. Each difference is one line, parameters in the model's order. Raises UserError when ranks do not fit."""
    small = shrink_config(config, fit(config.parallel, ranks))
    check_devices(small, ranks)
    alone = replace(small, parallel=ParallelConfig(), compute=ComputeConfig())
    return differences(_outcome(small, ranks), _outcome(alone, 1), RTOL, RTOL)


def shrink_config(config: Config, layout: Layout) -> Config:
    """A run of this kind, as small as its layout allows, in float64, from made-up data; without float8 and other
    engines, which know no float64."""
    model, parallel, tp = config.model, config.parallel, layout.tp
    stages = layout.pp * parallel.local_stages
    heads = tp * min(2, model.kv_heads // tp)
    width, layers = 8 * heads * min(2, model.heads // model.kv_heads), min(model.layers, stages + 1)
    length = 4 * 2 * layout.cp * tp
    bases = {"parameterization.base_width": width // 2, "parameterization.base_layers": max(1, layers // 2)}
    scaled = {"sp": (), "completep": tuple(bases)}.get(config.parameterization.name, ("parameterization.base_width",))
    soon = {"sparsity.every": 1, "sparsity.begin": 0.0}
    changing = {"gradual": tuple(soon), "rigl": ("sparsity.every",)}.get(config.sparsity.method, ())
    small = with_values(
        replace(config, batch=BatchConfig(micro_batch=1, policy="table")),
        {
            "model.layers": stages if parallel.split else layers,
            "model.width": width,
            "model.head_size": 8,
            "model.heads": width // 8,
            "model.kv_heads": heads,
            "model.mlp_width": 2 * width,
            "model.experts": layout.ep * -(-4 // layout.ep) if model.experts else 0,
            "model.experts_per_token": min(2, model.experts_per_token),
            "model.expert_width": 2 * width if model.experts else 0,
            "model.shared_experts": min(1, model.shared_experts),
            "model.dense_layers": min(1, model.dense_layers),
            "model.vocab_size": 100,
            "parallel.split": (1,) * stages if parallel.split else (),
            **{key: bases[key] for key in scaled},
            "data.train": ("made-up",),
            "data.sequence_length": length,
            "data.lengths": (),
            "data.mixtures": (),
            "data.weights": (),
            "optimizer.eps": 1e-7,  # less, and it would amplify gradients that are rounding alone
            "optimizer.engine": "torch",
            **{key: soon[key] for key in changing},
            "sparsity.layers": config.sparsity.layers[: stages if parallel.split else layers],
            "train.dtype": "float64",
            "schedule.start": 0,
            "compute.norms": "megahp",
            "compute.fp8": "none",
        },
    )
    batch = least_batch(small, layout.dp)
    sized = {
        "batch.global_batch": batch,
        "batch.table": (f"{batch * length}:{2 * batch}",),
        "train.tokens": 4 * STEPS * batch * length,
        "train.steps": STEPS,
    }
    return resolve.from_dict(config_to_dict(with_values(small, sized)), "the small run")


class Trial(Trainer):
    """A trainer on made-up samples."""

    def step(self) -> dict[str, Any]:
        """One optimizer step; its loss, norms and (before clipping) whole gradients of this rank's pipeline stages."""
        plan = self.next_step()
        assert plan is not None
        step = self.compute(self.batches(plan), plan)
        gathered = {name: gather_shards(weight, weight.grad) for name, weight in self.engine.trained.items()}
        self.update(step, plan)
        self.advance(plan, step.measured)
        return {"measured": vars(step.measured), "grads": gathered}

    def calibration(self) -> list[tuple[float, float]]:
        """What one example, the next step's first, says of the whole model beside its norm layers."""
        plan = self.next_step()
        assert plan is not None
        self.calibrate(
            synthetic_batch(np.full(plan.micro_batch, plan.first_sample), self.config, self.mesh.device), plan
        )
        return self.noise.examples

    def weights(self) -> dict[str, Tensor]:
        """The whole weights, the routers' biases and the masks, of this rank's pipeline stages."""
        saved = self.engine.saved | self.masks.state()
        return {name.removeprefix("model."): gather_shards(tensor, tensor) for name, tensor in saved.items()}

    def batches(self, plan: StepPlan) -> Iterator[Batch]:
        for ids in self.samples(plan):
            yield synthetic_batch(ids, self.config, self.mesh.device)


def train(trial: Trial, steps: int) -> dict[str, Any]:
    """So many steps: what each measured, the first step's gradients, what one example says after it, and the weights at
    the end, of the whole model."""
    outcomes = [trial.step()]
    calibration = trial.calibration()
    outcomes += [trial.step() for _ in range(steps - 1)]
    return {
        "measured": [outcome["measured"] for outcome in outcomes],
        "grads": gather_stages(outcomes[0]["grads"], trial.mesh),
        "weights": gather_stages(trial.weights(), trial.mesh),
        "calibration": calibration,
    }


def synthetic_batch(ids: np.ndarray, config: Config, device: torch.device | str = "cpu") -> Batch:
    """Samples that are a function of their ids, in two documents each."""
    length = config.data.sequence_length
    tokens = np.stack([np.random.RandomState(i).randint(0, config.model.vocab_size, length + 1) for i in ids])
    documents = (np.arange(length) >= (ids[:, None] * 7 % length)).astype(np.int32)
    masked = torch.from_numpy(documents).to(device) if config.data.mask_documents else None
    return Batch(torch.from_numpy(tokens).to(device), masked, ids)


def gather_shards(weight: Tensor, value: Tensor | None) -> Tensor:
    """The global tensor of a value that lies on the ranks of one pipeline stage as the weight does."""
    assert value is not None
    return whole(weight, storage(value)).cpu().clone()


def gather_stages(tensors: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """The tensors of all pipeline stages, on every rank."""
    group, found = mesh.group("pp"), {}
    described = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()]
    for stage, part in enumerate(all_gather_json(described, group)):
        for name, dtype, shape in part:
            is_own = stage == dist.get_rank(group)
            found[name] = tensors[name].contiguous() if is_own else torch.empty(shape, dtype=DTYPES[dtype])
            dist.broadcast(found[name], group=group, group_src=stage)
    return found


def differences(got: Outcome, wanted: Outcome, rtol: float, weights_rtol: float | None) -> list[str]:
    """What of two outcomes of `train` differs by more than rtol, by name, the first step's gradients first, in the
    model's order; weights only if a tolerance is given."""
    found = []
    for name in wanted["grads"]:
        found += _difference(f"gradient {name}", got["grads"][name], wanted["grads"][name], rtol)
    for number, (a, b) in enumerate(zip(got["measured"], wanted["measured"], strict=True), 1):
        for key in ("loss", "grad_norm"):
            found += _difference(f"step {number} {key}", a[key], b[key], rtol)
        for key in ("grad_sq_example", "grad_sq_batch", "balance_loss", "load"):
            for name in b[key]:
                found += _difference(f"step {number} {key} {name}", a[key][name], b[key][name], rtol)
    if wanted["calibration"]:  # none where the noise scale is not measured
        found += _difference("one example's gradient", got["calibration"], wanted["calibration"], rtol)
    for name in wanted["weights"] if weights_rtol else ():
        found += _difference(f"weight {name}", got["weights"][name], wanted["weights"][name], weights_rtol or 0)
    return found


def _difference(what: str, a: Any, b: Any, rtol: float) -> list[str]:
    """A line when the two are not equal to rtol of the largest magnitude."""
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    if a.shape != b.shape:
        return [f"{what}: shape {tuple(a.shape)} for {tuple(b.shape)}"]
    error, size = (a - b).abs().max().item(), b.abs().max().item()
    return [] if error <= rtol * size else [f"{what}: off by {error:.3g}, where the largest is {size:.3g}"]


def _outcome(config: Config, ranks: int) -> dict[str, Any]:
    """What `train` makes of these settings on so many fresh ranks."""
    with tempfile.TemporaryDirectory() as folder:
        run_file, outcome = Path(folder) / "run.toml", Path(folder) / "outcome"
        run_file.write_text(config_to_toml(config), encoding="utf-8")
        if code := launch.spawn([str(run_file), str(outcome)], ranks, ("-m", "megahp.diagnose.verify")):
            raise UserError(f"a rank of {ranks} ended with exit code {code}; what it said stands above")
        return torch.load(outcome, weights_only=True)


def _main(run_file: str, outcome: str) -> None:
    config = resolve.load(run_file).config
    place = launch.world()
    launch.join(place, cuda_wanted(config))
    mesh = make_mesh(fit(config.parallel, place.size), device_of(config, place))
    found = train(Trial(config, mesh), STEPS)
    if place.rank == 0:
        torch.save(found, outcome)
    launch.leave(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
