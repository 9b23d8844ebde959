"""The tables, against the numbers of papers (CompleteP Table 1) worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megahp.config import ParameterizationConfig
from megahp.scaling.parameterization import Role, Rule, Table, fill_in


def table(name: str, alpha: float = 1.0, width: int = 2048, layers: int = 32, decay: str = "") -> Table:
    rules = ParameterizationConfig(name=name, depth_alpha=alpha, weight_decay=decay)  # base (256, 2)
    return fill_in(rules, width, layers, head_size=64)


def test_completep_at_alpha_1() -> None:
    filled = table("completep")
    assert filled.residual == 1 / 16
    assert filled.logits == 1 / 8
    assert filled.attention == 1 / 64
    assert filled.rules[Role.HIDDEN] == Rule(init_std=8**-0.5, lr=1 / 8, weight_decay=8.0, eps=1 / 128)
    assert filled.rules[Role.HIDDEN].init_std == pytest.approx(0.35355, abs=1e-5)
    assert filled.rules[Role.NORM] == filled.rules[Role.BIAS] == Rule(lr=1.0, weight_decay=0.0, eps=1 / 128)


def test_completep_at_alpha_half() -> None:
    filled = table("completep", 0.5)
    assert filled.residual == 0.25
    assert filled.rules[Role.HIDDEN].lr == 0.03125
    assert filled.rules[Role.HIDDEN].eps == 0.03125
    assert filled.rules[Role.NORM].lr == 0.25


def test_at_alpha_0_there_is_no_depth_factor_as_in_the_papers_figures() -> None:
    """Not the formula's, whose learning rate is 1/m_L there: the authors' alpha = 0 is SP and muP. Above 0 it holds."""
    assert replace(table("completep", 0.0), name="mup") == table("mup")
    filled = table("completep", 0.25)
    assert (filled.residual, filled.rules[Role.HIDDEN].lr, filled.rules[Role.NORM].lr) == (1 / 2, 1 / 64, 1 / 8)


@pytest.mark.parametrize(
    ("name", "decay", "density", "expected"),
    [  # m_N = 8, m_L = 16; at alpha 1/2 the learning rate is 1/32
        *[("mup", "", 1.0, 8.0), ("completep", "", 1.0, 8.0), ("smupar", "", 0.25, 1.0), ("sp", "", 1.0, 1.0)],
        *[(name, "base", 0.25, 1.0) for name in ("mup", "completep", "smupar")],
        *[(name, "width", 0.25, 8.0) for name in ("mup", "completep", "smupar")],
        *[("mup", "timescale", 0.25, 8.0), ("completep", "timescale", 0.25, 32.0), ("smupar", "timescale", 0.25, 2.0)],
    ],
)
def test_hidden_weight_decay(name: str, decay: str, density: float, expected: float) -> None:
    """Papers' text by default: Table 1 of CompleteP has lambda m_N in its muP column too, SmuPar's has lambda alone."""
    filled = table(name, 0.5 if name == "completep" else 1.0, decay=decay)
    rule = filled.rule(Role.HIDDEN, density)
    assert rule.weight_decay == expected
    assert decay != "timescale" or rule.lr * rule.weight_decay == 1


def test_gpt2s_residual_init() -> None:
    rules = ParameterizationConfig(residual_init="gpt2")
    assert (fill_in(rules, 256, 8, 64).branch_init, table("completep").branch_init) == (1 / 4, 1)


def test_a_table_that_an_older_megahp_saved_is_known_again() -> None:
    """Before there were the choices: without their keys, every weight decay with width, density's factors by name."""
    saved = json.loads(json.dumps(table("smupar", decay="width").to_dict()))
    del saved["branch_init"], saved["decay"], saved["scale_density"]
    assert table("smupar", decay="width").is_of(saved) and not table("smupar").is_of(saved)
    assert not replace(table("smupar", decay="width"), branch_init=0.5).is_of(saved)
    saved = json.loads(json.dumps(table("completep").to_dict()))
    del saved["scale_density"]
    assert table("completep").is_of(saved) and not replace(table("completep"), scale_density=True).is_of(saved)


def test_the_router_is_an_output_matrix_without_an_output_multiplier() -> None:
    rule = table("completep", 0.5).rules[Role.ROUTER]
    assert rule == Rule(init_std=1 / 8, lr=1 / 32, weight_decay=8.0, eps=1 / 4)


def test_mup_scales_width_only() -> None:
    filled = table("mup")
    assert filled == fill_in(ParameterizationConfig(name="mup"), 2048, 2, 64)
    assert (filled.residual, filled.logits) == (1.0, 1 / 8)
    assert filled.rules[Role.HIDDEN] == Rule(init_std=8**-0.5, lr=1 / 8, weight_decay=8.0, eps=1 / 8)


