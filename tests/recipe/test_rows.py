"""The rows of a recipe: each with its source, and what other rules would have chosen."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from recipe.test_recipe import LAWS, of, value

from megahp.config import config_to_dict, resolve
from megahp.recipe import rows as recipe_rows
from megahp.recipe import text as recipe_text
from megahp.recipe.loss_laws import LOSS_LAWS
from megahp.recipe.recipe import PROXY, Laws, make_recipe
from megahp.recipe.sizing import Given


def test_every_row_has_source_and_confidence_and_fits() -> None:
    for given in (
        {"params": 1e9, "density": 0.5},
        {"params": 1e7, "gpus": 8, "peak_flops": 1e15},
        {"target_loss": 2.4},
    ):
        for rule in ("power-lines", "step-law", "deepseek"):
            found = of(Laws(LOSS_LAWS["hoffmann"], rule=rule), **given)
            rows = recipe_rows.rows(found)
            assert len(rows) > 30 and all(row.formula and row.source and row.confidence for row in rows)
            text = recipe_text.table(rows, recipe_rows.notes(found))
            text += "\n" + recipe_text.comparison(recipe_rows.choices(found))
            assert max(map(len, text.splitlines())) <= 120
            assert found.run == resolve.from_dict(json.loads(json.dumps(config_to_dict(found.run))), "again")


def test_outside_a_law_s_range_is_said() -> None:
    inside, outside = of(params=6.1e8, tpp=30), of(params=1e8, tokens=3e8)
    assert recipe_rows.notes(inside) == []
    told = "\n".join(recipe_rows.notes(outside))
    for words in ("loss: D = 3e+08", "tau_opt: TPP = 2.9", "B_opt: D", "B_crit: D_min"):
        assert words in told
    assert (
        "llama-3-8b is swiglu rmsnorm rope"
        in recipe_rows.notes(of(preset="llama-3-8b", width=4096, layers=32, tpp=20))[-1]
    )


def test_other_rules_give_rate_and_batch_and_leave_the_rest_open() -> None:
    found = of(Laws(LAWS.loss, rule="step-law"), width=2048, layers=16, tokens=1e11)
    n = found.outside_embeddings
    assert found.run.parameterization.name == "sp" and found.run.batch.policy == "constant"
    assert found.lr == found.run.optimizer.lr == pytest.approx(1.79 * n**-0.713 * 1e11**0.307)
    assert found.run.batch.global_batch * 2048 == pytest.approx(1_107_715, rel=1 / 8)
    assert found.run.optimizer.weight_decay == 0.1 and value(found, "weight decay") == 0.1
    names = [choice.rule for choice in recipe_rows.choices(found)]
    assert names == ["megahp, step-law", "deepseek", "nanochat-like", "olmo-ladder"]


def test_a_density_of_1_is_a_dense_plan() -> None:
    """Check 29: L(N_avg) is Chinchilla's L for a constant N."""
    dense, same = recipe_rows.rows(of(params=1e9)), recipe_rows.rows(of(params=1e9, density=1.0))
    assert same == dense


def test_a_base_with_a_pipeline_tells_its_bubble() -> None:
    """Eight ranks, one of data parallelism, and a batch of so many microbatches of one sequence."""
    piped = replace(PROXY, tree={**PROXY.tree, "parallel": {"pp": 8}})
    found = make_recipe(Given(params=1e9, tokens=2e10, batch=64, gpus=8, peak_flops=1e15), piped, LAWS)
    microbatches = 64 // found.run.batch.micro_batch
    assert value(found, "pipeline bubble") == f"{7 / microbatches:.1%}"
    assert "pipeline bubble" not in [row.name for row in recipe_rows.rows(of(params=1e9))]


def test_pruning_has_the_loss_of_its_average_density() -> None:
    dense, pruned = of(params=1e9), of(params=1e9, density=0.5)
    average = dense.parameters - dense.outside_embeddings * (1 - 0.6929)
    assert value(pruned, "N_avg") == pytest.approx(average, rel=1e-3)
    loss = float(str(value(pruned, "loss, nats per token")).split()[0])
    assert loss == pytest.approx(LAWS.loss(average, pruned.tokens), abs=1e-3)
    assert (pruned.run.sparsity.method, pruned.run.sparsity.density) == ("gradual", 0.5)
    assert dense.run.sparsity.method == "none"
