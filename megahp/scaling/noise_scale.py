"""The gradient noise scale from per-example gradient norms (Gray et al., arXiv 2411.00999; McCandlish et al.,
arXiv 1812.06162, appendix A).

With g_b the gradient of example b's own loss and G the gradient of the mean loss over B examples,
  |G|^2 = (B ||G||^2 - mean_b ||g_b||^2) / (B - 1)   and   S = (mean_b ||g_b||^2 - ||G||^2) / (1 - 1/B)
are unbiased for the squared norm of the true gradient and the trace of the per-example covariance. The noise scale is
S / |G|^2, in examples. The two are smoothed apart and only then divided, since a single |G|^2 may be near 0 or below:
the mean of single ratios is far off.

That is m = 1 of an estimate that any two sizes m < n allow, from the squared norms of the mean gradient over m examples
(averaged over such groups) and over n. Data parallelism has both: a rank's gradient, or a microbatch's, before it is
summed, and after.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

import numpy as np

Number = TypeVar("Number", float, np.ndarray)

# The constants are ours. With them, intervals hold in 90 to 97 % of synthetic runs (tests/scaling/test_noise_scale.py).
BLOCKS = 16
STUDENT = 2.1314  # the 97.5 % point of Student's t with BLOCKS - 1 degrees of freedom
OUTLIER = 3.5  # robust standard deviations beyond which a block counts no further
# Half-lives that the blocks span together: an exponential average has the variance of a mean over 2 / ln 2 = 2.9.
WINDOW = 3.0
# Relative standard error of NoiseScale.noise_to_total. Unverified: what we have measured lies between 1.3 and 2.
PRIOR_ERROR = 0.25
EXAMPLES = 16  # newest calibrations that count


def estimate(sq_small: Number, sq_batch: Number, batch: int, small: int = 1) -> tuple[Number, Number]:
    """Return unbiased (|G|^2, S) from the squared norms of mean gradients over `small` examples and over a batch of
    them, numbers or arrays. By default sq_small is mean_b ||g_b||^2. (McCandlish et al., equation A.2)

    Raises ValueError for batch <= small, which determines neither.
    """
    if batch <= small:
        raise ValueError(f"the noise scale needs a batch of at least {small + 1} examples")
    true_sq = (batch * sq_batch - small * sq_small) / (batch - small)
    return true_sq, (sq_small - sq_batch) / (1 / small - 1 / batch)


def step_efficiency(batch: float, noise_scale: float) -> float:
    """Return eta(B) / eta_max = 1 / (1 + B_noise / B), 1/2 at B = B_noise; both arguments in the same unit.

    It is the best step at a batch B > 0, and also the progress it makes, over those of an infinite batch, for SGD in
    the quadratic picture. (McCandlish et al., arXiv 1812.06162, section 2.2)
    """
    return 1 / (1 + noise_scale / batch)


@dataclass
class Average:
    """Average |G|^2 and S exponentially, with a half-life in tokens.

    Both start at 0 and so are small at first, by the same factor: their ratio is right from the first value on.
    """

    true_sq: float = 0.0
    noise: float = 0.0

    def add(self, true_sq: float, noise: float, decay: float) -> None:
        """Add one step's estimates; skip them if they are not finite."""
        if math.isfinite(true_sq) and math.isfinite(noise):
            self.true_sq = decay * self.true_sq + (1 - decay) * true_sq
            self.noise = decay * self.noise + (1 - decay) * noise

    @property
    def ratio(self) -> float | None:
        """Return the smoothed noise scale in examples; None where the averages do not make a positive number."""
        return self.noise / self.true_sq if self.true_sq > 0 and self.noise > 0 else None


