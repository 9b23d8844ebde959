"""Mixture of experts against a loop over tokens written from the papers, in float64, gradients included; its load, its
balance and its per-example norms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from distributed import world
from distributed.training import MadeUpData, Training, settings_of, synthetic_batch, whole
from torch import Tensor

from megahp.model import moe
from megahp.model.moe import Router
from megahp.parallel.layout import Layout
from megahp.parallel.mesh import make_mesh
from megahp.parallel.parameters import storage
from megahp.train.validation import validate

F64 = "train.dtype=float64"
# family -> settings; its routing stands in `routed` once more, as its paper or its authors' code has it
FAMILIES = {
    "mixtral": ("moe-loss", "model.router_normalize=true", "model.experts=8"),
    "olmoe": ("moe-loss", "model.experts_per_token=3", "model.activation=gelu"),
    "deepseek-v3": ("moe", "model.router_scale=2.5", "model.experts_per_token=3", "model.balance_loss=0.2"),
}


def routed(family: str, logits: Tensor, bias: Tensor) -> dict[int, Tensor]:
    """One token's experts and their weights, from its logits [experts]."""
    exponentials = [torch.exp(logit) for logit in logits]
    if family == "deepseek-v3":
        scores = [1 / (1 + torch.exp(-logit)) for logit in logits]
        best = sorted(range(len(logits)), key=lambda i: -(scores[i] + bias[i]).item())[:3]
        return {i: 2.5 * scores[i] / sum(scores[j] for j in best) for i in best}
    if family == "mixtral":  # a softmax over the two chosen alone
        best = sorted(range(len(logits)), key=lambda i: -logits[i].item())[:2]
        return {i: exponentials[i] / sum(exponentials[j] for j in best) for i in best}
    best = sorted(range(len(logits)), key=lambda i: -logits[i].item())[:3]
    return {i: exponentials[i] / sum(exponentials) for i in best}


