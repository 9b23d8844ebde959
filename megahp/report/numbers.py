"""The numbers of a report, the health checks, and the curves behind the figures."""

import re
from collections.abc import Sequence

import numpy as np

from megahp.log.metrics import LoggedRun
from megahp.log.progress import human_count, human_duration
from megahp.scaling.noise_scale import step_efficiency
from megahp.scaling.schedules import dual_coefficients

KNOWLEDGE = {"unigram": "how often each token occurs", "bigram": "which token follows which"}  # of each baseline


def summary(run: LoggedRun) -> dict[str, str]:
    """Return the summary table of a run: label to value, "" if unknown."""
    loss, validation = final(run, "loss"), last(run, "validation_loss")
    best = loss if validation is None else validation
    ends = [each for event in run.events if isinstance(each := event.get("epochs"), dict)]
    epochs = [f"{source} {read:.3g}" for source, read in (ends or [{}])[-1].items() if isinstance(read, float)]
    seconds, speeds, rates = training_seconds(run), finite(run, "tokens_per_second"), finite(run, "lr")
    return {
        "Final loss": "" if loss is None else f"{loss:.4f}",
        "Validation loss": "" if validation is None else f"{validation:.4f}",
        "Unigram baseline": compared(run.baselines.get("unigram"), best),
        "Bigram baseline": compared(run.baselines.get("bigram"), best),
        "Tokens": f"{run.column('tokens')[-1]:,.0f}",
        "Epochs": ", ".join(epochs),
        "Steps": f"{run.column('step')[-1]:,.0f}",
        "Steps skipped": f"{skipped(run).sum():,}",
        "Training time": human_duration(seconds) if seconds else "",
        "Tokens per second": human_count(float(np.median(speeds))) if len(speeds) else "",
        "Peak learning rate": f"{rates.max():.3g}" if len(rates) else "",
        "Global batch": first_to_last(run, "global_batch"),
        "Serial steps saved": steps_saved(run),
        "Training time saved": time_saved(run),
        "Gradient noise scale": first_to_last(run, "noise_scale_total"),
    }


