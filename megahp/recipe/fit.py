"""Scaling laws fitted to finished runs: loss(N, D), tau_opt(TPP), B_opt(D) and B_crit(D_min).

Every law keeps bootstrap draws: refits to what resampling could have shown. A resample that could not have been fitted
is drawn again.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megahp.errors import UserError
from megahp.log.progress import human_count
from megahp.scaling.laws import LossLaw, PowerLaw
from megahp.scaling.power_laws import timescale

HUBER = 1e-3  # of ln loss: where squares end (Hoffmann et al., arXiv 2203.15556, eq. 3)
EXPONENTS = np.linspace(0.05, 1.25, 9)  # every pair of them is a start
PLAUSIBLE = 0.03, 3.0  # exponents of the loss between which a law says something; a draw beyond is dropped
STEPS = 500  # at most, of one descent; most are done in 50
TARGETS = 5  # losses of one size at which the critical batch is read
DRAWS, SEED = 200, 1


@dataclass(frozen=True)
class FinishedRun:
    """A finished run. What is None is not known, or did not stay as it was: such a run serves only the other laws."""

    name: str
    parameters: float
    tokens: float  # D, of the whole run
    loss: float  # nats per token, at the end, on held-out text
    batch: float | None = None  # in tokens
    lr: float | None = None  # peak, as applied to hidden matrices
    weight_decay: float | None = None  # likewise

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters

    @property
    def timescale(self) -> float | None:
        """tau; None where it is not known, and without weight decay, which has none."""
        if not (self.batch and self.lr and self.weight_decay):
            return None
        return timescale(self.lr, self.weight_decay, self.batch, self.tokens)


@dataclass(frozen=True)
class Fit:
    """A law, what it was fitted to, and what was left out."""

    law: Any  # LossLaw or PowerLaw
    points: np.ndarray  # [points, 2]: x, y; of a loss law [points, 3]: N, D, loss
    notes: list[str] = field(default_factory=list)

    @property
    def residuals(self) -> np.ndarray:
        """ln of what was found over what the law says, [points]."""
        return np.array([math.log(y / self.law(*x)) for *x, y in self.points.tolist()])

    @property
    def r_squared(self) -> float:
        """The share of the variance of ln y that the law explains."""
        return 1 - float(np.mean(self.residuals**2) / np.var(np.log(self.points[:, -1])))


def fit_loss(runs: Sequence[FinishedRun], tied: bool = False, draws: int = DRAWS, seed: int = SEED) -> Fit:
    """L(N, D) = E + A / N^alpha + B / D^beta through the best run at each (N, D); tied: with alpha = beta.

    Minimises sum Huber(ln L(N, D) - ln loss) from many starts (Hoffmann et al., eq. 3; tied: Gadre et al., arXiv
    2403.08540); the bootstrap draws runs. Raises UserError for too few runs, or where the loss does not fall with both.
    """
    best = _best(runs, "parameters", "tokens")
    points = np.array([[run.parameters, run.tokens, run.loss] for run in best]).reshape(-1, 3)
    sizes, counts = (len(np.unique(points[:, axis])) for axis in (0, 1))
    ratios = len(np.unique(np.log(points[:, 1] / points[:, 0]).round(2)))
    least = 5 - tied  # as many constants: fewer different runs fit no resample
    if len(points) <= least or sizes < 3 or counts < 3 or ratios < 2:
        missing = [
            *([f"{3 - sizes} more sizes, by model.width or model.layers"] if sizes < 3 else []),
            *([f"{3 - counts} more horizons, by train.tokens"] if counts < 3 else []),
            *([f"{least + 1 - len(points)} more pairs of both"] if len(points) <= least else []),
            *(["runs at another number of tokens per parameter"] if ratios < 2 else []),
        ]
        there = f"{_listed(points[:, 0], 'parameters')}, {_listed(points[:, 1], 'tokens')}"
        raise UserError(
            f"a loss law L(N, D) needs {least + 1} different (N, D) or more, of 3 sizes, 3 horizons and 2 ratios D / N "
            f"or more; there are {len(points)}, {there}: train {', '.join(missing)}"
        )

    def suffices(drawn: np.ndarray) -> bool:
        return sum(drawn) >= least and all(len(np.unique(points[drawn, axis])) >= 3 for axis in (0, 1))

    weights = _resamples(len(points), suffices, draws, np.random.default_rng(seed))
    fits = _fit_sums(points[:, :2], points[:, 2], weights, tied)
    laws = np.hstack([np.exp(fits[:, :3].clip(max=300)), fits[:, 3:]])  # E, A, B, alpha, beta
    good = (laws[:, 3:].min(1) > PLAUSIBLE[0]) & (laws[:, 3:].max(1) < PLAUSIBLE[1])
    floor, a, b, alpha, beta = laws[0].tolist()
    if not good[0] or good.mean() < 0.5:
        raise UserError(
            f"no loss law can be fitted: its exponents, {alpha:.3g} and {beta:.3g}, are not plausible, or hang on few "
            "runs; add runs, over wider ranges of parameters and tokens"
        )
    others = tuple(map(tuple, laws[1:][good[1:]].tolist()))
    ranges = _range(points[:, 0]), _range(points[:, 1])
    source = f"fitted to {len(points)} runs"
    return _sure(LossLaw(floor, a, b, alpha, beta, source, "", *ranges, others), points)


def fit_timescale(runs: Sequence[FinishedRun], draws: int = DRAWS, seed: int = SEED) -> Fit:
    """tau_opt(TPP): at each (N, D, B) the optimum over tau, and a power law through them.

    (Power Lines, arXiv 2505.13738, eq. 3.) At one batch, which changes the loss by itself; of several runs at one tau,
    as in a grid of weight decays and learning rates, the best counts. Raises UserError for too few runs.
    """
    return _fit_optima(runs, ("parameters", "tokens", "batch"), "timescale", "tokens_per_parameter", draws, seed)


def fit_optimal_batch(runs: Sequence[FinishedRun], draws: int = DRAWS, seed: int = SEED) -> Fit:
    """B_opt(D) in tokens: at each (N, D) the optimum over the batch, and a power law through them.

    (Power Lines, eq. 5.) Of several runs at one batch the best counts, since each has a weight decay of its own. Raises
    UserError for too few runs.
    """
    return _fit_optima(runs, ("parameters", "tokens"), "batch", "tokens", draws, seed)


def fit_critical_batch(runs: Sequence[FinishedRun], draws: int = DRAWS, seed: int = SEED) -> Fit:
    """B_crit(D_min) in tokens, by interpolation, which asks nothing of schedule or optimizer.

    Of each N and B, L_B(D) = E + c D^-beta through the best run at each D, read where it meets target losses inside
    every batch's range; of each N and target, D = D_min (1 + B / B_crit) over the batches; a power law over all of
    these. The bootstrap draws batches, each with its whole curve. (Power Lines, section on B_crit; McCandlish et al.,
    arXiv 1812.06162; papers.md 1, a secondary source.) Raises UserError for too few runs.
    """
    known, notes = _known(runs, "batch")
    random = np.random.default_rng(seed)
    used, logs = 0, []  # of each size (ln D_min, ln B_crit), [1 + draws, targets]
    for of_size in _groups(known, "parameters"):
        curves = [curve for batch in _groups(of_size, "batch") if len(curve := _best(batch, "tokens")) >= 3]
        try:
            batches, tokens = _iso_loss(curves)
        except ValueError as error:
            notes.append(f"N = {of_size[0].parameters:.4g}: {error}")
            continue
        used += sum(map(len, curves))
        logs.append(_hyperbolas(batches, tokens, _resamples(len(curves), lambda drawn: sum(drawn) >= 2, draws, random)))
    x, y = np.concatenate(logs, axis=-1) if logs else np.empty((2, 1, 0))
    found = np.isfinite(x + y)
    if missed := np.sum(~found[0]):
        notes.append(f"{missed} targets are left out: more batch does not ask for more tokens there")
    if np.sum(found[0]) < 3:
        needs = "a critical batch needs, of one size or more, runs that reach the same losses at 3 batches or more"
        of = _listed([run.batch for run in known if run.batch], "tokens a batch")
        there = f"each at 3 horizons or more; there are {len(known)} runs whose batch is constant, {of}"
        raise UserError("; ".join([f"{needs}, {there}", *notes[:3]]))
    lines = _lines(np.nan_to_num(x), np.nan_to_num(y), found)
    fit = _power_law(np.exp(np.stack([x[0], y[0]], -1)[found[0]]), lines, used, notes)
    if not 0 < fit.law.exponent < 1:
        raise UserError(f"the critical batch goes as D_min^{fit.law.exponent:.3g}, which is not plausible; add runs")
    return fit


def _fit_sums(x: np.ndarray, y: np.ndarray, weights: np.ndarray, tied: bool = False) -> np.ndarray:
    """y = floor + sum_j a_j / x_j^alpha_j by Huber's loss of ln y: ln floor, ln a_1 .., alpha_1 .. of all runs, then of
    each draw, [1 + draws, 1 + 2 terms].

    x: [runs, terms]; weights: how often each draw has each run, [draws, runs]. Every draw starts from the fit to all.
    """
    terms = x.shape[1]
    centre = np.log(x).mean(0)  # there the a_j are hardly correlated with their exponents
    logs = np.log(x) - centre
    basis = np.eye(1 + 2 * terms)
    if tied:
        basis = np.vstack([basis[: 1 + terms], basis[1 + terms :].sum(0)])
    starts = _starts(logs, y, tied)
    found, costs = _descend(starts, logs, np.log(y), np.ones((len(starts), len(y))), basis)
    best = found[np.argmin(costs)]
    others, _ = _descend(np.tile(best, (len(weights), 1)), logs, np.log(y), weights, basis)
    fits = np.vstack([best, others])
    fits[:, 1 : 1 + terms] += fits[:, 1 + terms :] * centre
    return fits


def _starts(logs: np.ndarray, y: np.ndarray, tied: bool) -> np.ndarray:
    """ln floor, ln a_j and alpha_j at every combination of EXPONENTS, [starts, 1 + 2 terms]: the rest is linear."""
    axes = [EXPONENTS] * (1 if tied else logs.shape[1])
    exponents = np.stack([axis.ravel() for axis in np.meshgrid(*axes)], -1)
    exponents = np.broadcast_to(exponents, (len(exponents), logs.shape[1]))
    powers = np.exp(-exponents[:, None] * logs)
    relative = np.concatenate([np.ones_like(powers[..., :1]), powers], -1) / y[:, None]
    linear = np.linalg.pinv(relative).sum(-1)  # times 1 for every run
    return np.hstack([np.log(linear.clip(min=1e-3 * y.min())), exponents])


def _descend(
    fits: np.ndarray, logs: np.ndarray, target: np.ndarray, weights: np.ndarray, basis: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Every row of fits [rows, 1 + 2 terms] to its least cost, and that cost, [rows]. The cost of a row is sum_i
    weights[row, i] Huber(ln(e^fit_0 + sum_j e^(fit_j - alpha_j logs[i, j])) - target[i]).

    Levenberg's and Marquardt's method with Huber's weights, all rows at once: a step is taken where it lowers the cost.
    basis: the directions it may take, [directions, 1 + 2 terms].
    """
    damping = np.full(len(fits), 1e-2)
    residuals, slopes, costs = _residuals(fits, logs, target, weights)
    for _ in range(STEPS):
        near = weights * HUBER / np.maximum(np.abs(residuals), HUBER)
        along = slopes @ basis.T
        weighted = np.swapaxes(along * near[..., None], 1, 2)
        curvature, gradient = weighted @ along, weighted @ residuals[..., None]
        diagonal = np.einsum("rii->ri", curvature)  # a view
        diagonal += damping[:, None] * diagonal + 1e-12 * diagonal.max(1, keepdims=True) + 1e-300
        trial = fits - np.linalg.solve(curvature, gradient)[..., 0] @ basis
        with np.errstate(all="ignore"):  # a wild step costs infinity or NaN, and is not taken
            trial_residuals, trial_slopes, trial_costs = _residuals(trial, logs, target, weights)
        better = trial_costs < costs
        moving = np.where(better, costs - trial_costs > 1e-10 * costs, damping < 1e6)
        fits, costs = np.where(better[:, None], trial, fits), np.where(better, trial_costs, costs)
        residuals = np.where(better[:, None], trial_residuals, residuals)
        slopes = np.where(better[:, None, None], trial_slopes, slopes)
        damping = np.where(better, damping / 5, damping * 5).clip(1e-12, 1e12)
        if not moving.any():
            break
    return fits, costs


