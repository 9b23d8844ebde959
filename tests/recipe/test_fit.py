"""Laws fitted to synthetic runs of known laws, and `megahp fit` on tables and run directories (check 31)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from megahp.errors import UserError
from megahp.recipe import fit
from megahp.recipe.fit import FinishedRun, fit_critical_batch, fit_loss, fit_optimal_batch, fit_timescale
from megahp.scaling.laws import LossLaw, PowerLaw
from megahp.scaling.power_laws import CRITICAL_BATCH, OPTIMAL_BATCH, TAU, least_tokens

HOFFMANN = LossLaw(1.69, 406.4, 410.7, 0.34, 0.28, "", "")  # rounded, as published
BESIROGLU = LossLaw(1.8169, 482.01, 2085.43, 0.3478, 0.3658, "", "")
TIED = LossLaw(1.7, 500.0, 900.0, 0.35, 0.35, "", "")
SIZES, RATIOS = np.geomspace(5e7, 1.6e10, 8).tolist(), (2, 5, 10, 20, 40, 80, 160)
CHINCHILLA = 5.76e23


def noisy(runs: Sequence[FinishedRun], noise: float, seed: int = 0) -> list[FinishedRun]:
    """The runs with so much noise in ln loss."""
    factors = np.exp(noise * np.random.default_rng(seed).standard_normal(len(runs)))
    return [replace(run, loss=run.loss * factor) for run, factor in zip(runs, factors.tolist(), strict=True)]


def grid(law: LossLaw, sizes: Sequence[float] = SIZES, ratios: Sequence[float] = RATIOS) -> list[FinishedRun]:
    return [FinishedRun("", n, n * ratio, law(n, n * ratio)) for n in sizes for ratio in ratios]


def sweeps(vary: str, sizes: Sequence[float] = (1e8, 3e8, 1e9), ratios: Sequence[float] = RATIOS) -> list[FinishedRun]:
    """Five runs an octave apart, not centred, in weight decay or batch around the optimum at each (N, D)."""
    runs = []
    for n, ratio, octaves in [(n, ratio, octaves) for n in sizes for ratio in ratios for octaves in range(-2, 3)]:
        tokens, off = n * ratio, 1.3 * 2.0**octaves
        batch = OPTIMAL_BATCH(tokens) * (off if vary == "batch" else 1)
        decay = batch / (1e-3 * tokens * TAU(ratio) * (off if vary == "timescale" else 1))
        runs.append(FinishedRun("", n, tokens, BESIROGLU(n, tokens) + 0.02 * math.log(off) ** 2, batch, 1e-3, decay))
    return runs


def batches(sizes: Sequence[float] = (1e8, 3e8, 1e9)) -> list[FinishedRun]:
    """Runs whose loss is that of D_min tokens, at eight batches and six token counts."""
    plans = [
        (n, n * ratio, 2.0**power) for n in sizes for ratio in (10, 20, 40, 80, 160, 320) for power in range(16, 24)
    ]
    return [FinishedRun("", n, d, BESIROGLU(n, least_tokens(d, batch)), batch) for n, d, batch in plans]


@pytest.mark.parametrize(("law", "ratio"), [(HOFFMANN, 92.6), (BESIROGLU, 18.4)])
@pytest.mark.parametrize("noise", [0, 1e-4])
def test_published_constants_come_back(law: LossLaw, ratio: float, noise: float) -> None:
    """Check 31: the constants within 2 %, and what is read from them, hundreds of times beyond the runs too."""
    found = fit_loss(noisy(grid(law), noise)).law
    assert found.constants == pytest.approx(law.constants, rel=0.02 if noise else 1e-6)
    for run in ((70e9, 1.4e12), (1e9, 20e9), (610e6, 12.1e9)):
        assert found(*run) == pytest.approx(law(*run), rel=1e-3)
    parameters, tokens = found.optimum(CHINCHILLA)
    assert tokens / parameters == pytest.approx(ratio, rel=0.02)
    assert (found.parameters, found.tokens) == ((5e7, pytest.approx(1.6e10)), (1e8, pytest.approx(2.56e12)))


def test_published_losses() -> None:
    """Check 31, the vectors themselves, so that the test above stands on the published law."""
    assert [HOFFMANN(70e9, 1.4e12), HOFFMANN(1e9, 20e9)] == pytest.approx([1.93665, 2.58005], rel=1e-5)
    assert [BESIROGLU(70e9, 1.4e12), BESIROGLU(1e9, 20e9)] == pytest.approx([1.97358, 2.52975], rel=1e-5)


def test_more_noise() -> None:
    """0.2 % of the loss, as seeds scatter: A and B, which go with their exponents, move; exponents, predictions and the
    optimum inside the runs' range hardly do."""
    found = fit_loss(noisy(grid(BESIROGLU), 2e-3)).law
    assert (found.alpha, found.beta) == pytest.approx((BESIROGLU.alpha, BESIROGLU.beta), rel=0.02)
    assert found(7e9, 1.4e11) == pytest.approx(BESIROGLU(7e9, 1.4e11), rel=1e-3)
    assert found.optimum(1e21) == pytest.approx(BESIROGLU.optimum(1e21), rel=0.05)


