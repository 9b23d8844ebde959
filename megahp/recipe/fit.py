"""Fit scaling laws to finished runs: loss(N, D), tau_opt(TPP), B_opt(D), B_crit(D_min) and downstream error(loss).

Every law keeps draws of its constants, from which predictions get their intervals: refits to data that scatter around
the law as the runs do. Of few runs the scatter itself is uncertain, by n - p degrees of freedom for p constants: each
draw has one of its own, rss / chi^2_(n-p), which for a line gives Student's t exactly.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megahp.errors import UserError
from megahp.log.progress import human_count
from megahp.scaling.laws import ErrorLaw, LossLaw, PowerLaw
from megahp.scaling.power_laws import timescale

HUBER = 1e-3  # of ln loss: residuals beyond count linearly (Hoffmann et al., arXiv 2203.15556, eq. 3; verified in code)
EXPONENTS = np.linspace(0.05, 1.25, 9)  # of the grid of starts; published exponents are 0.27 to 0.37
STARTS = 5  # of the grid, the best; nearly always each of them reaches the same minimum
PLAUSIBLE = 0.03, 3.0  # a law with an exponent outside says nothing: a constant, or a step at the smallest run
TARGETS = 5  # losses of one model size at which the critical batch is read
EXTREME = 0.01  # an exponent of the critical batch as near to 0 or 1 says nothing
STEEPEST = 10  # of a draw's exponent: floats hold 10th powers of all tokens
DECAYS = np.geomspace(0.02, 20, 800)  # exponents of the error law that are tried, per nat: a step is 0.9 %
DRAWS, SEED = 200, 1

Predict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # unknowns -> ln losses [runs], their Jacobian


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
    error: float | None = None  # of downstream tasks: the share of wrong answers, their mean over the tasks

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

    law: Any  # LossLaw, PowerLaw or ErrorLaw
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

    Minimises sum Huber(ln L(N, D) - ln loss) (Hoffmann et al., eq. 3; tied: Gadre et al., arXiv 2403.08540). Raises
    UserError for too few runs, or where the loss does not fall with both N and D.
    """
    best = _best(runs, "parameters", "tokens")
    points = np.array([[run.parameters, run.tokens, run.loss] for run in best]).reshape(-1, 3)
    sizes, horizons = (len(np.unique(points[:, axis])) for axis in (0, 1))
    ratios = len(np.unique(np.log(points[:, 1] / points[:, 0]).round(2)))
    constants = 5 - tied  # one run more, for the scatter
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

    fits = _fit_sums(points[:, :2], points[:, 2], np.random.default_rng(seed), draws, tied)
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
    """Fit B_crit(D_min) in tokens, a power law, to runs of several batches and token counts at each size, which assumes
    nothing about schedule or optimizer.

    Of the best run at each N, B and D the loss is taken to be that of D_min tokens at a vanishing batch, E + c
    D_min^-beta of each size, with D = D_min (1 + B / B_crit(D_min)) and one power law of all sizes; all constants are
    fitted at once (_fit_hyperbolas). The law's points are read by interpolation, each by itself: per N and B, L_B(D) =
    E + c D^-beta is solved for D at target losses inside every batch's range, and per target the hyperbola is fitted
    over the batches. Raises UserError for too few runs. (Power Lines, section on B_crit; McCandlish et al., arXiv
    1812.06162; papers.md 1, a secondary source)
    """
    known, notes = _known(runs, "batch")
    sizes: list[list[FinishedRun]] = []
    points: list[tuple[float, float]] = []  # (D_min, B_crit)
    for of_size in _groups(known, "parameters"):
        curves = [curve for batch in _groups(of_size, "batch") if len(curve := _best(batch, "tokens")) >= 3]
        try:
            points += _hyperbolas(*_iso_loss(curves))
        except ValueError as error:
            notes.append(f"N = {of_size[0].parameters:.4g}: {error}")
            continue
        sizes.append([run for curve in curves for run in curve])
    if (skipped := TARGETS * len(sizes) - len(points)) > 0:
        notes.append(f"{skipped} targets are skipped: a larger batch does not need more tokens there")
    if len(points) < 3:
        needs = "a critical batch needs, at one size or more, runs that reach the same losses at 3 batches or more"
        of = _listed([run.batch for run in known if run.batch], "tokens a batch")
        given = f"each at 3 horizons or more; given {len(known)} runs of constant batch, {of}"
        raise UserError("; ".join([f"{needs}, {given}", *notes[:3]]))
    (scale, exponent), *drawn = _fit_hyperbolas(sizes, np.array(points), np.random.default_rng(seed), draws)
    if not EXTREME < exponent < 1 - EXTREME:
        raise UserError(f"the critical batch goes as D_min^{exponent:.3g}, which is not plausible; add runs")
    source, tokens = f"fitted to {sum(map(len, sizes))} runs", [least for least, _ in points]
    law = PowerLaw(scale, exponent, source, "", (min(tokens), max(tokens)), tuple(drawn))
    return _with_confidence(law, np.array(points), notes)


