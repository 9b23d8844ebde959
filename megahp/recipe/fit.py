"""Fit scaling laws to finished runs: loss(N, D), tau_opt(TPP), B_opt(D) and B_crit(D_min).

Every law keeps bootstrap draws, its constants refitted to resampled data, from which predictions get their intervals.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megahp.errors import UserError
from megahp.log.progress import human_count
from megahp.scaling.laws import LossLaw, PowerLaw
from megahp.scaling.power_laws import timescale

HUBER = 1e-3  # of ln loss: residuals beyond count linearly (Hoffmann et al., arXiv 2203.15556, eq. 3; verified in code)
EXPONENTS = np.linspace(0.05, 1.25, 9)  # of the grid of starts; published exponents are 0.27 to 0.37
STARTS = 5  # of the grid, the best; nearly always each of them reaches the same minimum
PLAUSIBLE = 0.03, 3.0  # a law with an exponent outside says nothing: a constant, or a step at the smallest run
TARGETS = 5  # losses of one model size at which the critical batch is read
DRAWS, SEED = 200, 1


@dataclass(frozen=True)
class FinishedRun:
    """A finished run. None: unknown, or not constant over the run; the laws that need the value skip such a run."""

    name: str
    parameters: float
    tokens: float  # D, of the whole run
    loss: float  # nats per token, at the end, on held-out text
    batch: float | None = None  # in tokens
    lr: float | None = None  # peak, as applied to hidden matrices
    weight_decay: float | None = None  # as applied to hidden matrices

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters

    @property
    def timescale(self) -> float | None:
        """tau of AdamW; None if unknown, or without weight decay, when it is infinite."""
        if not (self.batch and self.lr and self.weight_decay):
            return None
        return timescale(self.lr, self.weight_decay, self.batch, self.tokens)


@dataclass(frozen=True)
class Fit:
    """A law, the points it was fitted to, and notes on the runs that were skipped."""

    law: Any  # LossLaw or PowerLaw
    points: np.ndarray  # [points, 2]: x, y; of a loss law [points, 3]: N, D, loss
    notes: list[str] = field(default_factory=list)

    @property
    def residuals(self) -> np.ndarray:
        """ln(measured / predicted), [points]."""
        return np.array([math.log(y / self.law(*x)) for *x, y in self.points.tolist()])

    @property
    def r_squared(self) -> float:
        """The share of the variance of ln y that the law explains."""
        return 1 - float(np.mean(self.residuals**2) / np.var(np.log(self.points[:, -1])))


def fit_loss(runs: Sequence[FinishedRun], tied: bool = False, draws: int = DRAWS, seed: int = SEED) -> Fit:
    """Fit L(N, D) = E + A / N^alpha + B / D^beta to the best run at each (N, D); tied: with alpha = beta.

    Minimises sum Huber(ln L(N, D) - ln loss) (Hoffmann et al., eq. 3; tied: Gadre et al., arXiv 2403.08540); the
    bootstrap resamples runs. Raises UserError for too few runs, or where the loss does not fall with both N and D.
    """
    best = _best(runs, "parameters", "tokens")
    points = np.array([[run.parameters, run.tokens, run.loss] for run in best]).reshape(-1, 3)
    sizes, horizons = (len(np.unique(points[:, axis])) for axis in (0, 1))
    ratios = len(np.unique(np.log(points[:, 1] / points[:, 0]).round(2)))
    constants = 5 - tied  # one run more, so that a resample without one of them still determines the law
    shortages = [
        (3 - sizes, f"{3 - sizes} more sizes, by model.width or model.layers"),
        (3 - horizons, f"{3 - horizons} more horizons, by train.tokens"),
        (constants + 1 - len(points), f"{constants + 1 - len(points)} more pairs of both"),
        (2 - ratios, "runs at another number of tokens per parameter"),
    ]
    if missing := [what for count, what in shortages if count > 0]:
        given = f"{_listed(points[:, 0], 'parameters')}, {_listed(points[:, 1], 'tokens')}"
        raise UserError(
            f"a loss law L(N, D) needs at least {constants + 1} different (N, D), of 3 sizes, 3 horizons and 2 ratios "
            f"D / N; given {len(points)}, {given}: train {', '.join(missing)}"
        )

    def determines(rows: np.ndarray) -> bool:
        return len(np.unique(rows)) >= constants and all(len(np.unique(points[rows, axis])) >= 3 for axis in (0, 1))

    resamples = _resamples(len(points), determines, draws, np.random.default_rng(seed))
    fits = _fit_sums(points[:, :2], points[:, 2], resamples, tied)
    laws = np.hstack([np.exp(fits[:, :3].clip(max=300)), fits[:, 3:]])  # E, A, B, alpha, beta
    good = (laws[:, 3:].min(1) > PLAUSIBLE[0]) & (laws[:, 3:].max(1) < PLAUSIBLE[1])
    floor, a, b, alpha, beta = laws[0].tolist()
    if not good[0] or good.mean() < 0.5:
        raise UserError(
            f"no loss law fits: its exponents, {alpha:.3g} and {beta:.3g}, are not plausible, or depend on a few runs; "
            "add runs, over wider ranges of parameters and tokens"
        )
    drawn = tuple(map(tuple, laws[1:][good[1:]].tolist()))
    ranges = _range(points[:, 0]), _range(points[:, 1])
    source = f"fitted to {len(points)} runs"
    return _with_confidence(LossLaw(floor, a, b, alpha, beta, source, "", *ranges, drawn), points)


def fit_timescale(runs: Sequence[FinishedRun], draws: int = DRAWS, seed: int = SEED) -> Fit:
    """Fit tau_opt(TPP), a power law, to the optimal tau at each (N, D, B). (Power Lines, arXiv 2505.13738, eq. 3)

    One optimum per batch, since the batch changes the loss by itself; of several runs at one tau, as in a grid of
    weight decays and learning rates, the best counts. Raises UserError for too few runs.
    """
    return _fit_optima(runs, ("parameters", "tokens", "batch"), "timescale", "tokens_per_parameter", draws, seed)


def fit_optimal_batch(runs: Sequence[FinishedRun], draws: int = DRAWS, seed: int = SEED) -> Fit:
    """Fit B_opt(D) in tokens, a power law, to the optimal batch at each (N, D). (Power Lines, eq. 5)

    Of several runs at one batch the best counts, since each batch has an optimal weight decay of its own. Raises
    UserError for too few runs.
    """
    return _fit_optima(runs, ("parameters", "tokens"), "batch", "tokens", draws, seed)


def fit_critical_batch(runs: Sequence[FinishedRun], draws: int = DRAWS, seed: int = SEED) -> Fit:
    """Fit B_crit(D_min) in tokens, a power law, by interpolation, which assumes nothing about schedule or optimizer.

    For each N and B, L_B(D) = E + c D^-beta is fitted to the best run at each D and solved for D at target losses
    inside every batch's range. For each N and target, D = D_min (1 + B / B_crit) is fitted over the batches, and the
    power law to all of these. The bootstrap resamples batches, each with its whole curve. Raises UserError for too few
    runs. (Power Lines, section on B_crit; McCandlish et al., arXiv 1812.06162; papers.md 1, a secondary source)
    """
    known, notes = _known(runs, "batch")
    random = np.random.default_rng(seed)
    samples: list[list[tuple[float, float]]] = [[] for _ in range(1 + draws)]  # (D_min, B_crit), of all and drawn
    used = targets = 0
    for of_size in _groups(known, "parameters"):
        curves = [curve for batch in _groups(of_size, "batch") if len(curve := _best(batch, "tokens")) >= 3]
        try:
            batches, tokens = _iso_loss(curves)
        except ValueError as error:
            notes.append(f"N = {of_size[0].parameters:.4g}: {error}")
            continue
        used, targets = used + sum(map(len, curves)), targets + TARGETS
        resamples = _resamples(len(curves), lambda rows: len(np.unique(rows)) >= 2, draws, random)
        for sample, rows in zip(samples, [np.arange(len(curves)), *resamples], strict=True):
            sample += _hyperbolas(batches[rows], tokens[rows])
    if targets > len(samples[0]):
        notes.append(f"{targets - len(samples[0])} targets are skipped: a larger batch does not need more tokens there")
    if len(samples[0]) < 3:
        needs = "a critical batch needs, at one size or more, runs that reach the same losses at 3 batches or more"
        of = _listed([run.batch for run in known if run.batch], "tokens a batch")
        given = f"each at 3 horizons or more; given {len(known)} runs of constant batch, {of}"
        raise UserError("; ".join([f"{needs}, {given}", *notes[:3]]))
    fit = _power_law(list(map(np.array, samples)), used, notes)
    if not 0 < fit.law.exponent < 1:
        raise UserError(f"the critical batch goes as D_min^{fit.law.exponent:.3g}, which is not plausible; add runs")
    return fit


def _fit_sums(x: np.ndarray, y: np.ndarray, resamples: Sequence[np.ndarray] = (), tied: bool = False) -> np.ndarray:
    """Fit y = floor + sum_j a_j / x_j^alpha_j by Huber's loss of ln y, to all runs and to each resample of them.

    x: [runs, terms]; resamples: indices of runs. Returns ln floor, ln a_1 .., alpha_1 .., [1 + resamples, 1 + 2 terms].
    """
    from scipy.optimize import minimize
    from scipy.special import huber

    runs, terms = x.shape
    centre = np.log(x).mean(0)  # there the a_j are hardly correlated with their exponents, and BFGS takes few steps
    logs = np.log(x) - centre
    # ln of a term is linear in the unknowns: design[run, term] @ (ln floor, ln a_1 .., alpha_1 ..).
    design = np.zeros((runs, 1 + terms, 1 + 2 * terms))
    design[:, :, : 1 + terms] = np.eye(1 + terms)
    design[:, range(1, 1 + terms), range(1 + terms, 1 + 2 * terms)] = -logs
    basis = np.eye(1 + 2 * terms)
    if tied:  # one unknown is every exponent
        basis = np.vstack([basis[: 1 + terms], basis[1 + terms :].sum(0)])
    design, target = design @ basis.T, np.log(y)

    def cost(unknowns: np.ndarray, design: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
        """Huber's loss and its gradient, in units of HUBER^2, since the tolerance of BFGS is absolute."""
        parts = design @ unknowns
        total = np.logaddexp.reduce(parts, axis=-1)
        slopes = np.clip(total - target, -HUBER, HUBER)[:, None] * np.exp(parts - total[:, None])
        return huber(HUBER, total - target).sum() / HUBER**2, np.tensordot(slopes, design) / HUBER**2

    starts = []
    for exponents in itertools.product(EXPONENTS, repeat=1 if tied else terms):
        # The sum is linear but for its exponents, so least squares find the other unknowns of a start.
        relative = np.column_stack([np.ones(runs), np.exp(-logs * exponents)]) / y[:, None]
        linear = np.linalg.lstsq(relative, np.ones(runs), rcond=None)[0]
        starts.append(np.array([*np.log(linear.clip(min=1e-3 * y.min())), *exponents]))
    starts.sort(key=lambda start: cost(start, design, target)[0])
    found = [minimize(cost, start, (design, target), "BFGS", jac=True) for start in starts[:STARTS]]
    best = min(found, key=lambda result: result.fun).x
    drawn = [minimize(cost, best, (design[rows], target[rows]), "BFGS", jac=True).x for rows in resamples]
    fits = np.array([best, *drawn]) @ basis
    fits[:, 1 : 1 + terms] += fits[:, 1 + terms :] * centre
    return fits