def test_no_lower_cost_is_known() -> None:
    """Beside torch's L-BFGS on the same objective from the constants that made the runs."""
    runs = noisy(grid(BESIROGLU), 3e-3)
    n, d, target = (
        torch.tensor(np.log([getattr(run, key) for run in runs])) for key in ("parameters", "tokens", "loss")
    )

    def cost(x: torch.Tensor) -> torch.Tensor:
        floor, a, b, alpha, beta = x
        parts = torch.stack([floor + 0 * n, a - alpha * n, b - beta * d])
        return torch.nn.functional.huber_loss(parts.logsumexp(0), target, reduction="sum", delta=fit.HUBER)

    def unknowns(law: LossLaw) -> torch.Tensor:
        return torch.tensor([*np.log(law.constants[:3]), law.alpha, law.beta], dtype=torch.float64)

    theirs = unknowns(BESIROGLU).requires_grad_()
    optimizer = torch.optim.LBFGS([theirs], max_iter=2000, tolerance_change=0, line_search_fn="strong_wolfe")
    start = cost(theirs).item()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        cost(theirs).backward()
        return cost(theirs)

    optimizer.step(closure)
    ours = cost(unknowns(fit_loss(runs, draws=20).law)).item()
    assert ours <= cost(theirs).item() * (1 + 1e-6) < start


def test_outliers_hardly_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three diverged runs of 56; least squares, which is Huber's loss with a wide middle, follows them."""
    runs = [
        replace(run, loss=run.loss * 1.3) if place in (3, 20, 41) else run for place, run in enumerate(grid(HOFFMANN))
    ]

    def error() -> float:
        found = fit_loss(runs, draws=20).law
        return max(abs(found(run.parameters, run.tokens) / run.loss - 1) for run in grid(HOFFMANN))

    assert error() < 1e-3
    monkeypatch.setattr(fit, "HUBER", 1.0)
    assert error() > 1e-2


def test_tied_exponents() -> None:
    """The over-training law (papers.md 8e): one exponent, in the draws too; another law's runs do not fit it."""
    found = fit_loss(noisy(grid(TIED), 1e-4), tied=True)
    assert found.law.constants == pytest.approx(TIED.constants, rel=0.02)
    assert all(law[3] == law[4] for law in (found.law.constants, *found.law.draws))
    assert fit_loss(grid(HOFFMANN), tied=True).residuals.std() > 10 * found.residuals.std()


@pytest.mark.parametrize("noise", [0, 1e-4])
@pytest.mark.parametrize(
    ("fitted", "law", "runs"),
    [
        (fit_timescale, TAU, sweeps("timescale")),
        (fit_optimal_batch, OPTIMAL_BATCH, sweeps("batch")),
        (fit_critical_batch, CRITICAL_BATCH, batches()),
    ],
    ids=["timescale", "optimal batch", "critical batch"],
)
def test_power_laws_come_back(
    fitted: Callable[..., fit.Fit], law: PowerLaw, runs: list[FinishedRun], noise: float
) -> None:
    """Exponent and predictions within 2 % over the fitted range; scale, which is at x = 1, hangs on the exponent."""
    found = fitted(noisy(runs, noise)).law
    assert found.exponent == pytest.approx(law.exponent, rel=0.02)
    for x in (*found.fitted, math.sqrt(math.prod(found.fitted))):
        assert found(x) == pytest.approx(law(x), rel=0.02)
    assert found.source.startswith("fitted to ") and len(found.draws) > 150


def test_the_best_run_counts() -> None:
    """A badly tuned run beside a good one changes nothing; a batch sweep takes each batch's best weight decay."""
    for fitted, runs in (
        (fit_loss, grid(HOFFMANN)),
        (fit_timescale, sweeps("timescale")),
        (fit_optimal_batch, sweeps("batch")),
        (fit_critical_batch, batches()),
    ):
        worse = [replace(run, loss=run.loss + 0.3) for run in runs]
        law, alone = fitted(worse + runs, draws=20).law, fitted(runs, draws=20).law
        assert replace(law, source="") == replace(alone, source="")