@dataclass
class Blocks:
    """Estimate the noise scale, with an interval, over the newest BLOCKS blocks of steps: no single step decides.

    A block holds sums over its steps: `batch` of ||G||^2, `small` and `large` of the per-example squares, each weighted
    so that |G|^2 = batch - ratio x small and S = ratio x large - batch, by `estimate`. The ratio is that of the model's
    mean_b ||g_b||^2 to what was added in its place. A block keeps the ratio known when it was closed, because it
    drifts; blocks from before any was known take the first one.
    Over blocks, 1 / noise scale = r = sum |G|^2 / sum S. A block is weighted down until it is no longer an outlier, by
    its mean S (one wild example) and by its residual |G|^2 - r S (one wild batch).
    """

    size: float  # tokens of a block; the step that reaches it closes the block
    closed: list[list[float]] = field(default_factory=list)  # [batch, small, large, examples, ratio or 0], oldest first
    open: list[float] = field(default_factory=lambda: [0.0] * 4)
    tokens: int = 0  # of the open block

    def add(self, sq_example: float, sq_batch: float, batch: int, tokens: int, ratio: float = 1.0) -> None:
        """Add one step over a batch of at least 2; skip it if it is not finite.

        sq_example: mean_b ||g_b||^2 divided by `ratio` (0: not known yet). sq_batch: ||G||^2.
        """
        if not (math.isfinite(sq_example) and math.isfinite(sq_batch)):
            return
        weight = batch / (batch - 1)
        terms = batch * weight * sq_batch, weight * sq_example, batch * weight * sq_example, batch
        self.open = [total + term for total, term in zip(self.open, terms, strict=True)]
        self.tokens += tokens
        if self.tokens >= self.size:
            self.closed = [*self.closed, [*self.open, ratio]][-BLOCKS:]
            self.open, self.tokens = [0.0] * 4, 0

    def inverse(self, error: float = 0.0) -> tuple[float, float] | None:
        """Return 1 / noise scale and its standard error; None before BLOCKS blocks are full, or where no ratio is known
        or S is not positive. error: relative, of the ratios, which all share it."""
        first = next((ratio for *_, ratio in self.closed if ratio), 0.0)
        if len(self.closed) < BLOCKS or not first:
            return None
        scaled = [
            (batch, (ratio or first) * small, (ratio or first) * large, examples)
            for batch, small, large, examples, ratio in self.closed
        ]
        means = [(large - batch) / examples for batch, _, large, examples in scaled]
        middle = median(means)
        weights = huber_weights([mean - middle for mean in means])
        sums = [[weight * part for part in block] for weight, block in zip(weights, scaled, strict=True)]
        pairs = [(batch - small, large - batch) for batch, small, large, _ in sums]  # (|G|^2, S)
        if (noise := sum(noise for _, noise in pairs)) <= 0:
            return None
        inverse, scatter = ratio_of_sums(pairs)
        # d (1 / noise scale) / d log ratio: the ratios' error, since it is shared, does not average out over blocks
        slope = sum(small + inverse * large for _, small, large, _ in sums) / noise
        return inverse, math.hypot(scatter, error * slope)


def interval(inverse: float, error: float) -> tuple[float, float, float] | None:
    """Return the noise scale between the ends of its 95 % interval, infinite where |G|^2 may be 0; None where the data
    allow no positive number.

    The interval is Student's, of the inverse, whose denominator, sum S, is not near 0: so it holds the noise scale
    however uncertain |G|^2 is.
    """
    low, high = inverse - STUDENT * error, inverse + STUDENT * error
    if high <= 0:
        return None
    return 1 / high, 1 / inverse if inverse > 0 else math.inf, 1 / low if low > 0 else math.inf