def plain_mlp(x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return down @ torch.nn.functional.gelu(up @ x, approximate="tanh")
    return down @ (gate @ x * torch.sigmoid(gate @ x) * (up @ x))


def plain_moe(family: str, x: Tensor, w: dict[str, Tensor], coefficient: float) -> tuple[Tensor, Tensor]:
    """The layer's output for x [b, s, width], token by token, and the sum of the sequences' balance losses, each
    multiplied by its length and by the coefficient."""
    experts, rows, balance = len(w["router.weight"]), [], torch.zeros(())
    for sequence in x:
        counts, scores, k = torch.zeros(experts), torch.zeros(experts), 0
        for token in sequence:
            logits = w["router.weight"] @ token
            chosen = routed(family, logits, w["router.bias"])
            row = torch.zeros_like(token)
            for i, weight in chosen.items():
                gate = w["experts.gate"][i] if "experts.gate" in w else None
                row = row + weight * plain_mlp(token, w["experts.up"][i], w["experts.down"][i], gate)
                counts[i] += 1
            if "shared.up.weight" in w:
                row = row + plain_mlp(token, *(w[f"shared.{name}.weight"] for name in ("up", "down", "gate")))
            rows.append(row)
            score = torch.sigmoid(logits) if family == "deepseek-v3" else torch.exp(logits)
            scores, k = scores + score / score.sum(), len(chosen)
        fractions = counts * experts / (k * len(sequence))
        balance = balance + coefficient * len(sequence) * (fractions * scores / len(sequence)).sum()
    return torch.stack(rows).view_as(x), balance


def both_layers(family: str, favoured: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """What ours and the loop say of one layer: outputs and every gradient. Favoured: two experts get all tokens."""
    model, *words = FAMILIES[family]
    training = Training(settings_of(model, F64, *words))
    layer = training.engine.stages[0].blocks["1"].mlp
    generator = torch.Generator().manual_seed(3)
    if family == "deepseek-v3":
        layer.router.bias.copy_(torch.randn(layer.router.bias.shape, generator=generator) / 10)
    unit = 0.37
    x = torch.randn(3, 7, 32, generator=generator, dtype=torch.float64)
    if favoured:  # the router sees one direction, in which all tokens lie
        storage(layer.router.weight).copy_(torch.linspace(-0.1, 0.1, len(layer.router.bias))[:, None].expand(-1, 32))
        x = x.abs()
    torch.set_default_dtype(torch.float64)
    w = {name: whole(p).requires_grad_() for name, p in layer.named_parameters() if "probe" not in name}
    w["router.bias"] = layer.router.bias.double()
    theirs = x.clone().requires_grad_()
    plain, balance = plain_moe(family, theirs, w, layer.router.coefficient)
    torch.set_default_dtype(torch.float32)
    ours = x.clone().requires_grad_()
    y = layer(ours, torch.tensor(unit, dtype=torch.float64))
    cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    (y * cotangent).sum().backward()
    ((plain * cotangent).sum() + unit * balance).backward()
    found = {"output": (y.detach(), plain.detach()), "x": (ours.grad, theirs.grad)}
    for name, p in layer.named_parameters():
        if "probe" not in name:
            found[name] = whole(p.grad), w[name].grad
    counted = layer.router.probe.grad
    found["balance loss"] = counted[-1] * layer.router.coefficient * 7, balance.detach()
    found["unused"] = (counted[:-1] == 0).sum(), counted[:-1].sum()
    return found


def bias_of_no_weight() -> dict[str, Any]:
    """Check 34: what the bias does to the selection and to the weights, and what the load does to the bias."""
    torch.manual_seed(0)
    chosen = settings_of("moe", "model.experts=4", "model.balance_rate=0.001")
    router = Router(chosen.model, make_mesh(Layout(), torch.device("cpu")).tensor_axis(False))
    torch.nn.init.normal_(router.weight)
    x = torch.randn(2, 9, 32)
    before = router(x, torch.zeros(()))
    router.bias.fill_(0.25)  # the same for all moves nothing
    same = router(x, torch.zeros(()))
    router.bias.zero_()
    seen = []
    for load in ([9.0, 1.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0], [0.0, 5.0, 5.0, 2.0]):
        router.rebalance(torch.tensor(load))
        seen.append(router.bias.tolist())
    router.bias.copy_(torch.tensor([-1.0, 0.0, 0.0, 0.0]))
    return {"before": before, "same": same, "biases": seen, "without the first": router(x, torch.zeros(()))}


def counts() -> dict[str, Any]:
    """What the routers counted in one step, computed plainly and again, and in a validation."""
    found = {}
    for words in ((), ("compute.recompute=full",), ("compute.recompute=selective",)):
        training = Training(settings_of("moe-loss", *words))
        validate(training, MadeUpData(training.config))
        found[" ".join(words)] = training.step()["measured"]["load"]
    return found


def per_example(model: str) -> dict[str, tuple[float, float]]:
    """Norm -> mean ||g_b||^2 as measured, in two microbatches and with a loss scale, and by a loop over examples."""
    training = Training(settings_of(model, F64))
    engine = training.engine
    for router in engine.routers.values():
        router.bias.copy_(torch.linspace(-0.3, 0.3, len(router.bias)))
    ids = np.arange(6)
    halves = [synthetic_batch(ids[:3], training.config), synthetic_batch(ids[3:], training.config)]
    loss = engine.forward_backward(halves, 2, 6 * 16, scale=1024.0)
    measured = engine.measure(loss, engine.gradients(), 6, scale=1024.0).grad_sq_example
    looped = dict.fromkeys(measured, 0.0)
    for i in ids:
        engine.zero()
        engine.forward_backward([synthetic_batch(ids[i : i + 1], training.config)], 1, 16)
        for name in looped:
            looped[name] += whole(engine.weights[f"{name}.weight"].grad).square().sum().item() / len(ids)
    return {name: (measured[name], looped[name]) for name in measured}


def balancing() -> dict[str, Tensor]:
    """1,200 updates of the bias over tokens whose scores stay: experts of each token, loads, biases before each."""
    words = ("model.balance_rate=0.001", "model.experts=8", "model.experts_per_token=2")
    axis = make_mesh(Layout(), torch.device("cpu")).tensor_axis(False)
    model = settings_of("moe", *words).model
    router = Router(model, axis).double()
    generator = torch.Generator().manual_seed(1)
    router.weight.data = torch.randn(8, model.width, generator=generator, dtype=torch.float64)
    x = torch.randn(4, 128, model.width, generator=generator, dtype=torch.float64) / model.width**0.5
    x += torch.linalg.pinv(router.weight.data) @ torch.linspace(1, -1, 8, dtype=torch.float64)  # some are favourites
    found: dict[str, list[Tensor]] = {"chosen": [], "load": [], "bias": []}
    with torch.no_grad():
        for _ in range(1200):
            _, chosen, load = router(x, torch.tensor(0.0))
            for key, value in (("chosen", chosen.flatten(0, 1)), ("load", load), ("bias", router.bias.clone())):
                found[key].append(value)
            router.rebalance(load.double())
        scores = torch.nn.functional.linear(x, router.weight).sigmoid().flatten(0, 1)
    return {key: torch.stack(values) for key, values in found.items()} | {"scores": scores}


def alone() -> dict[str, Any]:
    return {
        "balancing": balancing(),
        "layers": {
            (family, favoured): both_layers(family, favoured) for family in FAMILIES for favoured in (False, True)
        },
        "bias": bias_of_no_weight(),
        "counts": counts(),
        "norms": {model: per_example(model) for model in ("moe", "moe-loss")},
        "starved": starved(),
        "split": sequence_in_parts(Layout()),
    }


def starved(*words: str) -> dict[str, Any]:
    """A step in which the last two experts, that is one rank of two, get every token."""
    training = Training(settings_of("moe", F64, *words))
    (router,) = training.engine.routers.values()
    router.bias[-2:] = 5.0
    outcome = training.step()
    return {"load": outcome["measured"]["load"], "grads": outcome["grads"], "bias": router.bias.clone()}


def sequence_in_parts(layout: Layout) -> dict[str, Tensor]:
    """A router's outcome on sequences split over cp: its own part of weights, and sums of gradients and counts."""
    axis = make_mesh(layout, torch.device("cpu")).tensor_axis(False)
    router = Router(settings_of("moe-loss").model, axis).double()
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights, _, _ = router(x.chunk(axis.context.size, 1)[axis.context.rank], torch.tensor(0.5))
    weights.square().sum().backward()
    torch.distributed.all_reduce(router.weight.grad)
    torch.distributed.all_reduce(router.probe.grad)
    return {"weight": router.weight.grad, "probe": router.probe.grad}


def together() -> dict[str, Any]:
    return {"starved": starved("parallel.ep=2", "batch.micro_batch=4"), "split": sequence_in_parts(Layout(cp=2))}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return world.run(1, alone)[0]


@pytest.fixture(scope="module")
def on_two() -> dict[str, Any]:
    return world.run(2, together)[0]


@pytest.mark.parametrize("favoured", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_loop_over_tokens(found: dict[str, Any], family: str, favoured: bool) -> None:
    layer = found["layers"][family, favoured]
    unused, choices = layer.pop("unused")
    assert choices == 21 * (2 if family == "mixtral" else 3)
    assert (unused > 0) == favoured
    for name, (ours, plain) in layer.items():
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
        assert plain.abs().max() > 0, name


def test_the_bias_selects_and_weighs_nothing(found: dict[str, Any]) -> None:
    weights, chosen, load = found["bias"]["before"]
    same_weights, same_chosen, _ = found["bias"]["same"]
    assert torch.equal(weights, same_weights) and torch.equal(chosen, same_chosen)
    other_weights, other_chosen, other_load = found["bias"]["without the first"]
    assert load[0] > 0 and other_load[0] == 0 and other_load.sum() == load.sum()
    kept = (chosen != 0).all(-1)
    assert kept.any() and torch.equal(other_weights[kept], weights[kept])


def test_the_load_moves_the_bias_by_its_rate(found: dict[str, Any]) -> None:
    u = torch.tensor(0.001).item()
    first, second, third = found["bias"]["biases"]
    assert first == [-u, u, u, u]
    assert second == first  # balanced
    assert third == pytest.approx([0.0, 0.0, 0.0, 2 * u], abs=1e-9)


def test_the_bias_balances_as_its_theory_says(found: dict[str, Any]) -> None:
    """With constant scores: the Lagrangian sum_t max_k (s + b) - mean load sum b falls at every update until loads are
    balanced to a few tokens; a token leaves an expert only for one that was less loaded beside the mean; and loads stay
    balanced. (The statements of the theory of auxiliary-loss-free balancing's abstract, 2025)"""
    chosen, load, bias, scores = (found["balancing"][key] for key in ("chosen", "load", "bias", "scores"))
    mean = len(scores) * 2 / 8
    lagrangian = (scores + bias[:, None]).topk(2).values.sum((1, 2)) - mean * bias.sum(-1)
    imbalance = (load - mean).abs().amax(-1) / mean
    balanced = int((imbalance < 0.05).nonzero()[0])
    assert imbalance[0] > 1 and 100 < balanced < 600
    assert (lagrangian[1 : balanced + 1] < lagrangian[:balanced]).all()
    assert imbalance[balanced:].max() < 0.1
    is_chosen = torch.zeros(len(chosen), len(scores), 8, dtype=torch.bool).scatter_(2, chosen, True)
    left, entered = is_chosen[:-1] & ~is_chosen[1:], ~is_chosen[:-1] & is_chosen[1:]
    direction = (mean - load[:-1]).sign()[:, None].expand_as(left)
    moved = left.any(-1)
    assert moved.any(-1)[:balanced].float().mean() > 0.9
    highest_left = direction.where(left, -2).amax(-1)
    assert (direction.where(entered, 2).amin(-1) > highest_left)[moved].all()


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 16), (torch.bfloat16, 16), (torch.bfloat16, 12)])
def test_one_product_of_all_experts_equals_one_after_the_other(dtype: torch.dtype, width: int) -> None:
    """Rows of 12 bf16 are not whole 16 bytes, which torch's product refuses."""
    generator = torch.Generator().manual_seed(1)
    x, matrices = (torch.randn(*size, generator=generator).to(dtype) for size in ((7, width), (4, 8, width)))
    counts = [3, 0, 4, 0]
    assert moe.has_grouped_product(x, matrices) == (dtype == torch.bfloat16 and width == 16)
    found = []
    for multiply in (
        lambda x, w: moe.grouped_linear(x, w, counts, torch.tensor(counts).cumsum(0, dtype=torch.int32)),
        lambda x, w: torch.cat([part @ each.T for part, each in zip(x.split(counts), w, strict=True)]),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, matrices)]
        y = multiply(*leaves)
        y.square().sum().backward()
        found.append((y.detach(), *(leaf.grad for leaf in leaves)))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def test_what_is_computed_again_or_evaluated_is_not_counted(found: dict[str, Any]) -> None:
    plain, *others = found["counts"].values()
    for loads in (plain, *others):
        assert all(load.sum() == 8 * 16 * 2 for load in loads.values())  # samples x tokens x experts a token
        assert all(torch.equal(loads[name], plain[name]) for name in plain)


@pytest.mark.parametrize("model", ["moe", "moe-loss"])
def test_an_example_s_norm_depends_on_no_other_example(found: dict[str, Any], model: str) -> None:
    for name, (measured, looped) in found["norms"][model].items():
        assert measured == pytest.approx(looped, rel=1e-9), name


def test_ranks_and_experts_without_tokens(found: dict[str, Any], on_two: dict[str, Any]) -> None:
    one, two = found["starved"], on_two["starved"]
    (load,) = one["load"].values()
    assert load.tolist() == [0.0] * 6 + [128.0] * 2
    assert torch.equal(one["bias"], two["bias"])
    for name, grad in one["grads"].items():
        torch.testing.assert_close(two["grads"][name], grad, rtol=1e-10, atol=1e-14)
        if ".experts." in name:
            assert grad[6:].any() and not grad[:6].any()


def test_balance_of_a_sequence_that_lies_on_several_ranks(found: dict[str, Any], on_two: dict[str, Any]) -> None:
    for name, wanted in found["split"].items():
        torch.testing.assert_close(on_two["split"][name], wanted, rtol=1e-12, atol=0.0)