def fit_task_error(runs: Sequence[FinishedRun], draws: int = DRAWS, seed: int = SEED) -> Fit:
    """Fit error(L) = most - scale exp(-exponent L) to the runs that have task results, by least squares of the error.

    The exponent is one of DECAYS, for each of which the law is linear. Raises UserError for too few runs, or where the
    error's curve has no exponent inside their range. (Gadre et al., arXiv 2403.08540)
    """
    known, notes = _known(runs, "error")
    points = np.array([[run.loss, run.error] for run in known]).reshape(-1, 2)
    if (found := len(np.unique(points[:, 0].round(6)))) < 4:
        raise UserError(
            f"an error law needs task results (error) of runs of 4 different losses or more; given {found} among "
            f"{len(runs)} runs: evaluate more, with megahp evaluate-tasks"
        )
    losses, errors = points.T
    shapes = np.stack([np.ones((len(DECAYS), len(losses))), -np.exp(-DECAYS[:, None] * (losses - losses.min()))], 2)
    bases, triangles = np.linalg.qr(shapes)  # [exponents, runs, 2], [exponents, 2, 2]

    def solve(errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the best exponents' indices of errors [draws, runs], most, and scale at the least loss."""
        parts = np.einsum("gri,dr->gdi", bases, errors, optimize=True)  # what a law explains of the errors
        best = np.argmax(np.square(parts).sum(2), 0)
        return best, np.linalg.solve(triangles[best], parts[best, np.arange(len(errors)), :, None])[..., 0]

    (best,), (linear,) = solve(errors[None])
    predicted, random = shapes[best] @ linear, np.random.default_rng(seed)
    scatter = np.sqrt(((errors - predicted) ** 2).sum() / random.chisquare(len(errors) - 3, draws))
    drawn, lines = solve(predicted + scatter[:, None] * random.standard_normal((draws, len(errors))))
    if not 0 < best < len(DECAYS) - 1 or linear[1] <= 0:
        raise UserError(
            f"no error law fits: over losses {losses.min():.3g} to {losses.max():.3g} the error does not fall along an "
            "exponential; add runs, over a wider range of losses"
        )
    exponents = DECAYS[[best, *drawn]]
    most, scale = np.vstack([linear, lines]).T
    laws = np.column_stack([most, scale * np.exp(exponents * losses.min()), exponents]).tolist()
    first, source = laws[0], f"fitted to {len(known)} runs"
    law = ErrorLaw(first[0], first[1], first[2], source, "", _range(losses), tuple(map(tuple, laws[1:])))
    return _with_confidence(law, points, notes)


def _fit_hyperbolas(
    sizes: Sequence[Sequence[FinishedRun]], points: np.ndarray, random: np.random.Generator, draws: int
) -> list[tuple[float, float]]:
    """Fit the loss E + c D_min^-beta of every size, and B_crit(D_min) of all, to runs of several batches at once.

    points: (D_min, B_crit), to start from. Returns the law's (scale, exponent), and its draws'.
    """
    runs = [run for of_size in sizes for run in of_size]
    tokens, batches, losses = (np.log([getattr(run, name) for run in runs]) for name in ("tokens", "batch", "loss"))
    of, count = np.repeat(np.arange(len(sizes)), list(map(len, sizes))), len(sizes)
    rows, centre = np.arange(len(runs)), tokens.mean()

    def law(unknowns: np.ndarray) -> tuple[Any, Any]:
        """Return ln scale and exponent from the last two: ln B_crit at the centre, and the logit of the exponent."""
        exponent = 1 / (1 + np.exp(-unknowns[..., -1]))
        return unknowns[..., -2] - exponent * centre, exponent

    def predict(unknowns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        floor, level, beta = unknowns[:-2].reshape(3, count)[:, of]
        scale, exponent = law(unknowns)
        least = _least_tokens(tokens, batches - scale, exponent)
        term = level - beta * (least - centre)
        total = np.logaddexp(floor, term)
        share, needed = np.exp(term - total), np.exp(least - tokens)  # of the loss above the floor; of D
        # by the implicit function theorem, of ln D_min in ln B_crit at the centre and in the exponent
        slope = -share * beta * (1 - needed) / (1 - (1 - needed) * exponent)
        jacobian = np.zeros((len(runs), len(unknowns)))
        for place, part in enumerate((1 - share, share, -share * (least - centre))):
            jacobian[rows, place * count + of] = part
        jacobian[:, -2], jacobian[:, -1] = slope, slope * (least - centre) * exponent * (1 - exponent)
        return total, jacobian

    (x, y), starts = np.log(points).T, []
    curves = np.array(
        [_fit_sums(np.exp(tokens[of == size])[:, None], np.exp(losses[of == size]))[0] for size in range(count)]
    ).T
    curves[1] -= curves[2] * centre
    for exponent in (0.3, 0.5, 0.7):
        level = y.mean() + exponent * (centre - x.mean())
        starts += [np.array([*curves.ravel(), level + off, np.log(exponent / (1 - exponent))]) for off in (-1, 0, 1)]
    scales, exponents = law(_fit(predict, losses, starts, random, draws))
    return list(zip(np.exp(scales.clip(-300, 300)).tolist(), exponents.tolist(), strict=True))


def _least_tokens(tokens: np.ndarray, ratio: np.ndarray, exponent: float) -> np.ndarray:
    """Return ln D_min of ln D: D = D_min (1 + B / (a D_min^p)), ratio = ln (B / a), by Newton's method.

    ln D is an increasing, convex function of ln D_min, so that steps from the right never pass the root.
    """
    least = tokens
    for _ in range(100):
        own, other = least, ratio + (1 - exponent) * least
        total = np.logaddexp(own, other)
        step = (total - tokens) / (1 - exponent * np.exp(other - total))
        least = least - step
        if np.abs(step).max() < 1e-13 * np.abs(tokens).max():
            break
    return least


def _fit_sums(
    x: np.ndarray, y: np.ndarray, random: np.random.Generator | None = None, draws: int = 0, tied: bool = False
) -> np.ndarray:
    """Fit y = floor + sum_j a_j / x_j^alpha_j by Huber's loss of ln y, and to `draws` simulations of y.

    x: [runs, terms]. Returns ln floor, ln a_1 .., alpha_1 .., [1 + draws, 1 + 2 terms].
    """
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
    design = design @ basis.T

    def predict(unknowns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = design @ unknowns
        total = np.logaddexp.reduce(parts, axis=-1)
        return total, np.einsum("rt,rtu->ru", np.exp(parts - total[:, None]), design)

    starts = []
    for exponents in itertools.product(EXPONENTS, repeat=1 if tied else terms):
        # The sum is linear but for its exponents, so least squares find the other unknowns of a start.
        relative = np.column_stack([np.ones(runs), np.exp(-logs * exponents)]) / y[:, None]
        linear = np.linalg.lstsq(relative, np.ones(runs), rcond=None)[0]
        starts.append(np.array([*np.log(linear.clip(min=1e-3 * y.min())), *exponents]))
    fits = _fit(predict, np.log(y), starts, random, draws) @ basis
    fits[:, 1 : 1 + terms] += fits[:, 1 + terms :] * centre
    return fits


def _fit(
    predict: Predict,
    target: np.ndarray,
    starts: Sequence[np.ndarray],
    random: np.random.Generator | None = None,
    draws: int = 0,
) -> np.ndarray:
    """Minimise sum Huber(predict(unknowns) - target) from the best starts, and do it again for simulated targets.

    A simulation is the fit's prediction with normal scatter, of a variance that is itself drawn as the runs leave it
    uncertain: rss / chi^2 with as many degrees of freedom as there are more runs than unknowns. Returns the unknowns,
    [1 + draws, unknowns].
    """
    from scipy.optimize import minimize
    from scipy.special import huber

    def minimum(start: np.ndarray, units: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the least cost near a start, by steps in these units, and where it is."""
        found = minimize(lambda steps: cost(start + units @ steps, units, target), np.zeros(len(start)), jac=True)
        return found.fun, start + units @ found.x

    def cost(unknowns: np.ndarray, units: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
        """Return Huber's loss and its gradient, over HUBER^2, since the tolerance of BFGS is absolute."""
        predicted, jacobian = predict(unknowns)
        errors = predicted - target
        return huber(HUBER, errors).sum() / HUBER**2, np.clip(errors, -HUBER, HUBER) @ jacobian @ units / HUBER**2

    own = np.eye(len(starts[0]))
    nearest = sorted(starts, key=lambda start: cost(start, own, target)[0])[:STARTS]
    best = min((minimum(start, own, target) for start in nearest), key=lambda found: found[0])[1]
    if not draws or random is None:
        return best[None]
    predicted, jacobian = predict(best)
    scatter = np.sqrt(((target - predicted) ** 2).sum() / random.chisquare(len(target) - len(best), draws))
    simulated = predicted + scatter[:, None] * random.standard_normal((draws, len(target)))
    # in units in which least squares have the Hessian 1, that BFGS begins with, it takes few steps
    _, sizes, axes = np.linalg.svd(jacobian, full_matrices=False)
    units = axes.T * (HUBER / sizes.clip(min=1e-9 * sizes.max()))
    return np.array([best, *(minimum(best, units, each)[1] for each in simulated)])


def _fit_optima(runs: Sequence[FinishedRun], alike: Sequence[str], swept: str, over: str, draws: int, seed: int) -> Fit:
    """Fit a power law of the optimum of one attribute over another.

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
    return _power_law(np.array(optima), used, notes, np.random.default_rng(seed), draws)


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


def _power_law(points: np.ndarray, runs: int, notes: list[str], random: np.random.Generator, draws: int) -> Fit:
    """Fit a line to the logs of points (x, y), [points, 2], by least squares.

    Exponent, and ln y at the mean of ln x, are independent of each other; draws of both, scattered by one
    rss / chi^2_(n-2), have Student's t of n - 2 degrees of freedom, and so has ln y at any x.
    """
    (x, y), count = np.log(points).T, len(points)
    exponent, level = np.polyfit(x - x.mean(), y, 1)
    rss = ((y - level - exponent * (x - x.mean())) ** 2).sum()
    scatter = np.sqrt(rss / random.chisquare(count - 2, draws))
    exponents = exponent + scatter * random.standard_normal(draws) / math.sqrt(count * x.var())
    levels = level + scatter * random.standard_normal(draws) / math.sqrt(count)
    scales = np.exp((levels - exponents * x.mean()).clip(-700, 700))
    usable = np.abs(exponents) < STEEPEST  # of three points, draws may lie hundreds of orders of magnitude away
    drawn = tuple(zip(scales[usable].tolist(), exponents[usable].tolist(), strict=True))
    scale, source = math.exp(level - exponent * x.mean()), f"fitted to {runs} runs"
    return _with_confidence(PowerLaw(scale, float(exponent), source, "", _range(points[:, 0]), drawn), points, notes)


def _with_confidence(law: Any, points: np.ndarray, notes: Sequence[str] = ()) -> Fit:
    """Return the fit, with how good it is as its law's confidence."""
    fit = Fit(law, points, list(notes))
    scatter = math.sqrt(np.mean(fit.residuals**2))
    confidence = f"R^2 {fit.r_squared:.3f} and residuals of {scatter:.2g} in ln; {len(law.draws)} bootstrap draws"
    return replace(fit, law=replace(law, confidence=confidence))


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