def test_runs_of_unknown_or_mixed_batch_are_left_out() -> None:
    """Sweeps at two batches are two sweeps; without a batch a run serves the loss law alone."""
    runs = sweeps("timescale")
    larger = [
        replace(
            run,
            loss=3 + math.log(1.7 * run.timescale / TAU(run.tokens_per_parameter)) ** 2,
            batch=4 * run.batch,
            weight_decay=4 / 1.7 * run.weight_decay,
        )
        for run in runs
        if run.timescale
    ]
    both = fit_timescale(runs + larger).law
    assert both.exponent == pytest.approx(TAU.exponent, rel=1e-6) and both.source == f"fitted to {2 * len(runs)} runs"
    unknown = [replace(run, batch=None, loss=9.0) for run in runs]
    found = fit_timescale(runs + unknown)
    assert found.law(40) == pytest.approx(TAU(40), rel=1e-6)
    assert found.notes == [f"{len(runs)} runs are skipped: they have no one timescale"]


def test_an_optimum_outside_the_range_tried_is_no_optimum() -> None:
    runs = sweeps("timescale")
    cut = [run for run in runs if run.parameters > 1e8 or run.timescale > TAU(run.tokens_per_parameter)]
    found = fit_timescale(cut)
    assert len(found.points) == 14 and found.law(40) == pytest.approx(TAU(40), rel=1e-6)
    assert len(found.notes) == 7 and all("N = 1e+08" in note and "not inside the range" in note for note in found.notes)


def test_a_loss_that_only_falls_has_no_optimum() -> None:
    """Its parabola's least point may lie inside the range tried, but the least loss lies at its end."""
    runs = [replace(run, loss=2 + 0.01 / run.timescale) for run in sweeps("timescale") if run.timescale]
    with pytest.raises(
        UserError, match="0 such among 105 runs, at .* tokens per parameter; .* not inside the range tried"
    ):
        fit_timescale(runs)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """80 % of the time; of 40 seeds that is 32, give or take 2.5. Resampling a few dozen runs is a little too sure: 63
    to 72 % of 60 seeds were found."""
    held = np.zeros(3)
    for seed in range(40):
        loss = fit_loss(noisy(grid(BESIROGLU, SIZES[::2], RATIOS[::2]), 1e-3, seed), draws=40, seed=seed).law
        tau = fit_timescale(noisy(sweeps("timescale"), 2e-4, seed), draws=40, seed=seed).law
        critical = fit_critical_batch(noisy(batches((1e9,))[::2], 2e-4, seed), draws=40, seed=seed).law
        for place, (interval, truth) in enumerate(
            [
                (loss.interval(1e10, 2e11), BESIROGLU(1e10, 2e11)),
                (tau.interval(160), TAU(160)),
                (critical.interval(6e10), CRITICAL_BATCH(6e10)),
            ]
        ):
            held[place] += interval[0] <= truth <= interval[1]
    assert (held >= 20).all() and (held <= 38).all(), held


@pytest.mark.parametrize(
    ("fitted", "runs", "told"),
    [
        (
            fit_loss,
            [],
            "at least 6 different (N, D), of 3 sizes, 3 horizons and 2 ratios D / N; given 0, no parameters",
        ),
        (fit_loss, grid(HOFFMANN, [1e9]), "one of 1B parameters, 7 of 2B to 160B tokens: train 2 more sizes"),
        (
            fit_loss,
            grid(HOFFMANN, ratios=[20]),
            "8 of 1B to 320B tokens: train runs at another number of tokens per parameter",
        ),
        (fit_loss, [replace(run, loss=3 + 1e-12 * run.tokens) for run in grid(HOFFMANN)], "exponents"),
        (
            fit_timescale,
            sweeps("timescale")[::3],
            "sweeps of optimizer.weight_decay at 3 different tokens per parameter",
        ),
        (fit_timescale, grid(HOFFMANN), "0 such among 0 runs, at no tokens per parameter; 56 runs are skipped"),
        (
            fit_optimal_batch,
            sweeps("batch", ratios=[20], sizes=[1e8, 1e9]),
            "2 such among 10 runs, at 2 of 2B, 20B tokens",
        ),
        (fit_critical_batch, batches((1e9,))[:16], "batches with 3 token counts or more: 0"),
        (fit_critical_batch, [run for run in batches() if run.batch < 2**18], "batches with 3 token counts or more: 2"),
    ],
)
def test_too_few_runs(fitted: Callable[..., fit.Fit], runs: list[FinishedRun], told: str) -> None:
    with pytest.raises(UserError) as error:
        fitted(runs, draws=20)
    assert told in str(error.value)