def ratio_of_sums(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return sum a / sum b over the pairs (a, b), and its standard error, a pair weighted down until its residual
    a - ratio b is no longer an outlier (Huber's estimate, by iteration; the error is that of a ratio of means, Cochran,
    Sampling Techniques, section 6.4).

    Sums are Python's own: every rank computes this, and numpy's differ in the last bit between kinds of CPU.
    """
    weights = [1.0] * len(pairs)
    for _ in range(20):
        below = sum(weight * b for weight, (_, b) in zip(weights, pairs, strict=True))
        ratio = sum(weight * a for weight, (a, _) in zip(weights, pairs, strict=True)) / below
        residuals = [a - ratio * b for a, b in pairs]
        weights = huber_weights(residuals)
    squares = sum((weight * residual) ** 2 for weight, residual in zip(weights, residuals, strict=True))
    return ratio, math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / below


def huber_weights(deviations: Sequence[float]) -> list[float]:
    """Return weights that bring outliers back to OUTLIER robust standard deviations, and leave the others at 1."""
    # the median of a normal distribution's absolute deviations is its standard deviation / 1.4826
    limit = OUTLIER * 1.4826 * median(map(abs, deviations))
    return [1.0 if abs(deviation) <= limit else limit / abs(deviation) for deviation in deviations]


def present_ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the ratio of sums extrapolated to the newest pair, and the relative standard error of that of all pairs.

    The ratio drifts as a model learns, by half within a third of a run. The newer half of the pairs has the ratio at
    three quarters of the way; the halves lie two quarters apart, so the square root of their quotient is the missing
    quarter's drift. Extrapolating doubles the error of one ratio. Each block takes the ratio of its own time, so that
    over all blocks the error of the mean remains, which is the one returned.
    """
    half = len(pairs) // 2
    (old, _), (new, _), (mean, error) = map(ratio_of_sums, (pairs[:half], pairs[half:], pairs))
    return new * math.sqrt(new / old), error / mean


@dataclass
class NoiseScale:
    """Track the noise scale of every norm layer, pooled over them (sums of S and |G|^2), and of the whole model.

    Every step measures the per-example squares of the norm layers, and the whole model's ||G||^2; the whole model's
    per-example squares are measured of one example now and then (`calibrate`). Their ratio to the norm layers' of the
    same examples scales those of every step up to the whole model's. Beside that stands the prior, `noise_to_total`
    times the norm layers' noise scale; the two are averaged by their precision.
    """

    half_life: float  # tokens
    # Gray et al.'s slope, for a model of 111 M without its embeddings; from secondary sources, unverified
    noise_to_total: float = 1.4
    pooled: Average = field(default_factory=Average)
    layers: dict[str, Average] = field(default_factory=dict)
    norms: Blocks = field(init=False)
    model: Blocks = field(init=False)  # the model's ||G||^2, and the norm layers' per-example squares
    examples: list[tuple[float, float]] = field(default_factory=list)  # ||g_b||^2 of the model and of its norm layers
    ratio: tuple[float, float] | None = field(init=False, default=None)  # of the two, at present; its relative error

    def __post_init__(self) -> None:
        self.norms, self.model = (Blocks(WINDOW * self.half_life / BLOCKS) for _ in range(2))

    def update(
        self, sq_example: Mapping[str, float], sq_batch: Mapping[str, float], grad_norm: float, batch: int, tokens: int
    ) -> None:
        """Add one step: mean_b ||g_b||^2 and ||G||^2 by norm layer, the whole model's ||G||, the batch in examples and
        tokens. A batch of 1 determines nothing."""
        if batch < 2 or not sq_example:
            return
        decay = 0.5 ** (tokens / self.half_life)
        for name in sq_example:
            estimates = estimate(sq_example[name], sq_batch[name], batch)
            self.layers.setdefault(name, Average()).add(*estimates, decay)
        pooled = sum(sq_example.values()), sum(sq_batch.values())
        self.pooled.add(*estimate(*pooled, batch), decay)
        self.norms.add(*pooled, batch, tokens)
        self.model.add(pooled[0], grad_norm**2, batch, tokens, self.ratio[0] if self.ratio else 0.0)

    def calibrate(self, model: float, norms: float) -> None:
        """Add ||g_b||^2 of one example, of the whole model and of its norm layers together."""
        if 0 < model < math.inf and 0 < norms < math.inf:
            self._set_examples([*self.examples, (model, norms)][-EXAMPLES:])

    def numbers(self) -> dict[str, float | None]:
        """Return what is logged of a step.

        In examples, None where unknown or infinite: the norm layers' smoothed noise scale, the whole model's, and the
        ends of its interval. And `noise_to_total` as measured: the whole model's over the norm layers'.
        """
        smoothed, norms = self.pooled.ratio, self.norms.inverse()
        total, measured = smoothed and self.noise_to_total * smoothed, None
        estimates = []  # of the whole model's 1 / noise scale, and their standard errors
        if norms:
            inverse, error = norms[0] / self.noise_to_total, norms[1] / self.noise_to_total
            estimates.append((inverse, math.hypot(error, PRIOR_ERROR * inverse)))
        if self.ratio and (model := self.model.inverse(self.ratio[1])):
            estimates.append(model)
            measured = norms[0] / model[0] if norms and model[0] > 0 else None
        ends = None
        if estimates:
            precisions = [1 / max(error, 1e-150) ** 2 for _, error in estimates]  # an error of 0 must not divide by 0
            weighted = sum(weight * inverse for weight, (inverse, _) in zip(precisions, estimates, strict=True))
            ends = interval(weighted / sum(precisions), 1 / math.sqrt(sum(precisions)))
        if ends and len(estimates) == 2:
            total = ends[1]
        low, _, high = ends or (None, None, None)
        return {
            "noise_scale": smoothed,
            "noise_scale_total": total if total is not None and math.isfinite(total) else None,
            "noise_scale_total_low": low,
            "noise_scale_total_high": high if high is not None and math.isfinite(high) else None,
            "noise_to_total": measured,
        }

    def state(self) -> dict[str, Any]:
        layers = {name: vars(average) for name, average in self.layers.items()}
        blocks = {of: {k: v for k, v in vars(getattr(self, of)).items() if k != "size"} for of in ("norms", "model")}
        return {"pooled": vars(self.pooled), "layers": layers, **blocks, "examples": self.examples}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.pooled = Average(**state["pooled"])
        self.layers = {name: Average(**values) for name, values in state["layers"].items()}
        # checkpoints of versions before there were blocks have none
        self.norms, self.model = (Blocks(self.norms.size, **state.get(of, {})) for of in ("norms", "model"))
        self._set_examples([(model, norms) for model, norms in state.get("examples", ())])

    def _set_examples(self, examples: list[tuple[float, float]]) -> None:
        self.examples = examples
        self.ratio = present_ratio(examples) if len(examples) == EXAMPLES else None