def health(run: LoggedRun) -> list[tuple[bool, str]]:
    """Return the health checks of a run, as (passed, sentence), for everything that its log can answer."""
    checks = [_loss_check(run)]
    losses = finite(run, "loss")
    if len(losses) >= 2:
        # Means over twentieths of the run: single steps are noise.
        levels = [part.mean() for part in np.array_split(losses, min(20, len(losses)))]
        rise = levels[-1] - min(levels)
        if rise < 0.1:
            checks.append((True, "Loss ends within 0.1 nats of its lowest level."))
        else:
            checks.append((False, f"Loss ends {rise:.2f} nats above its lowest level: look for a spike or a jump."))

    missing = int(skipped(run).sum())
    if missing:
        steps = len(run.column("step"))
        checks.append((False, f"{missing:,} of {steps:,} logged steps were skipped: gradient not finite."))
    else:
        checks.append((True, "Every gradient was finite; no step was skipped."))

    batch, noise = last(run, "global_batch"), last(run, "noise_scale_total")
    if batch is not None and noise is not None and noise > 0:
        share = 100 * step_efficiency(batch, noise)
        text = (
            f"Global batch is {batch / noise:.2f} times the whole model's noise scale: in a quadratic model of SGD, "
            f"a step makes {share:.0f} % of the progress that an infinite batch would make"
        )
        excess = ", but averages more examples than the gradient needs"
        checks.append((batch <= noise, f"{text}{excess if batch > noise else ''}."))

    speed = run.column("tokens_per_second")
    tail = speed[-max(1, len(speed) // 10) :]
    if np.isfinite(tail).any():
        ratio = np.nanmedian(tail) / np.nanmedian(speed)
        text = "Throughput is steady." if ratio > 0.8 else f"Throughput fell to {100 * ratio:.0f} % of its median."
        checks.append((bool(ratio > 0.8), text))
    return checks


def _loss_check(run: LoggedRun) -> tuple[bool, str]:
    """Check that the model learned more than counting tokens would; without baselines, that the loss fell."""
    losses = [loss for loss in (final(run, "loss"), last(run, "validation_loss")) if loss is not None]
    if final(run, "loss") is None:
        return False, "No step has a finite loss."
    loss = max(losses)  # the last validation may be from before a divergence
    levels = [(kind, level) for kind in KNOWLEDGE if (level := run.baselines.get(kind)) is not None]
    for kind, level in levels:
        if loss >= level:
            gap = f"Loss is {loss - level:.2f} nats above the {kind} baseline"
            return False, f"{gap}: the model has not learned {KNOWLEDGE[kind]}."
    if levels:
        kind, level = levels[-1]
        return True, f"Loss is {level - loss:.2f} nats below the {kind} baseline."
    first = finite(run, "loss")[0]
    return bool(loss <= first), f"Loss went from {first:.2f} to {loss:.2f}."


def last(run: LoggedRun, key: str) -> float | None:
    """Return the newest number under a key, or None."""
    values = finite(run, key)
    return float(values[-1]) if len(values) else None


def final(run: LoggedRun, key: str) -> float | None:
    """Return the mean of the last 5 % of the steps that have a number, or None: one step alone is noise."""
    values = finite(run, key)
    return float(values[-max(1, len(run.column(key)) // 20) :].mean()) if len(values) else None


def finite(run: LoggedRun, key: str) -> np.ndarray:
    """Return all finite numbers under a key."""
    values = run.column(key)
    return values[np.isfinite(values)]


def recorded(runs: Sequence[LoggedRun], *keys: str) -> bool:
    """Return whether any step of any run has a number under one of the keys."""
    return any(len(finite(run, key)) for run in runs for key in keys)


def skipped(run: LoggedRun) -> np.ndarray:
    """Return which of the logged steps were skipped, bool [steps]."""
    return np.nan_to_num(run.column("skipped")) != 0


def training_seconds(run: LoggedRun) -> float:
    """Return the seconds spent in steps, without pauses between sessions; unlogged ones count like the next logged."""
    return float(np.nansum(steps_taken(run) * run.column("step_seconds")))


def run_start(run: LoggedRun) -> tuple[int, int]:
    """Return (step, tokens) at which the run began: 0, or those of the checkpoint it branched from."""
    branched = (event for event in run.events if event["event"] == "branched")
    return next(((event["step"], event["tokens"]) for event in branched), (0, 0))


def steps_taken(run: LoggedRun) -> np.ndarray:
    """Return how many steps each record stands for, [steps]: its own and the unlogged ones since the record before."""
    return np.diff(run.column("step"), prepend=run_start(run)[0])


def token_bounds(run: LoggedRun) -> np.ndarray:
    """Return the tokens between which each record's steps lie, [steps + 1]."""
    return np.append(run_start(run)[1], run.column("tokens"))


def tokens_per_step(run: LoggedRun) -> np.ndarray:
    """Return the mean tokens per step of each record, [steps]; NaN if the log does not tell."""
    steps, tokens = steps_taken(run), np.diff(token_bounds(run))
    return np.divide(tokens, steps, out=np.full(len(steps), np.nan), where=steps > 0)


def update_shares(run: LoggedRun) -> tuple[float, np.ndarray]:
    """Return the final weights as an average: the share of the initial weights, and of each record's updates, [steps].

    AdamW in its dual form (`dual_coefficients`), with the logged learning rate and weight decay for all steps that a
    record stands for; a step that was skipped, or has no logged rate, made no update.
    """
    # A step of weight decay w <- (1 - alpha) w + alpha x replaces the share alpha of the average.
    alpha = np.nan_to_num(run.column("lr") * run.column("weight_decay"))
    replaced = 1 - (1 - alpha) ** (steps_taken(run) - skipped(run))
    return dual_coefficients(replaced, np.ones(len(replaced)))


def update_density(run: LoggedRun) -> np.ndarray:
    """Return each record's share in the weights over its share of the tokens, [steps]; 1 in an even average."""
    tokens, (_, shares) = token_bounds(run), update_shares(run)
    return shares * (tokens[-1] - tokens[0]) / np.diff(tokens)


def newest_half(run: LoggedRun, shares: np.ndarray) -> float:
    """Return the newest fraction of the run's tokens whose updates make up half of all `shares` in the weights."""
    tokens = token_bounds(run)
    older = np.append(0, np.cumsum(shares))
    return float((tokens[-1] - np.interp(older[-1] / 2, older, tokens)) / (tokens[-1] - tokens[0]))


def has_weight_decay(run: LoggedRun) -> bool:
    """Return whether weights decayed; otherwise they are a sum of updates, not an average."""
    return bool((run.column("lr") * run.column("weight_decay") > 0).any())


def compared(baseline: float | None, loss: float | None) -> str:
    """Return a baseline as text, with the loss relative to it; "" if there is none."""
    if loss is None or baseline is None:
        return "" if baseline is None else f"{baseline:.4f}"
    return f"{baseline:.4f} ({abs(loss - baseline):.4f} {'below' if loss <= baseline else 'above'})"


def first_to_last(run: LoggedRun, key: str) -> str:
    """Return the first and last number under a key, in sequences, and their steps; only one if they look the same."""
    steps, values = run.column("step"), run.column(key)
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return ""
    first, last = (human_count(values[i]) for i in known[[0, -1]])
    if first == last:
        return f"{first} sequences"
    return f"{first} sequences at step {steps[known[0]]:,.0f}, {last} at step {steps[known[-1]]:,.0f}"


def steps_saved(run: LoggedRun) -> str:
    """Return the steps saved by growth, as a share of those at the initial batch; "" if the batch did not grow."""
    batch, tokens = tokens_per_step(run), token_bounds(run)
    if not batch[-1] > 1.001 * batch[0]:  # also if either is NaN
        return ""
    constant, steps = (tokens[-1] - tokens[0]) / batch[0], steps_taken(run).sum()
    return f"{1 - steps / constant:.0%} of {constant:,.0f} steps at the initial batch"


def time_saved(run: LoggedRun) -> str:
    """Return the training time saved by growth, through larger steps or more ranks; "" if the batch did not grow.

    It is a share of the time for all tokens at the speed of the initial batch; below 0 if growth cost time.
    """
    batch, tokens, seconds = tokens_per_step(run), token_bounds(run), training_seconds(run)
    # The speed at the initial batch is that of this run's own steps before the first growth.
    speeds = run.column("tokens_per_second")[batch <= 1.001 * batch[0]]
    if not batch[-1] > 1.001 * batch[0] or not np.isfinite(speeds).any():
        return ""
    constant = (tokens[-1] - tokens[0]) / np.nanmedian(speeds)
    return f"{1 - seconds / constant:.0%} of {human_duration(constant)} at the initial batch's speed"


def trend(x: np.ndarray, y: np.ndarray, points: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Return the trend of y: its mean over 2 % of the run around each point, of at most `points` for a long run."""
    if len(x) > points:  # average short stretches first: the cost of smoothing grows as the square of the steps
        begins, known = np.linspace(0, len(x), points, endpoint=False).astype(int), np.isfinite(y)
        x = np.add.reduceat(x, begins) / np.diff(begins, append=len(x))
        total, count = (np.add.reduceat(each.astype(float), begins) for each in (np.where(known, y, 0), known))
        y = np.divide(total, count, out=np.full(points, np.nan), where=count > 0)
    return x, smooth(y, max(1, len(x) // 50))


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred mean over `window` points, the nearer weighted more; NaN is ignored, and stays NaN."""
    known = np.isfinite(values)
    weights = np.hanning(window + 2)[1:-1]
    total = np.convolve(np.where(known, values, 0.0), weights, mode="same")
    count = np.convolve(known, weights, mode="same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=known)


def thin(x: np.ndarray, y: np.ndarray, buckets: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Return at most 2 * buckets + 2 of the points: the lowest and highest of every bucket, so that spikes stay."""
    if len(x) <= 2 * buckets:
        return x, y
    edges = np.linspace(0, len(x), buckets + 1).astype(int)
    spans = list(zip(edges[:-1], edges[1:], strict=True))
    low, high = np.where(np.isnan(y), np.inf, y), np.where(np.isnan(y), -np.inf, y)
    lowest = [start + np.argmin(low[start:stop]) for start, stop in spans]
    highest = [start + np.argmax(high[start:stop]) for start, stop in spans]
    kept = np.unique([0, *lowest, *highest, len(x) - 1])
    return x[kept], y[kept]


def layer_points(run: LoggedRun) -> list[tuple[str, int, float]]:
    """Return (kind, depth, examples) of the newest noise scales; `layers.3.norm` is of kind `layers.*.norm`.

    A layer without a number in its name, such as the final norm, is drawn one deeper than the layer before it.
    """
    points, depth = [], -1
    for name, value in run.layers.items():
        number = re.search(r"\d+", name)
        depth = int(number[0]) if number else depth + 1
        if value is not None:
            points.append((re.sub(r"\d+", "*", name), depth, value))
    return points


def layer_kinds(runs: Sequence[LoggedRun]) -> list[str]:
    """Return the kinds of norm layers in `layer_points`, in the order of `MARKERS`."""
    return list(dict.fromkeys(kind for run in runs for kind, _, _ in layer_points(run)))
