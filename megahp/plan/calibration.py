"""Fit the few numbers of a machine's `efficiency` to published step times.

One factor each for products, attention, memory, links in and between nodes and contention, and one more for the
products of each generation of GPUs. Priors keep what a set of rows says nothing about near what single kernels reach;
a source weighs as much as any other, however many rows it has.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from megahp.parallel.layout import fit
from megahp.plan.formulas import rank_works
from megahp.plan.machine import Efficiency, Machine
from megahp.plan.published import Case
from megahp.plan.step_time import Estimate, placement, step_time

PRIOR = Efficiency(products=0.85, attention=0.9, memory=0.8, node=0.75, network=0.7, contention=0.4)
# Standard deviations of the factors' logarithms before any row is seen.
SPREAD = {"products": 0.1, "attention": 0.2, "memory": 0.15, "node": 0.2, "network": 0.3, "contention": 0.5}
GENERATION_SPREAD = 0.1
NOISE = 0.1  # of a published step time, and of a prediction: a row's relative error where nothing is wrong
ROUNDS = 3  # of Gauss-Newton, after which no factor moves by a thousandth
HUBER = 20  # rounds of robust weights
Factors = Mapping[str, float]  # efficiency, or generation -> logarithm of its factor


def generation(machine: Machine) -> str:
    """Return the generation of a machine's GPUs: H200 has the chip of H100."""
    found = machine.name.partition("-")[0]
    return "h100" if found == "h200" else found


def calibrated(machine: Machine, factors: Factors) -> Machine:
    """Return the machine with the prior efficiencies times these factors."""
    values = {name: value * math.exp(factors.get(name, 0.0)) for name, value in asdict(PRIOR).items()}
    values["products"] *= math.exp(factors.get(generation(machine), 0.0))
    values["contention"] = min(1.0, values["contention"])
    return replace(machine, efficiency=Efficiency(**{name: round(value, 4) for name, value in values.items()}))


@dataclass(frozen=True)
class Fitted:
    """Factors, and what was linear about them: log(published / predicted) of the rows, and its derivatives."""

    factors: dict[str, float]
    chosen: Sequence[int]
    residuals: np.ndarray
    slopes: np.ndarray  # [rows, factors]


class Calibration:
    """Rows, their work counted once, and fits to some of them."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.cases = cases
        self.works = [rank_works(case.config, case.ranks, case.stack) for case in cases]

    def estimate(self, index: int, factors: Factors) -> Estimate:
        """Return the estimate of a row."""
        case = self.cases[index]
        return step_time(self.works[index], case.config, case.ranks, calibrated(case.machine, factors), case.stack)

    def fit(self, chosen: Sequence[int]) -> Fitted:
        """Return the factors of robust least squares over these rows, by Gauss-Newton."""
        names = [*SPREAD, *sorted({generation(self.cases[index].machine) for index in chosen})]
        fitted = self._linear(dict.fromkeys(names, 0.0), chosen)
        for _ in range(ROUNDS):
            fitted = self._linear(self.refit(fitted, chosen), chosen)
        return fitted

    def refit(self, fitted: Fitted, chosen: Sequence[int]) -> dict[str, float]:
        """Return the factors of fewer rows, by the derivatives at the fit to all of them."""
        kept = [position for position, index in enumerate(fitted.chosen) if index in set(chosen)]
        residuals, slopes = fitted.residuals[kept], fitted.slopes[kept]
        current = np.array(list(fitted.factors.values()))
        spread = np.array([SPREAD.get(name, GENERATION_SPREAD) for name in fitted.factors])
        rows = Counter(self.cases[index].source for index in chosen)
        weights = np.array([len(chosen) / len(rows) / rows[self.cases[index].source] for index in chosen])
        step = np.zeros(len(current))
        for _ in range(HUBER):
            left = np.abs(residuals - slopes @ step)
            robust = weights * np.minimum(1, NOISE / np.maximum(left, 1e-9)) / NOISE**2
            matrix = slopes.T @ (robust[:, None] * slopes) + np.diag(1 / spread**2)
            step = np.linalg.solve(matrix, slopes.T @ (robust * residuals) - current / spread**2)
        return dict(zip(fitted.factors, (current + step).tolist(), strict=True))

    def _linear(self, factors: dict[str, float], chosen: Sequence[int]) -> Fitted:
        residuals, slopes = [], []
        for index in chosen:
            case, found = self.cases[index], self.estimate(index, factors)
            residuals.append(math.log((case.seconds or math.nan) / found.seconds))
            shares = self._shares(case, found)
            slopes.append([shares[name] if name == "contention" else -shares[name] for name in factors])
        return Fitted(factors, chosen, np.array(residuals), np.array(slopes))

    def _shares(self, case: Case, found: Estimate) -> defaultdict[str, float]:
        """Return the share of the step that each factor scales; a bubble is of what the pipeline computes."""
        layout = fit(case.config.parallel, case.ranks)
        parts: defaultdict[str, float] = defaultdict(float)
        for name, seconds in found.split.items():
            if name.startswith("exposed"):
                axes = {"exposed dp": "dp_replicate_dp_shard"}.get(name, name.removeprefix("exposed "))
                nodes, _ = placement(axes, layout, case.machine.gpus_per_node)
                parts["network" if nodes > 1 else "node"] += seconds
            else:
                parts["memory" if name == "optimizer" else name] += seconds
        total = sum(parts.values()) - parts["bubble"]
        parts["contention"], parts[generation(case.machine)] = found.split.get("exposed dp", 0.0), parts["products"]
        return defaultdict(float, {name: seconds / total for name, seconds in parts.items()})


def chosen_rows(cases: Sequence[Case]) -> list[int]:
    """Return which dense rows with a step time serve calibration: every fourth of each source, the second first."""
    seen: Counter[str] = Counter()
    chosen = []
    for index, case in enumerate(cases):
        if case.kind == "dense" and case.seconds:
            if seen[case.source] % 4 == 1:
                chosen.append(index)
            seen[case.source] += 1
    return chosen
