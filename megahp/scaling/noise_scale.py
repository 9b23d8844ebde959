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
PRIOR_ERROR = 0.25  # relative standard error of NoiseScale.noise_to_total; ours, unverified, see docs/batch.md
EXAMPLES = 16  # newest single gradients that say what the whole model has for each unit of the norm layers


@dataclass
class Blocks:
    """The noise scale over the newest BLOCKS blocks of steps, with an interval, so that no single step decides.

    A block holds sums over its steps, from which `estimate`, weighted by examples, is linear in the ratio of mean_b
    ||g_b||^2 to what was added in its place: |G|^2 = batch - ratio x small and S = ratio x large - batch. A block keeps
    the ratio that was known when it was full, since that drifts; those before any was known take the first. Over
    blocks, 1 / noise scale = r = sum |G|^2 / sum S. A block is weighted down until it no longer stands out, by its mean
    S (one wild example) and by its residual |G|^2 - r S (one wild batch).
    """

    size: float  # tokens of a block; a step that has more is a block of its own
    closed: list[list[float]] = field(default_factory=list)  # [batch, small, large, examples, ratio or 0], oldest first
    open: list[float] = field(default_factory=lambda: [0.0] * 4)
    tokens: int = 0  # of the open block

    def add(self, sq_example: float, sq_batch: float, batch: int, tokens: int, ratio: float = 1.0) -> None:
        """Add one step's mean_b ||g_b||^2, or what it is `ratio` times (0 = unknown), and ||G||^2 over a batch of at
        least 2; skip them if they are not finite."""
        if not (math.isfinite(sq_example) and math.isfinite(sq_batch)):
            return
        weight = batch / (batch - 1)
        parts = batch * weight * sq_batch, weight * sq_example, batch * weight * sq_example, batch
        self.open = [before + part for before, part in zip(self.open, parts, strict=True)]
        self.tokens += tokens
        if self.tokens >= self.size:
            self.closed = [*self.closed, [*self.open, ratio]][-BLOCKS:]
            self.open, self.tokens = [0.0] * 4, 0

    def inverse(self, error: float = 0.0) -> tuple[float, float] | None:
        """Return 1 / noise scale and its standard error; None before BLOCKS blocks are full, or where no ratio is known
        or S is not positive. error: of the ratios, relative; they share it."""
        first = next((ratio for *_, ratio in self.closed if ratio), 0.0)
        if len(self.closed) < BLOCKS or not first:
            return None
        scaled = [
            (batch, (ratio or first) * small, (ratio or first) * large, examples)
            for batch, small, large, examples, ratio in self.closed
        ]
        means = [(large - batch) / examples for batch, _, large, examples in scaled]
        middle = median(means)
        weights = _weights([mean - middle for mean in means])
        sums = [[weight * part for part in block] for weight, block in zip(weights, scaled, strict=True)]
        pairs = [(batch - small, large - batch) for batch, small, large, _ in sums]
        if (noise := sum(noise for _, noise in pairs)) <= 0:
            return None
        inverse, own = ratio_of_sums(pairs)
        moves = sum(small + inverse * large for _, small, large, _ in sums) / noise  # of the inverse by the ratios
        return inverse, math.hypot(own, error * moves)


def interval(inverse: float, error: float) -> tuple[float, float, float] | None:
    """Return the noise scale between the ends of its 95 % interval, infinite where |G|^2 may be 0; None where the data
    allow no positive number. It is Student's of the inverse, and so holds the noise scale however unsure |G|^2 is."""
    low, high = inverse - STUDENT * error, inverse + STUDENT * error
    if high <= 0:
        return None
    return 1 / high, 1 / inverse if inverse > 0 else math.inf, 1 / low if low > 0 else math.inf


