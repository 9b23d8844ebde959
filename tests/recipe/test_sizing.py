"""Sizes, budgets and losses into parameters and tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from recipe.test_recipe import LAWS, of, value

from megahp.config import resolve
from megahp.errors import UserError
from megahp.recipe.loss_laws import LOSS_LAWS
from megahp.recipe.recipe import PROXY, Laws, make_recipe
from megahp.recipe.sizing import Given


def test_each_sufficient_subset_gives_the_same_run() -> None:
    first = of(params=3e8, tokens=9e9)
    n, d, loss = first.parameters, first.tokens, LAWS.loss(first.parameters, first.tokens)
    ways: list[dict[str, float]] = [
        {"params": n, "tpp": d / n},
        {"params": n, "flops": 6 * n * d},
        {"params": n, "target_loss": loss},
        {"width": first.run.model.width, "layers": first.run.model.layers, "tokens": d},
        {"tokens": d, "tpp": d / n},
        {"tokens": d, "flops": 6 * n * d},
        {"tokens": d, "target_loss": loss},
        {"tpp": d / n, "flops": 6 * n * d},
        {"tpp": d / n, "target_loss": loss},
    ]
    for way in ways:
        found = of(**way)
        assert found.run.model == first.run.model, way
        assert found.tokens == pytest.approx(d, rel=1e-6), way
    assert of(params=n).tokens == pytest.approx(20 * n)


def test_compute_and_loss_alone_are_spent_as_the_law_has_it() -> None:
    for law in (LOSS_LAWS["besiroglu"], LOSS_LAWS["hoffmann-rounded"]):
        flops = of(Laws(law), flops=1e21)
        assert 6 * flops.parameters * flops.tokens == pytest.approx(1e21, rel=1e-6)
        assert flops.parameters == pytest.approx(law.optimum(1e21)[0], rel=0.05)
        loss = law(flops.parameters, flops.tokens)
        target = of(Laws(law), target_loss=loss)
        assert law(target.parameters, target.tokens) == pytest.approx(loss, rel=1e-6)
        assert 6 * target.parameters * target.tokens == pytest.approx(1e21, rel=0.02)
    days = of(days=10, gpus=64, peak_flops=989e12, mfu=0.5)
    assert value(days, "days") == pytest.approx(10, rel=1e-6)
    assert value(days, "FLOPs, exact") == pytest.approx(10 * 86400 * 64 * 989e12 * 0.5, rel=1e-6)


@pytest.mark.parametrize("wanted", [5e7, 3e8, 1.5e9, 7e10])
def test_shapes_have_the_size_and_completep_s_ratio(wanted: float) -> None:
    found = of(params=wanted)
    model = found.run.model
    assert found.parameters == pytest.approx(wanted, rel=0.05)
    assert model.width / model.layers == pytest.approx({5e7: 40, 3e8: 50, 1.5e9: 62}.get(wanted, 100), rel=0.3)
    assert model.width == model.heads * 64 and (model.width % 128 == 0 or model.width < 512)
    assert model.mlp_width == resolve.mlp_width("swiglu", model.width)
    assert of(params=wanted, layers=20).run.model.layers == 20
    assert wanted > 1e9 or of(params=wanted, width=448).run.model.width == 448


def test_a_preset_s_proportions_are_kept_at_another_size() -> None:
    llama = replace(PROXY, overrides={"model": {"width": 512, "heads": 8, "kv_heads": 2, "mlp_width": 1792}})
    model = make_recipe(Given(params=3e8), llama, LAWS).run.model
    assert model.heads == 4 * model.kv_heads and model.mlp_width == pytest.approx(3.5 * model.width, abs=32)


def test_gpus_that_the_layout_cannot_use_are_refused() -> None:
    piped = replace(PROXY, tree={**PROXY.tree, "parallel": {"pp": 4}})
    with pytest.raises(UserError, match="--gpus 6 is not a multiple of tp x pp x cp = 4 .* 4, 8"):
        make_recipe(Given(params=1e9, tokens=2e10, gpus=6, peak_flops=1e15), piped, LAWS)
