"""Sparse weights: the same masks and the same training on every layout, on a plain loop that multiplies weights by
masks, and after a resume elsewhere; and what breaks any of it shows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from corpus import write_corpus
from distributed import runs, world
from distributed.training import Training, differences, settings_of, train, whole
from torch import Tensor
from torch.func import functional_call

from megahp import checkpoint
from megahp.checkpoint.shards import Tensors
from megahp.config import Config
from megahp.log.metrics import read_events, read_metrics
from megahp.parallel import selection
from megahp.parallel.parameters import like, storage
from megahp.scaling.parameterization import Role, table_of
from megahp.train import masks

STEPS = 5
FOUR, EIGHT = "batch.micro_batch=4", "batch.micro_batch=8"
COMMON = ("train.dtype=float64", "train.tokens=1792", 'batch.table=["128:16"]')  # five steps are 64 % of them
METHODS = {
    "static": ("parameterization.name=smupar", "parameterization.base_layers=2", "sparsity.layers=[0.5,0.125]"),
    "gradual": ("sparsity.density=0.3", "sparsity.every=2"),
    "rigl": ("parameterization.scale_density=true", "sparsity.density=0.4", "sparsity.every=2"),
}
LAYOUTS = {
    "one": (),
    "tp2 sp": ("parallel.tp=2", "parallel.sequence_parallel=true", FOUR),
    "shard2": (FOUR,),
    "replicate2": ("parallel.dp_replicate=2",),
    "cp2": ("parallel.cp=2", EIGHT),
    "pp2 zero-bubble": ("parallel.pp=2", "parallel.schedule=zero-bubble"),
    "ep2": ("parallel.ep=2", FOUR),
}
Case = tuple[str, str, str]  # layout, model, method
CELLS: list[Case] = [
    ("tp2 sp", "llama", "static"),
    ("tp2 sp", "alibi", "gradual"),
    ("shard2", "llama", "gradual"),
    ("shard2", "alibi", "rigl"),
    ("replicate2", "llama", "rigl"),
    ("cp2", "alibi", "rigl"),
    ("pp2 zero-bubble", "llama", "static"),
    ("pp2 zero-bubble", "alibi", "gradual"),
    ("ep2", "moe", "rigl"),
]


def config(layout: str, model: str, method: str) -> Config:
    return settings_of(model, *COMMON, f"sparsity.method={method}", *METHODS[method], *LAYOUTS[layout])


def train_case(case: Case) -> dict[str, Any]:
    return train(config(*case), STEPS)


# What can be wrong, and a case in which it shows.


def without_masking(self: masks.Masks, grads: Sequence[Tensor], plan: Any) -> None:
    self.unmasked_grads = {}


def of_masked_gradients(self: masks.Masks, grads: Sequence[Tensor], plan: Any) -> None:
    for name, place in self.grad_index.items():
        grads[place].mul_(self.masks[name])
    decide = plan.step % self.sparsity.every == 0
    self.unmasked_grads = {name: grads[place].clone() for name, place in self.grad_index.items() if decide}


def drawn_by_each_rank(name: str, weight: Tensor, density: float, seed: int) -> Tensor:
    return DRAW_MASK(name, weight, density, seed + torch.distributed.get_rank())


DRAW_MASK = masks.draw_mask
MISTAKES: dict[str, tuple[Case, Callable[[], Any]]] = {
    "gradients are not masked": (
        ("shard2", "alibi", "rigl"),
        lambda: mock.patch.object(masks.Masks, "mask_step_gradients", without_masking),
    ),
    "gradients are masked before they choose": (
        ("shard2", "alibi", "rigl"),
        lambda: mock.patch.object(masks.Masks, "mask_step_gradients", of_masked_gradients),
    ),
    "masks are drawn by each rank": (
        ("tp2 sp", "llama", "static"),
        lambda: mock.patch.object(masks, "draw_mask", drawn_by_each_rank),
    ),
    "a threshold is each rank's own": (
        ("tp2 sp", "alibi", "gradual"),
        lambda: mock.patch.object(selection, "dist", SimpleNamespace(all_reduce=lambda counts: None)),
    ),
    "copies are counted": (
        ("replicate2", "llama", "rigl"),
        lambda: mock.patch.object(selection, "is_first_replica", lambda *_: True),
    ),
    "moments stay": (("shard2", "llama", "gradual"), lambda: mock.patch.object(masks, "MOMENTS", ())),
}


def tied_choices(case: Case) -> dict[bool, Any]:
    """All but a third of the weights that a mask keeps, rounded to one decimal: of all together, and of each alone."""
    found = {}
    training = Training(config(*case))
    own, rows = training.masks, training.engine.rows
    names = [name for name, row in rows.items() if row.role is Role.HIDDEN]
    values = {name: storage(weight).mul(10).round() for name, weight in own.weights.items()}
    for together in (True, False):
        entries = selection.Entries(names, own.weights, rows, training.mesh, together)
        kept = entries.count(own.masks)
        chosen, least = entries.largest(values, own.masks, kept - kept // 3)
        parts = {name: (values[name], own.masks[name], chosen[name]) for name in names}
        found[together] = {
            name: [whole(like(own.weights[name], part)) for part in three] for name, three in parts.items()
        } | {"least": least}
    return found


# The same by a plain loop.


def plainly(case: Case) -> dict[str, Any]:
    """Losses, weights and masks of a loop that multiplies weights by masks in the forward pass, and knows nothing of
    masks elsewhere, with torch's AdamW and masks made by sorting."""
    chosen = config(*case)
    training = Training(chosen)
    model, rows, table = training.engine.stages[0], training.engine.rows, table_of(chosen)
    own = {name: mask.clone() for name, mask in training.masks.masks.items()}
    weights = {name: torch.nn.Parameter(storage(w).clone()) for name, w in training.engine.weights.items()}
    optimizer = torch.optim.AdamW([{"params": [weight], "name": name} for name, weight in weights.items()])
    losses = []
    for step in range(1, STEPS + 1):
        plan = training.batch_scheduler.step(training.progress)
        assert plan
        masked = {name: w * own[name] if name in own else w * 1 for name, w in weights.items()}
        for product in masked.values():
            product.retain_grad()
        optimizer.zero_grad()
        losses.append(0.0)
        for batch in training.batches(plan):
            loss = functional_call(model, masked, (batch.tokens[:, :-1], batch.tokens[:, 1:], batch.documents)).sum()
            (loss / plan.tokens).backward(retain_graph=True)
            losses[-1] += loss.item() / plan.tokens
        norm = torch.cat([weight.grad.flatten() for weight in weights.values()]).norm()  # torch's adds 1e-6 to it
        for weight in weights.values():
            weight.grad.mul_((chosen.optimizer.clip / norm).clamp(max=1))
        for group in optimizer.param_groups:
            rule = table.rules[rows[group["name"]].role]
            sparser = density_of(group["name"], chosen) if group["name"] in own and table.scale_density else 1
            group.update(lr=plan.lr * rule.lr / sparser, weight_decay=plan.weight_decay * rule.weight_decay)
            group.update(eps=plan.eps * rule.eps, betas=(plan.beta1, plan.beta2))
        optimizer.step()
        training.progress = training.progress.after(plan)
        training.batch_scheduler.update(training.progress, None)
        own = changed(chosen, training.progress.tokens / chosen.train.tokens, step, weights, own, masked)
        for name, mask in own.items():
            weights[name].data.mul_(mask)
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer.state[weights[name]][moment].mul_(mask)
    return {"losses": losses, "weights": {name: w.detach() for name, w in weights.items()}, "masks": own}


