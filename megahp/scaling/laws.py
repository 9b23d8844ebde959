"""The forms of scaling laws: constants, their sources, our confidence in them, and the range they were fitted on.

Laws fitted by `megahp fit` keep bootstrap draws (recipe/fit.py), so that every value read from them has an interval.

The laws themselves are in power_laws.py and recipe/loss_laws.py; a law file holds a user's own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

INTERVAL = (0.1, 0.9)  # quantiles of the bootstrap draws that an interval spans


@dataclass(frozen=True)
class PowerLaw:
    """y = scale x^exponent."""

    scale: float
    exponent: float
    source: str
    confidence: str
    fitted: tuple[float, float] = (0.0, math.inf)  # least and largest x
    draws: tuple[tuple[float, float], ...] = ()  # (scale, exponent)

    def __call__(self, x: float) -> float:
        return self.scale * x**self.exponent

    def interval(self, x: float) -> tuple[float, float] | None:
        """Return the interval of y at x; None where the law has no draws."""
        return _quantiles([scale * x**exponent for scale, exponent in self.draws])


@dataclass(frozen=True)
class ErrorLaw:
    """Error of downstream tasks = most - scale exp(-exponent L), L in nats per token: a power law of the perplexity.

    (Gadre et al., arXiv 2403.08540; the form verified in code: mlfoundations/scaling@a003c49, scaling/laws.py)
    """

    most: float  # the error that the loss tends to, as of guessing
    scale: float
    exponent: float
    source: str
    confidence: str
    fitted: tuple[float, float] = (0.0, math.inf)  # least and largest loss
    draws: tuple[tuple[float, float, float], ...] = ()  # (most, scale, exponent)

    def __call__(self, loss: Any) -> Any:
        return self.most - self.scale * np.exp(-self.exponent * loss)

    def interval(self, loss: float) -> tuple[float, float] | None:
        """Return the interval of the error at a loss; None where the law has no draws."""
        return _quantiles([most - scale * float(np.exp(-exponent * loss)) for most, scale, exponent in self.draws])


@dataclass(frozen=True)
class LossLaw:
    """L(N, D) = floor + a / N^alpha + b / D^beta in nats per token, N parameters and D tokens.

    (Hoffmann et al., arXiv 2203.15556, eq. 10; alpha = beta is the over-training law of Gadre et al., arXiv 2403.08540,
    written in N and D.)
    """

    floor: float
    a: float
    b: float
    alpha: float
    beta: float
    source: str
    confidence: str
    parameters: tuple[float, float] = (0.0, math.inf)  # least and largest N it was fitted on
    tokens: tuple[float, float] = (0.0, math.inf)  # and D
    draws: tuple[tuple[float, float, float, float, float], ...] = ()  # (floor, a, b, alpha, beta)

    def __call__(self, parameters: float, tokens: float) -> float:
        return loss(parameters, tokens, *self.constants)

    @property
    def constants(self) -> tuple[float, float, float, float, float]:
        return self.floor, self.a, self.b, self.alpha, self.beta

    def interval(self, parameters: float, tokens: float) -> tuple[float, float] | None:
        """Return the interval of L(N, D); None where the law has no draws."""
        return _quantiles([loss(parameters, tokens, *draw) for draw in self.draws])

    def optimum(self, flops: float) -> tuple[float, float]:
        """Return (N, D) of least loss with 6 N D = flops.

        N = G (C/6)^(beta / (alpha + beta)), G = (alpha a / (beta b))^(1 / (alpha + beta)). (Hoffmann et al., eq. 4)
        """
        both = self.alpha + self.beta
        parameters = (self.alpha * self.a / (self.beta * self.b)) ** (1 / both) * (flops / 6) ** (self.beta / both)
        return parameters, flops / 6 / parameters


def loss(parameters: Any, tokens: Any, floor: float, a: float, b: float, alpha: float, beta: float) -> Any:
    """Return floor + a / N^alpha + b / D^beta, of numbers or arrays."""
    return floor + a / parameters**alpha + b / tokens**beta


def increasing_root(function: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Return x in [low, high], both above 0, where an increasing function reaches the target, by bisection of log x."""
    for _ in range(200):  # halves log(high / low) until a float cannot be halved further
        middle = math.sqrt(low * high)
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return high


def _quantiles(values: list[float]) -> tuple[float, float] | None:
    if not values:
        return None
    low, high = quantiles(values)
    return float(low), float(high)


def quantiles(draws: Any) -> np.ndarray:
    """Return the ends of the interval of draws, [draws, ...] -> [2, ...].

    The places are INTERVAL x (n + 1) of the n sorted draws, between which one more would lie 80 % of the time, however
    many they are; numpy's own, INTERVAL x (n - 1), are nearer to each other.
    """
    return np.quantile(draws, INTERVAL, axis=0, method="weibull")
