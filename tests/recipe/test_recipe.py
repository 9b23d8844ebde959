"""Recipes: the papers' own runs, every way to say a size, every mistake, and a run file that trains."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megahp.errors import UserError
from megahp.recipe import rows as recipe_rows
from megahp.recipe.loss_laws import LOSS_LAWS
from megahp.recipe.recipe import PROXY, Base, Laws, Recipe, make_recipe, steps_of
from megahp.recipe.sizing import Given
from megahp.scaling import power_laws
from megahp.scaling.batch import BatchScheduler, Progress, noise_forecast
from megahp.scaling.parameterization import Role

LAWS = Laws(LOSS_LAWS["besiroglu"])


def of(laws: Laws = LAWS, preset: str = "", **given: float) -> Recipe:
    return make_recipe(Given(**given), replace(PROXY, preset=preset), laws)


def value(found: Recipe, name: str) -> float | str:
    return next(row.value for row in recipe_rows.rows(found) if row.name == name)


def test_with_experts_the_laws_take_active_parameters() -> None:
    """So the plan of a model with experts is that of the dense model which a token meets, but for the router."""
    experts = {"experts": 8, "experts_per_token": 2, "expert_width": 256, "shared_experts": 1, "dense_layers": 1}
    model = {"layers": 4, "width": 256, "heads": 4, "mlp_width": 768, "vocab_size": 50257}
    base = {"optimizer": PROXY.tree["optimizer"], "data": {"sequence_length": 2048}}
    found = {}
    for name, more in (("dense", {}), ("experts", experts)):
        found[name] = make_recipe(Given(params=3e8), Base(name, {"model": model | more, **base}, "test", "test"), LAWS)
    dense, routed = found["dense"], found["experts"]
    assert (dense.run.model.width, dense.run.model.layers) == (routed.run.model.width, routed.run.model.layers)
    shape, width = routed.run.model, routed.run.model.width
    assert (shape.experts, shape.expert_width, shape.mlp_width) == (8, width, 3 * width)
    router = 8 * width * (shape.layers - 1)
    assert routed.parameters - router == dense.parameters
    idle = 6 * 3 * width * shape.expert_width * (shape.layers - 1)
    assert value(routed, "all parameters") == routed.parameters + idle
    assert routed.tokens == pytest.approx(20 * routed.parameters)
    assert routed.weight_decay == pytest.approx(dense.weight_decay, rel=0.05)
    assert any("active parameters" in note for note in recipe_rows.notes(routed))
    assert not any("active" in note for note in recipe_rows.notes(dense))
    with pytest.raises(UserError, match="no block with experts"):
        make_recipe(Given(width=512, layers=1), routed.base, LAWS)


# Parameters, tokens and, at this batch, weight decay of hidden matrices and D_min.
PAPERS = [
    ("power-lines-111m", (768, 10), 111e6, 2.19e9, 192, None, None),
    ("power-lines-610m", (2048, 10), 610e6, 12.1e9, 504, 0.18844, 9.5902e9),
    ("power-lines-610m", (2048, 10), 610e6, 12.1e9, 2016, 0.75374, 5.0162e9),
    ("power-lines-610m", (2048, 10), 610e6, 48.5e9, 504, 0.09761, 4.2882e10),
    ("power-lines-3.3b", (2048, 64), 3.3e9, 66.5e9, 1024, None, None),
]


@pytest.mark.parametrize(("preset", "shape", "size", "tokens", "batch", "decay", "least"), PAPERS)
def test_power_lines_own_runs(
    preset: str,
    shape: tuple[int, int],
    size: float,
    tokens: float,
    batch: int,
    decay: float | None,
    least: float | None,
) -> None:
    """Checks 1 to 6: a plan of their shape, tokens and batch has their rate, decay, timescale and batches."""
    found = of(preset=preset, width=shape[0], layers=shape[1], tokens=tokens, batch=batch)
    assert found.parameters == pytest.approx(size, rel=0.02)
    assert found.lr == pytest.approx(1.62e-2 * 256 / shape[0])
    tpp, batch_tokens = tokens / found.parameters, batch * 2048
    tau = power_laws.timescale(found.lr, found.weight_decay, batch_tokens, tokens)
    assert tau == pytest.approx(1.084 * tpp**-0.527) == value(found, "tau_opt")
    if decay and least:
        assert found.weight_decay == pytest.approx(decay, rel=5e-3)  # theirs is of 20 or 80 TPP, not of 19.9
        assert found.least_tokens == pytest.approx(least, rel=1e-3)
    assert value(found, "B_opt, sequences") == pytest.approx(0.0306 * tokens**0.383)
    assert value(found, "B_crit, sequences") == pytest.approx(0.0471 * found.least_tokens**0.462)
    rule = found.table.rules[Role.HIDDEN]
    assert rule.lr * rule.weight_decay == pytest.approx(1, abs=1e-12)  # so eta lambda is the base's at any size
    assert found.run.optimizer.weight_decay * shape[0] / 256 == pytest.approx(found.weight_decay)
    assert value(found, "init std, hidden matrices") == pytest.approx(0.0867 / math.sqrt(shape[0] / 256))


def test_at_its_base_the_plan_is_the_proxy() -> None:
    """Check 12: no multiplier, so CompleteP there is muP, under which it was tuned."""
    found = of(width=256, layers=24, tokens=800e6, batch=256)
    rule = found.table.rules[Role.HIDDEN]
    assert (rule.init_std, rule.lr, rule.weight_decay, rule.eps, found.table.residual) == (1, 1, 1, 1, 1)
    assert found.parameters == pytest.approx(39e6, rel=0.2) and found.table.attention == 1 / 64


@pytest.mark.parametrize(
    "given",
    [
        {"params": 5e7},
        {"params": 6e8, "gpus": 24, "peak_flops": 1e15},
        {"params": 2e7, "tpp": 300},
        {"params": 1e7, "batch": 24},
    ],
)
def test_steps_are_those_the_batch_plan_takes(given: dict[str, float]) -> None:
    found = of(**given)
    batches, progress = BatchScheduler(found.run, found.ranks), Progress()
    forecast = noise_forecast(found.run, progress, None)
    while step := batches.step(progress):
        progress = progress.after(step)
        batches.update(progress, forecast(progress.tokens))
    assert steps_of(found.run, found.ranks) == (found.steps, found.last_batch) == (progress.step, batches.batch)
    assert found.run.batch.global_batch % (found.ranks * found.run.batch.micro_batch) == 0


def test_the_batch_begins_at_the_best_constant_one_and_saves_what_the_decay_allows() -> None:
    """Decay to zero after a warm-up of 10 %: 0.1 + 0.9 / 2 of the steps where nothing but stability binds; the noise
    scale of the forecast leaves a little less."""
    found = of(params=6e8)
    optimal = power_laws.OPTIMAL_BATCH(found.tokens) / 2048
    assert found.run.batch.global_batch == pytest.approx(optimal, abs=found.run.batch.micro_batch / 2)
    assert 0.55 < found.steps / (found.tokens / 2048 / optimal) < 0.58
    bound = found.run.batch.noise_share * power_laws.critical_batch_along(found.tokens) / 2048
    assert 4 * optimal < found.last_batch <= bound


def test_calibration_takes_half_a_percent_of_the_time_at_most() -> None:
    """A microbatch of so many that a rank has in a step; in a pipeline's schedule a whole step."""
    found = of(params=6e8).run.batch
    assert 1 < found.calibrate_every == math.ceil(200 * found.micro_batch / found.global_batch) < 200
    tree = {**PROXY.tree, "parallel": {"pp": 2}}
    piped = make_recipe(Given(params=6e8, gpus=2, peak_flops=1e15), replace(PROXY, tree=tree), LAWS)
    assert piped.run.batch.calibrate_every == 200


@pytest.mark.parametrize(
    ("base", "why"),
    [
        ({"optimizer": {"name": "muon"}}, "optimizer.name = 'muon'"),
        ({"train": {"noise_scale": False}}, "train.noise_scale = false"),
    ],
)
def test_a_base_that_cannot_measure_keeps_its_batch(base: dict[str, dict[str, object]], why: str) -> None:
    tree = {name: {**PROXY.tree.get(name, {}), **base.get(name, {})} for name in {**PROXY.tree, **base}}
    found = make_recipe(Given(params=5e7), replace(PROXY, tree=tree), LAWS)
    assert found.run.batch.policy == "constant" and found.last_batch == found.run.batch.global_batch
    assert found.run.batch.global_batch * 2048 == pytest.approx(power_laws.OPTIMAL_BATCH(found.tokens), rel=0.1)
    assert any(why in note for note in recipe_rows.notes(found))