def density_of(name: str, chosen: Config) -> float:
    return chosen.sparsity.layers[int(name.split(".")[1])] if chosen.sparsity.layers else chosen.sparsity.density


def changed(
    chosen: Config,
    share: float,
    step: int,
    weights: Mapping[str, Tensor],
    own: dict[str, Tensor],
    masked: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The masks after a step, by sorting all the weights there are."""
    sparsity = chosen.sparsity
    if sparsity.method == "gradual":
        s, x = 1 - sparsity.density, -math.log(sparsity.density)  # papers.md 7d
        z = 1 / 4 + x / (2 * s) + 1 / (4 * (1 - s))
        first, last = 1 / (4 * z), (1 / 4 + x / (2 * s)) / z
        assert (share > last) == (step == 5)
        if step % 2 == 0 or step == 5:
            density = sparsity.density ** min(1.0, max(0.0, (share - first) / (last - first)))
            sizes = torch.cat([(weights[name] * mask).abs().flatten() for name, mask in own.items()])
            kept = torch.zeros(len(sizes), dtype=torch.bool)
            kept[sizes.argsort(descending=True)[: round(density * len(sizes))]] = True
            parts = kept.split([mask.numel() for mask in own.values()])
            own = {name: part.view_as(own[name]) for name, part in zip(own, parts, strict=True)}
    if sparsity.method == "rigl" and step % 2 == 0 and share < 0.75:
        drop = 0.3 / 2 * (1 + math.cos(math.pi * share / 0.75))
        own = {name: replaced(weights[name], masked[name].grad, mask, drop) for name, mask in own.items()}
    return own


def replaced(weight: Tensor, grad: Tensor | None, mask: Tensor, drop: float) -> Tensor:
    assert grad is not None
    count = int(mask.sum().item() * drop)
    left = mask.clone().flatten()
    left[weight.abs().masked_fill(~mask, math.inf).flatten().argsort()[:count]] = False
    grown = grad.abs().flatten().masked_fill(left, -1).argsort(descending=True)[:count]
    left[grown] = True
    return left.view_as(mask)


WIDTH = 512
SHAPES = [(name, density) for name in ("smupar", "mup") for density in (1.0, 1 / 4, 1 / 32)]


def small(name: str, density: float) -> Config:
    """Initial weights matter alone."""
    words = ("parameterization.base_layers=2", f"parameterization.name={name}", f"sparsity.density={density}")
    shape = (f"model.width={WIDTH}", "model.mlp_width=1024", "model.layers=1", "sparsity.method=static")
    return settings_of("llama", *words, *shape)


# Runs.

RUN = (
    *("parameterization.name=mup", "parameterization.base_layers=2", "sparsity.method=gradual", "sparsity.density=0.3"),
    *("sparsity.every=3", "train.dtype=float64", "train.tokens=2048", "train.validation_samples=0"),
    *("batch.policy=constant", "batch.table=[]", "checkpoint.every=7", "checkpoint.keep=100", "log.tensorboard=false"),
    *('data.train=["corpus"]', "model.vocab_size=384", "data.validation_fraction=0.1"),
)
DENSE = ("sparsity.method=none", "sparsity.density=1.0", "sparsity.every=100")


def run(folder: Path, name: str, *words: str, resume: bool = False) -> None:
    """`megahp train` on the ranks there are."""
    with contextlib.chdir(folder):
        runs.go(settings_of("llama", *RUN, f"log.name={name}", *words), resume)


def in_one_world(
    cells: Sequence[Case], mistakes: Sequence[str], runs: Sequence[tuple[Any, ...]], folder: Path
) -> dict[Any, Any]:
    """All that is tried on so many ranks."""
    found: dict[Any, Any] = {case: train_case(case) for case in cells}
    for mistake in mistakes:
        case, patch = MISTAKES[mistake]
        with patch():
            found[mistake] = train_case(case)
    for name, words, resume in runs:
        run(folder, name, *words, resume=resume)
    found["ties"] = tied_choices(("tp2 sp" if torch.distributed.get_world_size() > 1 else "one", "llama", "static"))
    if torch.distributed.get_world_size() == 1:
        found["plain"] = {method: plainly(("one", "llama", method)) for method in METHODS}
        found["multipliers"] = [Training(small(name, density)).weights() for name, density in SHAPES]
    return found


def reference(case: Case) -> Case:
    return ("one", *case[1:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    write_corpus(folder / "corpus", 0.05)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[Any, Any]:
    alone = dict.fromkeys([*map(reference, CELLS), *(("one", "llama", method) for method in METHODS)])
    runs = [("whole", (), False), ("moved", ("train.steps=7",), False)]
    plain = world.run(1, in_one_world, list(alone), [], runs, folder)[0]
    dense = ("train.start_from=runs/moved/checkpoints/step-00000007", *DENSE, "train.steps=9")
    runs = [("moved", ("parallel.tp=2", FOUR), True), ("dense", dense, False)]
    laid_out = world.run(2, in_one_world, CELLS, list(MISTAKES), runs, folder)[0]
    return plain | laid_out | {"ties": [plain["ties"], laid_out["ties"]]}


@pytest.mark.parametrize("case", CELLS, ids="/".join)
def test_layout_equals_one_rank(found: dict[Any, Any], case: Case) -> None:
    """Losses, gradients, norms, weights and masks."""
    got, wanted = found[case], found[reference(case)]
    assert differences(got, wanted, 1e-10, 1e-10) == []
    hidden = [name for name in got["weights"] if f"mask.{name}" in got["weights"]]
    assert len(hidden) == len([name for name in got["weights"] if name.startswith("mask.")]) >= 8
    for name in hidden:
        mask = got["weights"][f"mask.{name}"]
        assert not got["weights"][name][~mask].any()
        assert got["weights"][name][mask].all() or case[2] == "rigl"  # whose new weights begin at 0


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(found: dict[Any, Any], mistake: str) -> None:
    assert differences(found[mistake], found[reference(MISTAKES[mistake][0])], 1e-10, 1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_loop_trains_the_same(found: dict[Any, Any], method: str) -> None:
    ours, plain = found["one", "llama", method], found["plain"][method]
    assert [step["loss"] for step in ours["measured"]] == pytest.approx(plain["losses"], rel=1e-10)
    for name, weight in plain["weights"].items():
        torch.testing.assert_close(ours["weights"][name], weight, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(ours["weights"][f"mask.{name}"], mask) for name, mask in plain["masks"].items())


@pytest.mark.parametrize("together", [True, False])
def test_of_equal_entries_the_first_are_chosen(found: dict[Any, Any], together: bool) -> None:
    one, other = (dict(tied[together]) for tied in found["ties"])
    least = one.pop("least")
    assert torch.equal(other.pop("least"), least)
    groups = [list(one)] if together else [[name] for name in one]
    for group, bound in zip(groups, least.tolist(), strict=True):
        values, among, chosen = (torch.cat([one[name][part].flatten() for name in group]).numpy() for part in range(3))
        places = np.concatenate([np.arange(one[name][0].numel()) for name in group])
        numbers = np.repeat(np.arange(len(group)), [one[name][0].numel() for name in group])
        order = np.lexsort((numbers, places, -np.abs(values), ~among))
        count = among.sum() - among.sum() // 3
        wanted = np.zeros_like(among)
        wanted[order[:count]] = True
        assert np.array_equal(chosen, wanted) and bound == np.abs(values[order[count - 1]])
        assert (np.abs(values[among]) == bound).sum() > 10  # there was something to choose between
    assert all(torch.equal(one[name][2], other[name][2]) for name in one)


def test_static_masks_are_bernoulli(found: dict[Any, Any]) -> None:
    weights = found["one", "llama", "static"]["weights"]
    for name in [name for name in weights if name.startswith("mask.")]:
        density, mask = (0.5, 0.125)[int(name.split(".")[2])], weights[name]
        assert abs(mask.double().mean() - density) < 4 * math.sqrt(density * (1 - density) / mask.numel())
    first, second = (weights[f"mask.blocks.0.{name}.weight"].flatten() for name in ("mlp.up", "mlp.gate"))
    assert abs((first == second).double().mean() - 0.5) < 0.05  # each matrix has its own


def test_products_are_as_large_at_any_density_under_smupar(found: dict[Any, Any]) -> None:
    """Check 14: rms(W o M x) is constant under SmuPar, and falls as the root of the density under muP."""
    x = torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(1))
    sizes = {}
    for shape, weights in zip(SHAPES, found["multipliers"], strict=True):
        products = [x @ weights[f"blocks.0.{name}.weight"].T for name in ("mlp.up", "mlp.gate", "attention.qkv")]
        sizes[shape] = torch.cat(products, 1).square().mean().sqrt().item()
    for density in (1 / 4, 1 / 32):
        assert sizes["smupar", density] / sizes["smupar", 1.0] == pytest.approx(1, rel=0.05)
        assert sizes["mup", density] / sizes["mup", 1.0] == pytest.approx(density**0.5, rel=0.05)


def test_a_run_goes_on_elsewhere_with_its_masks(found: dict[Any, Any], folder: Path) -> None:
    """Pruning goes on in the middle, on two ranks what one began."""
    whole_run, moved = ([*read_metrics(folder / "runs" / name)] for name in ("whole", "moved"))
    assert [record["loss"] for record in moved] == pytest.approx([record["loss"] for record in whole_run], rel=1e-10)
    assert [record["density"] for record in moved] == [record["density"] for record in whole_run]
    densities = [record["density"] for record in whole_run]
    assert densities[0] == 1 and densities[-1] == pytest.approx(0.3, abs=1e-4)
    assert densities == sorted(densities, reverse=True) and len(set(densities)) > 3
    events = [event for event in read_events(folder / "runs/whole") if event["event"] == "masks"]
    assert [(event["before"], event["now"]) for event in events] == list(pairwise(dict.fromkeys(densities)))
    thresholds = [event["threshold"] for event in events]
    assert thresholds == sorted(thresholds)
    ended, other = tensors(folder, "whole", 16), tensors(folder, "moved", 16)
    assert all(torch.equal(ended[name], other[name]) for name in ended if name.startswith("mask."))
    assert all(not ended[name.replace("mask.", "model.")][~ended[name]].any() for name in ended if "mask." in name)


def test_a_sparse_run_becomes_dense(found: dict[Any, Any], folder: Path) -> None:
    """MediSwift's: what was masked is trained from 0 on."""
    moved, dense = ([*read_metrics(folder / "runs" / name)] for name in ("moved", "dense"))
    assert dense[0]["step"] == 8 and "density" not in dense[0]
    assert dense[0]["loss"] == pytest.approx(moved[7]["loss"], rel=1e-10)
    before, after = tensors(folder, "moved", 7), tensors(folder, "dense", 9)
    masked = [(name.replace("mask.", "model."), ~mask) for name, mask in before.items() if name.startswith("mask.")]
    assert masked and not any(name.startswith("mask.") for name in after)
    assert all(after[name][mask].count_nonzero() > 0.9 * mask.sum() for name, mask in masked if mask.any())


def tensors(folder: Path, name: str, step: int) -> dict[str, Tensor]:
    """All of a checkpoint."""
    return dict(Tensors(checkpoint.path(folder / "runs" / name / "checkpoints", step)))