def ratio_of_sums(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return sum a / sum b over the pairs (a, b), and its standard error, a pair weighted down until its residual
    a - ratio b no longer stands out (Huber's estimate; the error is that of a ratio of means, Cochran, Sampling
    Techniques, section 6.4).

    Sums are Python's own: every rank computes this, and numpy's differ in the last bit between kinds of CPU.
    """
    weights = [1.0] * len(pairs)
    for _ in range(20):
        below = sum(weight * b for weight, (_, b) in zip(weights, pairs, strict=True))
        ratio = sum(weight * a for weight, (a, _) in zip(weights, pairs, strict=True)) / below
        residuals = [a - ratio * b for a, b in pairs]
        weights = _weights(residuals)
    squares = sum((weight * residual) ** 2 for weight, residual in zip(weights, residuals, strict=True))
    return ratio, math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / below


def ratio_now(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the ratio of sums after the newest of the pairs, and the relative standard error of that of all.

    The ratio drifts as a model learns, by half within a third of a run: that of the newer half of pairs lags by a
    quarter of them, and the halves differ by two quarters' drift. This makes it unsure by twice the error of the mean;
    but each block takes the ratio of its time, and over them the error of the mean is what remains.
    """
    half = len(pairs) // 2
    (old, _), (new, _), (mean, error) = map(ratio_of_sums, (pairs[:half], pairs[half:], pairs))
    return new * math.sqrt(new / old), error / mean


def _weights(deviations: Sequence[float]) -> list[float]:
    """Return Huber's weights: 1 up to OUTLIER robust standard deviations, beyond that what keeps a block there."""
    limit = OUTLIER * 1.4826 * median(map(abs, deviations))  # 1.4826: of a normal distribution's deviation
    return [1.0 if abs(deviation) <= limit else limit / abs(deviation) for deviation in deviations]


@dataclass
class NoiseScale:
    """The noise scale of every norm layer, pooled over them (sums of S and |G|^2 over the layers), and of the whole
    model.

    The norm layers' per-example squares are known of every step, the whole model's ||G||^2 too; of its per-example
    squares only now and then one (`calibrate`). Their ratio to the norm layers' of the same examples makes of the
    latter what the whole model's are. Beside that stands the prior, `noise_to_total` times the norm layers' noise
    scale; the two are averaged by what they are sure of.
    """

    half_life: float  # tokens
    noise_to_total: float = 1.4
    pooled: Average = field(default_factory=Average)
    layers: dict[str, Average] = field(default_factory=dict)
    norms: Blocks = field(init=False)
    model: Blocks = field(init=False)  # its own ||G||^2, and the norm layers' per-example squares
    examples: list[tuple[float, float]] = field(default_factory=list)  # ||g_b||^2 of the model and of its norm layers
    ratio: tuple[float, float] | None = field(init=False, default=None)  # of the two now, and its relative error

    def __post_init__(self) -> None:
        self.norms, self.model = (Blocks(WINDOW * self.half_life / BLOCKS) for _ in range(2))

    def update(
        self, sq_example: Mapping[str, float], sq_batch: Mapping[str, float], grad_norm: float, batch: int, tokens: int
    ) -> None:
        """Take in one step of so many tokens: mean_b ||g_b||^2 and ||G||^2 by norm layer, and the whole model's ||G||.
        A batch of 1 says nothing."""
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
        """Take in ||g_b||^2 of one example, of the whole model and of its norm layers together."""
        if 0 < model < math.inf and 0 < norms < math.inf:
            self._know([*self.examples, (model, norms)][-EXAMPLES:])

    def numbers(self) -> dict[str, float | None]:
        """Return what is logged of a step, in examples: the norm layers' smoothed noise scale, and the whole model's
        between the ends of its interval, None where unknown or infinite; and how many times the norm layers' it is by
        what was measured of both."""
        smoothed, norms, known = self.pooled.ratio, self.norms.inverse(), []
        total, measured = smoothed and self.noise_to_total * smoothed, None
        if norms:
            inverse, error = norms[0] / self.noise_to_total, norms[1] / self.noise_to_total
            known.append((inverse, math.hypot(error, PRIOR_ERROR * inverse)))
        if self.ratio and (model := self.model.inverse(self.ratio[1])):
            known.append(model)
            measured = norms[0] / model[0] if norms and model[0] > 0 else None
        ends = interval(*_average(known)) if known else None
        if ends and len(known) == 2:
            total = ends[1]
        low, _, high = ends or (None, None, None)
        return {
            "noise_scale": smoothed,
            "noise_scale_total": _finite(total),
            "noise_scale_total_low": low,
            "noise_scale_total_high": _finite(high),
            "noise_to_total": measured,
        }

    def state(self) -> dict[str, Any]:
        layers = {name: vars(average) for name, average in self.layers.items()}
        blocks = {of: {k: v for k, v in vars(getattr(self, of)).items() if k != "size"} for of in ("norms", "model")}
        return {"pooled": vars(self.pooled), "layers": layers, **blocks, "examples": self.examples}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.pooled = Average(**state["pooled"])
        self.layers = {name: Average(**values) for name, values in state["layers"].items()}
        # checkpoints written before there were blocks have none
        self.norms, self.model = (Blocks(self.norms.size, **state.get(of, {})) for of in ("norms", "model"))
        self._know([(model, norms) for model, norms in state.get("examples", ())])

    def _know(self, examples: list[tuple[float, float]]) -> None:
        self.examples = examples
        self.ratio = ratio_now(examples) if len(examples) == EXAMPLES else None


def _average(estimates: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the mean of (estimate, standard error) pairs weighted by their precision, and its standard error."""
    weights = [1 / max(error, 1e-150) ** 2 for _, error in estimates]
    mean = sum(weight * each for weight, (each, _) in zip(weights, estimates, strict=True)) / sum(weights)
    return mean, 1 / math.sqrt(sum(weights))


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
