"""The gradient noise scale from per-example gradient norms (Gray et al., arXiv 2411.00999; McCandlish et al.,
arXiv 1812.06162, appendix A).

With g_b the gradient of example b's own loss and G the gradient of the mean loss over B examples,
  |G|^2 = (B ||G||^2 - mean_b ||g_b||^2) / (B - 1)   and   S = (mean_b ||g_b||^2 - ||G||^2) / (1 - 1/B)
are unbiased for the squared norm of the true gradient and the trace of the per-example covariance. The noise scale is
S / |G|^2, in examples: the two are smoothed apart and only then divided, since a single |G|^2 may be near 0 or below.

That is m = 1 of an estimate that any two sizes m < n allow, from the squared norms of the mean gradient over m examples
(averaged over such groups) and over n. Data parallelism has both at hand: a rank's gradient, or a microbatch's, before
it is summed, and after.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

import numpy as np

Number = TypeVar("Number", float, np.ndarray)


def estimate(sq_small: Number, sq_batch: Number, batch: int, small: int = 1) -> tuple[Number, Number]:
    """(|G|^2, S), unbiased, from the squared norms of mean gradients over `small` examples and over a batch of them,
    numbers or arrays. By default sq_small is mean_b ||g_b||^2. Raises ValueError for batch <= small, where neither is
    known. (McCandlish et al., equation A.2)"""
    if batch <= small:
        raise ValueError(f"the noise scale needs a batch of at least {small + 1} examples")
    true_sq = (batch * sq_batch - small * sq_small) / (batch - small)
    return true_sq, (sq_small - sq_batch) / (1 / small - 1 / batch)


def ratio(true_sq: float, noise: float) -> float | None:
    """S / |G|^2 in examples; None when the averages do not make a positive number."""
    return noise / true_sq if true_sq > 0 and noise > 0 else None


def step_efficiency(batch: float, noise_scale: float) -> float:
    """eta(B) / eta_max = 1 / (1 + B_noise / B): the best step at a batch B > 0, and the progress it makes, as shares of
    those of an infinite batch, for SGD in the quadratic picture; 1/2 at B = B_noise. Both arguments in the same unit.
    (McCandlish et al., arXiv 1812.06162, section 2.2)
    """
    return 1 / (1 + noise_scale / batch)


@dataclass
class Average:
    """Exponential averages of |G|^2 and S whose half-life is counted in tokens.

    Both start at 0 and so are small at first, by a factor they share: their ratio is right from the first value on.
    """

    true_sq: float = 0.0
    noise: float = 0.0

    def add(self, true_sq: float, noise: float, decay: float) -> None:
        """Take in one step's estimates; those that are not finite say nothing."""
        if math.isfinite(true_sq) and math.isfinite(noise):
            self.true_sq = decay * self.true_sq + (1 - decay) * true_sq
            self.noise = decay * self.noise + (1 - decay) * noise

    @property
    def ratio(self) -> float | None:
        """The smoothed noise scale in examples."""
        return ratio(self.true_sq, self.noise)


BLOCKS = 16
STUDENT = 2.1314  # the 97.5 % point of Student's t with BLOCKS - 1 degrees of freedom
OUTLIER = 3.5  # robust standard deviations beyond which a block counts no further; ours, see docs/batch.md
WINDOW = 3.0  # half-lives of the averages that the blocks span: about what such an average weighs


