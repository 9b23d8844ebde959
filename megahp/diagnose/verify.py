"""Check that a layout trains the same model as one rank: a small model of the run's kind takes a few steps on both, on
synthetic samples in float64, and everything that the layout must not change is compared.

`python -m megahp.diagnose.verify RUN.toml OUTCOME` is one of its ranks.
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
from megahp.config.schema import FIELDS
from megahp.data.loader import Batch
from megahp.errors import UserError
from megahp.parallel.device import check_devices, claim_device, uses_cuda
from megahp.parallel.layout import Layout, fit
from megahp.parallel.mesh import Mesh, make_mesh
from megahp.parallel.messages import all_gather_json
from megahp.parallel.parameters import storage, whole
from megahp.scaling.batch import StepPlan, least_batch
from megahp.train.trainer import Trainer

Outcome = Mapping[str, Any]  # what `train` returns
STEPS = 5  # the global batch doubles after the first
RTOL = 1e-9  # of the largest magnitude; float64 rounds to 1e-16, and a wrong sum differs by far more
RTOL_FLOAT32 = 1e-4  # for DeepSpeed, which has no float64: of a tiny model's numbers


def verify(config: Config, ranks: int) -> list[str]:
    """Return the differences, a line each, between a small run of this kind on its layout and on one rank.

    Parameters are in the model's order. Raises UserError when the layout does not fit the ranks.
    """
    small = shrink_config(config, fit(config.parallel, ranks))
    check_devices(small, ranks)
    alone = replace(small, parallel=ParallelConfig(), compute=ComputeConfig())
    rtol = RTOL if small.train.dtype == "float64" else RTOL_FLOAT32
    return differences(_outcome(small, ranks), _outcome(alone, 1), rtol, rtol)


def shrink_config(config: Config, layout: Layout) -> Config:
    """Return the config of a run of this kind, as small as the layout allows, in float64 if its engine has that, on
    synthetic data; without float8 and other engines' layers, which do not support float64, and FP4, whose blocks are
    larger."""
    model, parallel, tp = config.model, config.parallel, layout.tp
    stages = layout.pp * parallel.local_stages
    layers = min(model.layers, stages + 1)
    depth = stages if parallel.split else layers
    kv_heads = tp * min(2, model.kv_heads // tp) or model.kv_heads  # or fewer than tp ranks, which then share them
    width = 8 * max(tp, kv_heads * min(2, model.heads // model.kv_heads))
    length = 4 * 2 * layout.cp * tp
    bases = {"parameterization.base_width": width // 2, "parameterization.base_layers": max(1, layers // 2)}
    used_bases = {"sp": (), "completep": tuple(bases)}.get(
        config.parameterization.name, ("parameterization.base_width",)
    )
    early = {"sparsity.every": 1, "sparsity.begin": 0.0}  # or masks would not change within STEPS
    low_rank = {"optimizer.rank": 4, "optimizer.refresh": 2}  # or subspaces would not change either
    used_low_rank = low_rank if config.optimizer.name in ("dct", "galore") else {}
    used_early = {"gradual": tuple(early), "rigl": ("sparsity.every",)}.get(config.sparsity.method, ())
    small = with_values(
        replace(config, batch=BatchConfig(micro_batch=1, policy="table")),
        {
            "model.layers": depth,
            "model.width": width,
            "model.head_size": 8,
            "model.heads": width // 8,
            "model.kv_heads": kv_heads,
            "model.mlp_width": 2 * width,
            "model.experts": layout.ep * -(-4 // layout.ep) if model.experts else 0,
            "model.experts_per_token": min(2, model.experts_per_token),
            "model.expert_width": 2 * width if model.experts else 0,
            "model.shared_experts": min(1, model.shared_experts),
            "model.dense_layers": min(1, model.dense_layers),
            "model.window": min(model.window, length // 2),
            "model.full_attention_every": min(model.full_attention_every, 2),
            "model.no_rope_every": min(model.no_rope_every, 2),
            "model.quantize_group": 8 if model.quantize != "none" else model.quantize_group,
            "model.vocab_size": 100,
            "model.levels": (90 // len(config.model.levels),) * len(config.model.levels) if config.model.levels else (),
            "parallel.split": (1,) * stages if parallel.split else (),
            **{key: bases[key] for key in used_bases},
            "data.train": ("synthetic",),
            "data.sequence_length": length,
            "data.lengths": (),
            "data.mixtures": (),
            "data.weights": (),
            "optimizer.eps": 1e-7,  # a smaller one would amplify gradients that are only rounding
            "optimizer.engine": "torch",
            **used_low_rank,
            **{key: early[key] for key in used_early},
            "sparsity.layers": config.sparsity.layers[:depth],
            "train.dtype": "float64" if config.parallel.engine == "megahp" else "float32",
            "schedule.start": 0,
            "distill.teachers": (),  # of other sizes
            "compute.norms": "megahp",
            "compute.fp8": "none",
            **{key: FIELDS[key].default for key in FIELDS if key.startswith("compute.fp4_")},
        },
    )
    batch = least_batch(small, layout.dp)  # which depends on the values above
    sizes = {
        "batch.global_batch": batch,
        "batch.table": (f"{batch * length}:{2 * batch}",),
        "train.tokens": 4 * STEPS * batch * length,
        "train.steps": STEPS,
    }
    return resolve.from_dict(config_to_dict(with_values(small, sizes)), "the small run")


class Trial(Trainer):
    """A trainer on synthetic samples."""

    def step(self) -> dict[str, Any]:
        """Take one optimizer step. Returns its loss, norms and (before clipping) global gradients of this rank's
        pipeline stages."""
        plan = self.next_step()
        assert plan is not None
        step = self.compute(self.batches(plan), plan)
        parts = zip(self.engine.trained.items(), step.grads, strict=True)
        grads = {name: whole(weight, part).cpu().clone() for (name, weight), part in parts}
        self.update(step, plan)
        self.advance(plan, step.measured)
        return {"measured": vars(step.measured), "grads": grads}

    def calibration(self) -> list[tuple[float, float]]:
        """Return the gradient squares of one example, the next step's first: of the whole model and its norm layers."""
        plan = self.next_step()
        assert plan is not None
        ids = np.full(plan.micro_batch, plan.first_sample)
        self.calibrate(synthetic_batch(ids, self.config, self.mesh.device), plan)
        return self.noise.examples

    def weights(self) -> dict[str, Tensor]:
        """Return the global weights, router biases and masks of this rank's pipeline stages."""
        saved = self.engine.saved | self.masks.state()
        return {name.removeprefix("model."): whole(each, storage(each)).cpu().clone() for name, each in saved.items()}

    def batches(self, plan: StepPlan) -> Iterator[Batch]:
        for ids in self.samples(plan):
            yield synthetic_batch(ids, self.config, self.mesh.device)


