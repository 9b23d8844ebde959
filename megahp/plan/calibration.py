"""Fit the few numbers of a machine's `efficiency` to published step times.

One factor each for products, attention, memory, links in and between nodes and contention, and one more for the
products of each generation of GPUs. Priors keep what a set of rows says nothing about near what single kernels reach;
a source weighs as much as any other, however many rows it has.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace

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
GENERATIONS = ("v100", "a100", "h100", "h200", "b200", "mi250x", "mi300x", "mi355x")
ROUNDS = 3
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


class Calibration:
    """Rows, their work counted once, and fits to any of them."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.cases = cases
        self.works = [rank_works(case.config, case.ranks, case.stack) for case in cases]

    def estimate(self, index: int, factors: Factors) -> Estimate:
        case = self.cases[index]
        return step_time(self.works[index], case.config, case.ranks, calibrated(case.machine, factors), case.stack)

    def fit(self, chosen: Sequence[int]) -> tuple[dict[str, float], np.ndarray, np.ndarray, list[str]]:
        """Return the factors that fit these rows, and for `refit` the residuals there and their derivatives."""
        names = [*SPREAD, *sorted({generation(self.cases[index].machine) for index in chosen})]
        factors = dict.fromkeys(names, 0.0)
        for _ in range(ROUNDS):
            residuals, slopes = self.linearized(chosen, factors, names)
            factors = self.solve(chosen, residuals, slopes, factors, names)
        residuals, slopes = self.linearized(chosen, factors, names)
        return factors, residuals, slopes, names

    def linearized(
        self, chosen: Sequence[int], factors: Factors, names: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return log(published / predicted) of the rows, and its derivatives by each factor, from the shares of the
        predicted time: a bubble is of what the pipeline computes."""
        residuals, slopes = [], []
        for index in chosen:
            case, found = self.cases[index], self.estimate(index, factors)
            residuals.append(math.log(case.seconds / found.seconds))  # type: ignore[operator]
            shares = self.shares(case, found)
            shares[generation(case.machine)] = shares["products"]
            slopes.append([-shares[name] if name != "contention" else shares[name] for name in names])
        return np.array(residuals), np.array(slopes)

    def shares(self, case: Case, found: Estimate) -> Counter[str]:
        """Return the share of the step that each efficiency divides."""
        layout = fit(case.config.parallel, case.ranks)
        parts: Counter[str] = Counter()
        for name, seconds in found.split.items():
            if name in ("products", "attention", "memory"):
                parts[name] += seconds
            elif name == "optimizer":
                parts["memory"] += seconds
            elif name.startswith("exposed"):
                axes = name.removeprefix("exposed ")
                axes = "dp_replicate_dp_shard" if axes == "dp" else axes
                nodes, _ = placement(axes, layout, case.machine.gpus_per_node)
                parts["network" if nodes > 1 else "node"] += seconds
                if name == "exposed dp":
                    parts["contention"] += seconds
        total = sum(parts[name] for name in parts if name != "contention")
        return Counter({name: value / total for name, value in parts.items()})

    def solve(
        self, chosen: Sequence[int], residuals: np.ndarray, slopes: np.ndarray, start: Factors, names: Sequence[str]
    ) -> dict[str, float]:
        """Return the factors of least robust squares about `start`, where the residuals and slopes were taken."""
        current = np.array([start[name] for name in names])
        spread = np.array([SPREAD.get(name, GENERATION_SPREAD) for name in names])
        sources = Counter(self.cases[index].source for index in chosen)
        weights = np.array([1 / sources[self.cases[index].source] for index in chosen]) * len(chosen) / len(sources)
        step = np.zeros(len(names))
        for _ in range(20):  # Huber's weights, by iteration
            left = residuals - slopes @ step
            robust = weights * np.minimum(1, NOISE / np.maximum(np.abs(left), 1e-9)) / NOISE**2
            matrix = slopes.T @ (robust[:, None] * slopes) + np.diag(1 / spread**2)
            step = np.linalg.solve(matrix, slopes.T @ (robust * residuals) - current / spread**2)
        return dict(zip(names, (current + step).tolist(), strict=True))


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


def without(cases: Sequence[Case], chosen: Iterable[int], source: str) -> list[int]:
    return [index for index in chosen if cases[index].source != source]