def _fit_optima(runs: Sequence[FinishedRun], alike: Sequence[str], swept: str, over: str, draws: int, seed: int) -> Fit:
    """Fit a power law of the optimum of one attribute over another; the bootstrap resamples optima.

    Runs that agree in the attributes `alike` form a sweep, which has one optimum.
    """
    known, notes = _known(runs, swept)
    optima, used = [], 0
    for group in _groups(known, *alike):
        if len(best := _best(group, swept)) < 3:
            continue
        try:
            least = _parabola([getattr(run, swept) for run in best], [run.loss for run in best])
        except ValueError as error:
            notes.append(f"N = {group[0].parameters:.4g}, D = {group[0].tokens:.4g}: {error}; skipped")
            continue
        optima.append((getattr(group[0], over), least))
        used += len(group)
    if len({x for x, _ in optima}) < 3:
        key = {"batch": "batch.global_batch", "timescale": "optimizer.weight_decay"}[swept]
        unit = over.replace("_", " ")
        needs = f"an optimal {swept} needs sweeps of {key} at 3 different {unit} or more"
        at = _listed([getattr(run, over) for run in known], unit)
        given = f"each of 3 values or more, the best inside; {len(optima)} such among {len(known)} runs, at {at}"
        raise UserError("; ".join([f"{needs}, {given}", *notes[:3]]))
    points = np.array(optima)
    random = np.random.default_rng(seed)
    resamples = _resamples(len(points), lambda rows: len(np.unique(points[rows, 0])) >= 2, draws, random)
    return _power_law([points, *(points[rows] for rows in resamples)], used, notes)