def _residuals(fits: np.ndarray, logs: np.ndarray, target: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """ln of the sums less the target, [rows, runs], its derivatives by the fits, [rows, runs, 1 + 2 terms], and the
    costs, [rows]."""
    terms = logs.shape[1]
    parts = np.repeat(fits[:, None, : 1 + terms], len(logs), axis=1)
    parts[..., 1:] -= fits[:, None, 1 + terms :] * logs
    total = np.logaddexp.reduce(parts, axis=-1)
    shares = np.exp(parts - total[..., None])
    size = np.abs(total - target)
    costs = np.sum(weights * np.where(size < HUBER, size**2 / 2, HUBER * (size - HUBER / 2)), -1)
    return total - target, np.concatenate([shares, -logs * shares[..., 1:]], -1), costs


def _fit_optima(runs: Sequence[FinishedRun], alike: Sequence[str], swept: str, over: str, draws: int, seed: int) -> Fit:
    """The power law of the optima of one attribute over another. Runs that are alike in others have one optimum; the
    bootstrap draws optima."""
    known, notes = _known(runs, swept)
    points, used = [], 0
    for group in _groups(known, *alike):
        if len(best := _best(group, swept)) < 3:
            continue
        try:
            least = _parabola([getattr(run, swept) for run in best], [run.loss for run in best])
        except ValueError as error:
            notes.append(f"N = {group[0].parameters:.4g}, D = {group[0].tokens:.4g}: {error}; left out")
            continue
        points.append((getattr(group[0], over), least))
        used += len(group)
    if len({point[0] for point in points}) < 3:
        key = {"batch": "batch.global_batch", "timescale": "optimizer.weight_decay"}[swept]
        needs = f"an optimal {swept} needs sweeps of {key} at 3 different {over.replace('_', ' ')} or more"
        at = _listed([getattr(run, over) for run in known], over.replace("_", " "))
        there = f"each of 3 values or more, the best inside; {len(points)} are found in {len(known)} runs, at {at}"
        raise UserError("; ".join([f"{needs}, {there}", *notes[:3]]))
    found = np.array(points)
    random = np.random.default_rng(seed)
    weights = _resamples(len(found), lambda drawn: len(np.unique(found[drawn, 0])) >= 2, draws, random)
    x, y = np.log(found.T)
    lines = _lines(x, y, np.vstack([np.ones(len(found)), weights]))
    return _power_law(found, lines, used, notes)


def _parabola(x: Sequence[float], losses: Sequence[float]) -> float:
    """x where the parabola of the losses in ln x is least. Raises ValueError where that is not among those tried."""
    logs, best = np.log(x), x[int(np.argmin(losses))]
    curvature, slope, _ = np.polyfit(logs - logs.mean(), losses, 2)
    least = logs.mean() - slope / (2 * curvature)
    if curvature <= 0 or not logs.min() < least < logs.max() or best in (min(x), max(x)):
        raise ValueError(f"the least loss is not inside the range tried, {min(x):.3g} to {max(x):.3g}")
    return math.exp(least)


def _iso_loss(curves: Sequence[Sequence[FinishedRun]]) -> tuple[np.ndarray, np.ndarray]:
    """Batches [batches], and the tokens at which each meets the target losses [batches, targets]. Raises ValueError."""
    if len(curves) < 3:
        raise ValueError(f"batches with 3 token counts or more: {len(curves)}; left out")
    fits, ends = [], []
    for curve in curves:
        tokens = np.array([run.tokens for run in curve])
        (fit,) = _fit_sums(tokens[:, None], np.array([run.loss for run in curve]), np.empty((0, len(curve))))
        fits.append((fit, tokens))
        ends.append(np.exp(fit[0]) + np.exp(fit[1] - fit[2] * np.log([tokens.max(), tokens.min()])))
    low, high = np.max(ends, axis=0)[0], np.min(ends, axis=0)[1]
    if low >= high:
        raise ValueError("no loss is inside the range of every batch; left out")
    targets = np.linspace(low, high, TARGETS)
    with np.errstate(divide="ignore"):
        found = [np.exp((fit[1] - np.log(targets - np.exp(fit[0]))) / fit[2]) for fit, _ in fits]
    inside = [each.clip(tokens.min(), tokens.max()) for each, (_, tokens) in zip(found, fits, strict=True)]  # but for
    return np.array([curve[0].batch for curve in curves]), np.array(inside)  # rounding, where the curve has become flat


def _hyperbolas(batches: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """ln D_min and ln B_crit of D = D_min (1 + B / B_crit), [2, 1 + draws, targets], by least relative squares over the
    batches; NaN where one of them would not be above 0. tokens: [batches, targets]; weights: [draws, batches]."""
    weights = np.vstack([np.ones(len(batches)), weights])
    rows = np.stack([1 / tokens, batches[:, None] / tokens], -1)  # [batches, targets, 2], times (D_min, D_min / B_crit)
    products = np.einsum("wb,bti,btj->wtij", weights, rows, rows)
    sums = np.einsum("wb,bti->wti", weights, rows)
    least, slope = np.moveaxis(np.linalg.solve(products, sums[..., None])[..., 0], -1, 0)
    good = (least > 0) & (slope > 0)
    least, slope = np.where(good, least, np.nan), np.where(good, slope, np.nan)
    return np.log([least, least / slope])


def _lines(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(e^intercept, slope) of the least squares line of y over x for each row of weights [rows, points]: [rows, 2]."""
    with np.errstate(all="ignore"):  # NaN for a row with less than two different x
        total = weights.sum(-1)
        mean_x, mean_y = (np.sum(weights * values, -1) / total for values in (x, y))
        dx = x - mean_x[:, None]
        slope = np.sum(weights * dx * y, -1) / np.sum(weights * dx**2, -1)
    return np.stack([np.exp(mean_y - slope * mean_x), slope], -1)


def _power_law(points: np.ndarray, lines: np.ndarray, runs: int, notes: list[str]) -> Fit:
    good = np.isfinite(lines).all(-1)
    if not good[0] or good.mean() < 0.5:
        raise UserError("no power law can be fitted: less than half of the bootstrap draws have one; add runs")
    (scale, exponent), *draws = lines[good].tolist()
    law = PowerLaw(scale, exponent, f"fitted to {runs} runs", "", _range(points[:, 0]), tuple(map(tuple, draws)))
    return _sure(law, points, notes)


def _sure(law: Any, points: np.ndarray, notes: Sequence[str] = ()) -> Fit:
    """The fit, its law with what is known of how good it is."""
    fit = Fit(law, points, list(notes))
    scatter = math.sqrt(np.mean(fit.residuals**2))
    confidence = f"R^2 {fit.r_squared:.3f} and residuals of {scatter:.2g} in ln; {len(law.draws)} bootstrap draws"
    return replace(fit, law=replace(law, confidence=confidence))


def _resamples(
    count: int, suffices: Callable[[np.ndarray], bool], draws: int, random: np.random.Generator
) -> np.ndarray:
    """How often each of `count` things is drawn, with replacement, in each draw that suffices, [draws, count]."""
    found: list[np.ndarray] = []
    while len(found) < draws:
        drawn = random.multinomial(count, np.full(count, 1 / count))
        if suffices(drawn > 0):
            found.append(drawn)
    return np.array(found, dtype=float).reshape(draws, count)


def _groups(runs: Sequence[FinishedRun], *attributes: str) -> list[list[FinishedRun]]:
    """The runs that agree in these to six digits, in their order."""
    found: dict[Any, list[FinishedRun]] = {}
    for run in runs:
        found.setdefault(tuple(float(f"{getattr(run, name):.6g}") for name in attributes), []).append(run)
    return [found[each] for each in sorted(found)]


def _best(runs: Sequence[FinishedRun], *attributes: str) -> list[FinishedRun]:
    """The run of least loss in each of these groups."""
    return [min(group, key=lambda run: run.loss) for group in _groups(runs, *attributes)]


def _listed(values: Sequence[float] | np.ndarray, unit: str) -> str:
    """The different values, or how many and their range, with their unit."""
    found = [human_count(value) for value in sorted({float(f"{value:.3g}") for value in values})]
    if not found:
        return f"no {unit}"
    listed = ", ".join(found) if len(found) < 5 else f"{found[0]} to {found[-1]}"
    return f"{len(found)} of {listed} {unit}" if len(found) > 1 else f"one of {listed} {unit}"


def _range(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _known(runs: Sequence[FinishedRun], attribute: str) -> tuple[list[FinishedRun], list[str]]:
    """The runs of which it is known, and a note about the others."""
    known = [run for run in runs if getattr(run, attribute)]
    missing = len(runs) - len(known)
    return known, [f"{missing} runs are left out: they have no one {attribute}"] if missing else []