def train(trial: Trial, steps: int) -> dict[str, Any]:
    """Train for some steps. Returns each one's measurements, the first one's gradients, the calibration after it, and
    the weights at the end, all of the whole model."""
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
    """Return samples that are a function of their ids, in two documents each."""
    length = config.data.sequence_length
    tokens = np.stack([np.random.RandomState(i).randint(0, config.model.vocab_size, length + 1) for i in ids])
    documents = (np.arange(length) >= (ids[:, None] * 7 % length)).astype(np.int32)
    masked = torch.from_numpy(documents).to(device) if config.data.mask_documents else None
    return Batch(torch.from_numpy(tokens).to(device), masked, ids)


def gather_stages(tensors: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """Return the tensors of all pipeline stages, on every rank."""
    group, gathered = mesh.group("pp"), {}
    described = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()]
    for stage, stage_tensors in enumerate(all_gather_json(described, group)):
        for name, dtype, shape in stage_tensors:
            is_local = stage == dist.get_rank(group)
            gathered[name] = tensors[name].contiguous() if is_local else torch.empty(shape, dtype=DTYPES[dtype])
            dist.broadcast(gathered[name], group=group, group_src=stage)
    return gathered


def differences(outcome: Outcome, expected: Outcome, rtol: float, weights_rtol: float | None) -> list[str]:
    """Return what of two outcomes of `train` differs by more than rtol: first gradients, in the model's order, then
    each step, the calibration and, if a tolerance is given, weights."""
    lines = []
    for name in expected["grads"]:
        lines += _difference(f"gradient {name}", outcome["grads"][name], expected["grads"][name], rtol)
    for number, (a, b) in enumerate(zip(outcome["measured"], expected["measured"], strict=True), 1):
        for key in ("loss", "grad_norm"):
            lines += _difference(f"step {number} {key}", a[key], b[key], rtol)
        for key in ("grad_sq_example", "grad_sq_batch", "balance_loss", "load"):
            for name in b[key]:
                lines += _difference(f"step {number} {key} {name}", a[key][name], b[key][name], rtol)
    if expected["calibration"]:  # empty where the noise scale is not measured
        lines += _difference("one example's gradient", outcome["calibration"], expected["calibration"], rtol)
    for name in expected["weights"] if weights_rtol else ():
        lines += _difference(f"weight {name}", outcome["weights"][name], expected["weights"][name], weights_rtol or 0)
    return lines


def _difference(what: str, a: Any, b: Any, rtol: float) -> list[str]:
    """Return a line when the two differ by more than rtol of the largest magnitude, else none."""
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    if a.shape != b.shape:
        return [f"{what}: shape {tuple(a.shape)} for {tuple(b.shape)}"]
    error, size = (a - b).abs().max().item(), b.abs().max().item()
    return [] if error <= rtol * size else [f"{what}: off by {error:.3g}, where the largest is {size:.3g}"]


def _outcome(config: Config, ranks: int) -> dict[str, Any]:
    """Run `train` with this config on newly started ranks."""
    with tempfile.TemporaryDirectory() as folder:
        run_file, outcome = Path(folder) / "run.toml", Path(folder) / "outcome"
        run_file.write_text(config_to_toml(config), encoding="utf-8")
        if code := launch.spawn([str(run_file), str(outcome)], ranks, ("-m", "megahp.diagnose.verify")):
            raise UserError(f"a rank of {ranks} ended with exit code {code}; its own message stands above")
        return torch.load(outcome, weights_only=True)


def _main(run_file: str, outcome: str) -> None:
    launch.allow_interrupts()
    config = resolve.load(run_file).config
    world = launch.world()
    launch.join(world, uses_cuda(config))
    mesh = make_mesh(fit(config.parallel, world.size), claim_device(config, world))
    trained = train(Trial(config, mesh), STEPS)
    if world.rank == 0:
        torch.save(trained, outcome)
    launch.leave(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