def _parabola(x: Sequence[float], losses: Sequence[float]) -> float:
    """Return x at the minimum of the parabola of the losses in ln x; raise ValueError if it is outside the range."""
    logs, best = np.log(x), x[int(np.argmin(losses))]
    curvature, slope, _ = np.polyfit(logs - logs.mean(), losses, 2)
    least = logs.mean() - slope / (2 * curvature)
    if curvature <= 0 or not logs.min() < least < logs.max() or best in (min(x), max(x)):
        raise ValueError(f"the least loss is not inside the range tried, {min(x):.3g} to {max(x):.3g}")
    return math.exp(least)


def _iso_loss(curves: Sequence[Sequence[FinishedRun]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the batches [batches] and the tokens at which each reaches the target losses [batches, targets].

    Raises ValueError if fewer than three batches have a curve, or no loss is in the range of all of them.
    """
    if len(curves) < 3:
        raise ValueError(f"batches with 3 token counts or more: {len(curves)}; skipped")
    fits, ends = [], []
    for curve in curves:
        tokens = np.array([run.tokens for run in curve])
        (fit,) = _fit_sums(tokens[:, None], np.array([run.loss for run in curve]))
        fits.append((fit, tokens))
        ends.append(np.exp(fit[0]) + np.exp(fit[1] - fit[2] * np.log([tokens.max(), tokens.min()])))
    low, high = np.max(ends, axis=0)[0], np.min(ends, axis=0)[1]
    if low >= high:
        raise ValueError("no loss is inside the range of every batch; skipped")
    targets, reached = np.linspace(low, high, TARGETS), []
    for fit, tokens in fits:
        with np.errstate(divide="ignore"):
            solved = np.exp((fit[1] - np.log(targets - np.exp(fit[0]))) / fit[2])
        reached.append(solved.clip(tokens.min(), tokens.max()))  # a flat curve turns rounding into orders of magnitude
    return np.array([curve[0].batch for curve in curves]), np.array(reached)


def _hyperbolas(batches: np.ndarray, tokens: np.ndarray) -> list[tuple[float, float]]:
    """Fit D = D_min (1 + B / B_crit) by least relative squares at each target; return (D_min, B_crit).

    tokens: [batches, targets]. A target where either would not be above 0 is skipped.
    """
    points = []
    for of_target in tokens.T:
        slope, least = np.polyfit(batches, of_target, 1, w=1 / of_target)
        if least > 0 and slope > 0:
            points.append((float(least), float(least / slope)))
    return points


def _power_law(samples: Sequence[np.ndarray], runs: int, notes: list[str]) -> Fit:
    """Fit a line in logs to each sample of (x, y), [points, 2]: the first is the law, the others are its draws."""
    laws = np.full((len(samples), 2), math.nan)  # scale, exponent
    for row, sample in zip(laws, samples, strict=True):
        x, y = np.log(sample).reshape(-1, 2).T
        if len(x) and np.ptp(x) > 1e-9:  # else a draw whose x are all one, but for rounding, has no line
            row[1], intercept = np.polyfit(x, y, 1).tolist()
            with np.errstate(over="ignore"):
                row[0] = np.exp(intercept)
    good = np.isfinite(laws).all(1)
    if not good[0] or good.mean() < 0.5:
        raise UserError("no power law fits: fewer than half of the bootstrap draws have one; add runs")
    (scale, exponent), *drawn = laws[good].tolist()
    fitted = _range(samples[0][:, 0])
    law = PowerLaw(scale, exponent, f"fitted to {runs} runs", "", fitted, tuple(map(tuple, drawn)))
    return _with_confidence(law, samples[0], notes)


def _with_confidence(law: Any, points: np.ndarray, notes: Sequence[str] = ()) -> Fit:
    """Return the fit, with how good it is as its law's confidence."""
    fit = Fit(law, points, list(notes))
    scatter = math.sqrt(np.mean(fit.residuals**2))
    confidence = f"R^2 {fit.r_squared:.3f} and residuals of {scatter:.2g} in ln; {len(law.draws)} bootstrap draws"
    return replace(fit, law=replace(law, confidence=confidence))


def _resamples(
    count: int, is_enough: Callable[[np.ndarray], bool], draws: int, random: np.random.Generator
) -> list[np.ndarray]:
    """Draw `count` indices with replacement, `draws` times; a resample that cannot be fitted is drawn again."""
    resamples: list[np.ndarray] = []
    while len(resamples) < draws:
        rows = np.repeat(np.arange(count), random.multinomial(count, np.full(count, 1 / count)))
        if is_enough(rows):
            resamples.append(rows)
    return resamples


def _groups(runs: Sequence[FinishedRun], *attributes: str) -> list[list[FinishedRun]]:
    """Group the runs that agree in these to six digits; ascending, since the order of a table must not matter."""
    groups: dict[Any, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(tuple(float(f"{getattr(run, name):.6g}") for name in attributes), []).append(run)
    return [groups[key] for key in sorted(groups)]


def _best(runs: Sequence[FinishedRun], *attributes: str) -> list[FinishedRun]:
    """Return the run of least loss of each of these groups."""
    return [min(group, key=lambda run: run.loss) for group in _groups(runs, *attributes)]


def _known(runs: Sequence[FinishedRun], attribute: str) -> tuple[list[FinishedRun], list[str]]:
    """Return the runs that have the attribute, and a note about the others."""
    known = [run for run in runs if getattr(run, attribute)]
    missing = len(runs) - len(known)
    return known, [f"{missing} runs are skipped: they have no one {attribute}"] if missing else []


def _listed(values: Sequence[float] | np.ndarray, unit: str) -> str:
    """Format the different values, or their number and range, with their unit."""
    counts = [human_count(value) for value in sorted({float(f"{value:.3g}") for value in values})]
    if not counts:
        return f"no {unit}"
    listed = ", ".join(counts) if len(counts) < 5 else f"{counts[0]} to {counts[-1]}"
    return f"{len(counts)} of {listed} {unit}" if len(counts) > 1 else f"one of {listed} {unit}"


def _range(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())