@dataclass
class Blocks:
    """The noise scale over the newest BLOCKS blocks of steps, with an interval, so that no single step decides.

    With G_k and S_k the sums of a block's estimates, weighted by examples, 1 / noise scale = r = sum G_k / sum S_k. A
    block is weighted down until it no longer stands out, by its mean S (one wild example) and by its residual
    G_k - r S_k (one wild batch; Huber's estimate). The interval is Student's, with the variance of a ratio of means
    (Cochran, Sampling Techniques, section 6.4): symmetric in r, it holds the noise scale however unsure |G|^2 is.
    """

    size: float  # tokens of a block; a step that has more is a block of its own
    closed: list[list[float]] = field(default_factory=list)  # [sum of |G|^2, sum of S, examples] of each, oldest first
    true_sq: float = 0.0  # of the open block
    noise: float = 0.0
    examples: int = 0
    tokens: int = 0

    def add(self, true_sq: float, noise: float, batch: int, tokens: int) -> None:
        """Add one step's estimates from a batch of this many examples; skip them if they are not finite."""
        if not (math.isfinite(true_sq) and math.isfinite(noise)):
            return
        self.true_sq, self.noise = self.true_sq + batch * true_sq, self.noise + batch * noise
        self.examples, self.tokens = self.examples + batch, self.tokens + tokens
        if self.tokens >= self.size:
            self.closed = [*self.closed, [self.true_sq, self.noise, self.examples]][-BLOCKS:]
            self.true_sq, self.noise, self.examples, self.tokens = 0.0, 0.0, 0, 0

    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval of the noise scale in examples, its upper end infinite where |G|^2 may be 0; None
        before BLOCKS blocks are full, or where the data allow no positive number.

        Sums are Python's own: every rank computes this, and numpy's differ in the last bit between kinds of CPU.
        """
        if len(self.closed) < BLOCKS or sum(noise for _, noise, _ in self.closed) <= 0:
            return None
        means = [noise / examples for _, noise, examples in self.closed]
        middle = median(means)
        tame = _weights([mean - middle for mean in means])
        blocks = [
            (weight * true_sq, weight * noise) for weight, (true_sq, noise, _) in zip(tame, self.closed, strict=True)
        ]
        weights = [1.0] * BLOCKS
        for _ in range(20):
            total = sum(weight * noise for weight, (_, noise) in zip(weights, blocks, strict=True))
            inverse = sum(weight * true_sq for weight, (true_sq, _) in zip(weights, blocks, strict=True)) / total
            residuals = [true_sq - inverse * noise for true_sq, noise in blocks]
            weights = _weights(residuals)
        squares = sum((weight * residual) ** 2 for weight, residual in zip(weights, residuals, strict=True))
        error = math.sqrt(squares * BLOCKS / (BLOCKS - 1)) / total
        low, high = inverse - STUDENT * error, inverse + STUDENT * error
        return (1 / high, 1 / low if low > 0 else math.inf) if high > 0 else None


def _weights(deviations: Sequence[float]) -> list[float]:
    """Return Huber's weights: 1 up to OUTLIER robust standard deviations, beyond that what keeps a block there."""
    limit = OUTLIER * 1.4826 * median(map(abs, deviations))  # 1.4826: of a normal distribution's deviation
    return [1.0 if abs(deviation) <= limit else limit / abs(deviation) for deviation in deviations]


@dataclass
class NoiseScale:
    """The smoothed noise scale of every norm layer, and pooled over them (sums of S and |G|^2 over the layers)."""

    half_life: float  # tokens
    pooled: Average = field(default_factory=Average)
    layers: dict[str, Average] = field(default_factory=dict)
    blocks: Blocks = field(init=False)  # of the pooled estimates

    def __post_init__(self) -> None:
        self.blocks = Blocks(WINDOW * self.half_life / BLOCKS)

    def update(self, sq_example: Mapping[str, float], sq_batch: Mapping[str, float], batch: int, tokens: int) -> None:
        """Take in one step of so many tokens: mean_b ||g_b||^2 and ||G||^2 by layer. A batch of 1 says nothing."""
        if batch < 2:
            return
        decay = 0.5 ** (tokens / self.half_life)
        for name in sq_example:
            estimates = estimate(sq_example[name], sq_batch[name], batch)
            self.layers.setdefault(name, Average()).add(*estimates, decay)
        pooled = estimate(sum(sq_example.values()), sum(sq_batch.values()), batch)
        self.pooled.add(*pooled, decay)
        self.blocks.add(*pooled, batch, tokens)

    def numbers(self) -> dict[str, float | None]:
        """Return what is logged of a step: the smoothed noise scale in examples, and the interval over the blocks, its
        ends None where they are unknown or infinite."""
        low, high = self.blocks.interval() or (None, None)
        above = high if high is not None and math.isfinite(high) else None
        return {"noise_scale": self.pooled.ratio, "noise_scale_low": low, "noise_scale_high": above}

    def state(self) -> dict[str, Any]:
        layers = {name: vars(average) for name, average in self.layers.items()}
        blocks = {key: value for key, value in vars(self.blocks).items() if key != "size"}
        return {"pooled": vars(self.pooled), "layers": layers, "blocks": blocks}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.pooled = Average(**state["pooled"])
        # checkpoints written before there were blocks have none
        self.blocks = Blocks(self.blocks.size, **state.get("blocks", {}))
        self.layers = {name: Average(**values) for name, values in state["layers"].items()}