@pytest.mark.parametrize(
    ("density", "std", "lr"),
    [(1.0, 0.030653, 0.002025), (0.5, 0.04335, 0.00405), (0.25, 0.061306, 0.0081), (2**-7, 0.3468, 0.2592)],
)
def test_smupar_is_mup_with_density_factors(density: float, std: float, lr: float) -> None:
    """The paper's base hyperparameters at width 2048 (base 256, s 0.0867, e 1.62e-2), worked out in papers.md 3."""
    filled = table("smupar")
    rule = filled.rule(Role.HIDDEN, density)
    assert (0.0867 * rule.init_std, 1.62e-2 * rule.lr) == (pytest.approx(std, rel=1e-4), pytest.approx(lr, rel=1e-4))
    mup = table("mup", decay="base")
    assert filled.rule(Role.HIDDEN) == mup.rules[Role.HIDDEN]
    assert {role for role in Role if filled.rule(role, density) != mup.rules[role]} <= {Role.HIDDEN}
    assert all(table(name).rule(Role.HIDDEN, density) == table(name).rules[Role.HIDDEN] for name in ("mup", "sp"))


@pytest.mark.parametrize(
    ("alpha", "decay", "init_std", "lr", "weight_decay", "eps", "residual"),
    [  # m_N = 8, m_L = 16, density 1/4: worked out by hand from Table 1 of CompleteP and of SmuPar
        (1.0, "", 0.70711, 0.5, 8.0, 1 / 128, 1 / 16),  # 8^-1/2 x 2; 1/8 x 4
        (0.5, "", 0.70711, 0.125, 8.0, 1 / 32, 1 / 4),  # 1/8 x 16^-1/2 x 4
        (1.0, "timescale", 0.70711, 0.5, 2.0, 1 / 128, 1 / 16),
        (0.5, "timescale", 0.70711, 0.125, 8.0, 1 / 32, 1 / 4),
    ],
)
def test_completep_with_density_factors(
    alpha: float, decay: str, init_std: float, lr: float, weight_decay: float, eps: float, residual: float
) -> None:
    """Depth, width and density multiply; what is not a hidden matrix knows nothing of density."""
    rules = ParameterizationConfig(name="completep", depth_alpha=alpha, weight_decay=decay, scale_density=True)
    filled, dense = fill_in(rules, 2048, 32, 64), table("completep", alpha, decay=decay)
    expected = Rule(init_std=init_std, lr=lr, weight_decay=weight_decay, eps=eps, spectral_lr=16 ** (alpha - 1))
    found = filled.rule(Role.HIDDEN, 0.25)
    assert vars(found) == pytest.approx(vars(expected), rel=1e-4) and filled.residual == residual
    assert filled.rules == dense.rules and filled.rule(Role.HIDDEN) == dense.rule(Role.HIDDEN, 0.25)
    assert {role for role in Role if filled.rule(role, 0.25) != dense.rules[role]} == {Role.HIDDEN}


def test_completep_without_depth_is_smupar() -> None:
    rules = ParameterizationConfig(name="completep", depth_alpha=0.0, weight_decay="base", scale_density=True)
    assert replace(fill_in(rules, 2048, 32, 64), name="smupar") == table("smupar")


@pytest.mark.parametrize("octaves", range(4))
def test_as_many_weights_a_neuron_have_the_same_multipliers_under_mup_and_smupar(octaves: int) -> None:
    """Check 15: with width x density constant, those of muP at the base width."""
    rule = table("smupar", width=256 * 2**octaves).rule(Role.HIDDEN, 2.0**-octaves)
    assert (rule.init_std, rule.lr, rule.weight_decay) == (pytest.approx(1, rel=1e-12), 1, 1)


def test_sp_scales_nothing() -> None:
    filled = table("sp")
    assert (filled.residual, filled.logits, filled.attention) == (1.0, 1.0, 1 / 8)
    assert {rule.lr for rule in filled.rules.values()} == {rule.eps for rule in filled.rules.values()} == {1.0}


@pytest.mark.parametrize("name", ["sp", "mup", "completep", "smupar"])
def test_embeddings_and_ends_keep_the_base_values_and_vectors_are_not_decayed(name: str) -> None:
    rules = table(name).rules
    assert rules[Role.EMBEDDING] == rules[Role.UNEMBEDDING] == Rule()
    assert rules[Role.FINAL_NORM] == Rule(weight_decay=0.0)
    assert {role for role, rule in rules.items() if rule.weight_decay == 0} == {Role.NORM, Role.BIAS, Role.FINAL_NORM}


def test_at_the_base_shape_every_table_is_the_same_but_for_attention() -> None:
    at_base = {name: table(name, width=256, layers=2) for name in ("sp", "mup", "completep")}
    assert at_base["mup"].rules == at_base["completep"].rules == at_base["sp"].rules
    assert {filled.residual for filled in at_base.values()} == {filled.logits for filled in at_base.values()} == {1.0}


def test_the_timescale_of_hidden_weights_depends_on_neither_width_nor_depth() -> None:
    """tau = 1 / (eta lambda): the product of the two multipliers is 1 (check 6)."""
    products = {
        rule.lr * rule.weight_decay
        for width in (256, 768, 2048)
        for layers in (2, 10, 64)
        for role in (Role.HIDDEN, Role.ROUTER)
        for rule in [table("completep", width=width, layers=layers).rules[role]]
    }
    assert max(abs(product - 1) for product in products) < 1e-12
