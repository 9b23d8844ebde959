"""What a report says about a run: its numbers, and whether they look healthy."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from megahp.log.metrics import LoggedRun
from megahp.log.progress import human_count, human_duration
from megahp.scaling.noise_scale import step_efficiency
from megahp.scaling.schedules import dual_coefficients


def summary(run: LoggedRun) -> dict[str, str]:
    """What the table on top says of a run: label to value, "" where it is not known."""
    loss, validation = final(run, "loss"), last(run, "validation_loss")
    best = loss if validation is None else validation
    seconds = training_seconds(run)
    return {
        "Final loss": shown(loss),
        "Validation loss": shown(validation),
        "Unigram baseline": against(best, run.baselines.get("unigram")),
        "Bigram baseline": against(best, run.baselines.get("bigram")),
        "Tokens": f"{run.column('tokens')[-1]:,.0f}",
        "Steps": f"{run.column('step')[-1]:,.0f}",
        "Steps skipped": f"{skipped(run):,}",
        "Training time": human_duration(seconds) if seconds else "",
        "Tokens per second": shown(over(run, "tokens_per_second", np.nanmedian), human_count),
        "Peak learning rate": shown(over(run, "lr", np.nanmax), "{:.3g}".format),
        "Global batch": change(run, "global_batch", "sequences"),
        "Serial steps saved": steps_saved(run),
        "Training time saved": time_saved(run),
        "Gradient noise scale": change(run, "noise_scale_total", "sequences"),
    }


def health(run: LoggedRun) -> list[tuple[bool, str]]:
    """What a glance should tell: (all is well, a sentence) for every question the run can answer."""
    questions = (loss_check, stability_check, skipped_check, batch_check, throughput_check)
    return [answer for question in questions if (answer := question(run)) is not None]


def loss_check(run: LoggedRun) -> tuple[bool, str] | None:
    """Has the model learned more than counting would?"""
    losses = [loss for loss in (final(run, "loss"), last(run, "validation_loss")) if loss is not None]
    if not losses:
        return False, "No step has a finite loss."
    loss = max(losses)  # the last validation may be from before a divergence
    lessons = {"unigram": "how often each token occurs", "bigram": "which token follows which"}
    levels = [(kind, level) for kind in lessons if (level := run.baselines.get(kind)) is not None]
    for kind, level in levels:
        if loss >= level:
            gap = f"Loss is {loss - level:.2f} nats above the {kind} baseline"
            return False, f"{gap}: the model knows less than {lessons[kind]}."
    if levels:
        kind, level = levels[-1]
        return True, f"Loss is {level - loss:.2f} nats below the {kind} baseline."
    first = finite(run, "loss")[0]
    return loss <= first, f"Loss went from {first:.2f} to {loss:.2f}."


def stability_check(run: LoggedRun) -> tuple[bool, str] | None:
    """Has the loss come back from every spike?"""
    losses = finite(run, "loss")
    if len(losses) < 2:
        return None
    course = [part.mean() for part in np.array_split(losses, min(20, len(losses)))]  # single steps are noise
    risen = course[-1] - min(course)
    if risen < 0.1:
        return True, "Loss ends within 0.1 nats of its lowest level."
    return False, f"Loss ends {risen:.2f} nats above its lowest level: look for a spike or a jump."


def skipped_check(run: LoggedRun) -> tuple[bool, str] | None:
    """Was every gradient finite?"""
    number = skipped(run)
    if number == 0:
        return True, "Every gradient was finite; no step was skipped."
    return False, f"{number:,} of {len(missed(run)):,} logged steps were skipped: gradient not finite."


def batch_check(run: LoggedRun) -> tuple[bool, str] | None:
    """Does the batch average more examples than the gradient needs?"""
    batch, noise = last(run, "global_batch"), last(run, "noise_scale_total")
    if batch is None or noise is None or noise <= 0:
        return None
    share = 100 * step_efficiency(batch, noise)
    text = (
        f"Global batch is {batch / noise:.2f} times the whole model's noise scale: in SGD's quadratic picture "
        f"a step makes {share:.0f} % of the progress an infinite batch would"
    )
    if batch <= noise:
        return True, text + "."
    return False, text + ", from more examples than the gradient needs."


def throughput_check(run: LoggedRun) -> tuple[bool, str] | None:
    """Has the run slowed down?"""
    speed = run.column("tokens_per_second")
    tail = speed[-max(1, len(speed) // 10) :]
    if not np.isfinite(tail).any():
        return None
    ratio = np.nanmedian(tail) / np.nanmedian(speed)
    if ratio > 0.8:
        return True, "Throughput is steady."
    return False, f"Throughput has fallen to {100 * ratio:.0f} % of its median."


def last(run: LoggedRun, key: str) -> float | None:
    """The newest number under a key, or None."""
    values = finite(run, key)
    return float(values[-1]) if len(values) else None


def final(run: LoggedRun, key: str) -> float | None:
    """Mean of the last 5 % of the steps that have a number: one step alone is noise."""
    values = finite(run, key)
    return float(values[-max(1, len(run.column(key)) // 20) :].mean()) if len(values) else None


def over(run: LoggedRun, key: str, statistic: Callable[[np.ndarray], float]) -> float | None:
    """A statistic of all numbers under a key, or None."""
    return float(statistic(run.column(key))) if known([run], key) else None


def finite(run: LoggedRun, key: str) -> np.ndarray:
    """All finite numbers under a key."""
    values = run.column(key)
    return values[np.isfinite(values)]


def skipped(run: LoggedRun) -> int:
    """How many of the logged steps were not taken."""
    return int(missed(run).sum())


def missed(run: LoggedRun) -> np.ndarray:
    """Which of the logged steps were not taken, [steps]."""
    return np.nan_to_num(run.column("skipped")) != 0


def training_seconds(run: LoggedRun) -> float:
    """Seconds in steps, unlogged ones counted like the next logged one, pauses between sessions not."""
    return float(np.nansum(steps_taken(run) * run.column("step_seconds")))


def beginning(run: LoggedRun) -> tuple[int, int]:
    """(step, tokens) where the run began: 0, or where another run's checkpoint stood."""
    branched = (event for event in run.events if event["event"] == "branched")
    return next(((event["step"], event["tokens"]) for event in branched), (0, 0))


def steps_taken(run: LoggedRun) -> np.ndarray:
    """How many steps each record stands for, [steps]: its own and the unlogged ones since the record before."""
    return np.diff(run.column("step"), prepend=beginning(run)[0])


def token_bounds(run: LoggedRun) -> np.ndarray:
    """Between which tokens each record's steps lie, [steps + 1]."""
    return np.append(beginning(run)[1], run.column("tokens"))


def update_shares(run: LoggedRun) -> tuple[float, np.ndarray]:
    """The weights at the end as an average: the share of those at the beginning, and of each record's updates, [steps].

    AdamW in its dual form (`dual_coefficients`), with the logged learning rate and weight decay for all steps that a
    record stands for; a step that was skipped, or whose rate is unknown, made no update.
    """
    alpha = np.nan_to_num(run.column("lr") * run.column("weight_decay"))
    replaced = 1 - (1 - alpha) ** (steps_taken(run) - missed(run))
    return dual_coefficients(replaced, np.ones(len(replaced)))


def update_density(run: LoggedRun) -> np.ndarray:
    """Share in the weights over share of the run's tokens, [steps]: 1 throughout in an even average of all updates."""
    tokens, (_, shares) = token_bounds(run), update_shares(run)
    return shares * (tokens[-1] - tokens[0]) / np.diff(tokens)


def newest_half(run: LoggedRun, shares: np.ndarray) -> float:
    """The share of the run's tokens, the newest ones, whose updates are half of all `shares` in the weights."""
    tokens = token_bounds(run)
    older = np.append(0, np.cumsum(shares))
    return float((tokens[-1] - np.interp(older[-1] / 2, older, tokens)) / (tokens[-1] - tokens[0]))


def decayed(run: LoggedRun) -> bool:
    """Whether there is weight decay; without it the weights are no average."""
    return bool((run.column("lr") * run.column("weight_decay") > 0).any())


def shown(number: float | None, form: Callable[[float], str] = "{:.4f}".format) -> str:
    """A number as text, as it stands a loss in nats; "" where it is not known."""
    return "" if number is None else form(number)


def against(loss: float | None, baseline: float | None) -> str:
    """A baseline, and where the loss stands to it."""
    if loss is None or baseline is None:
        return shown(baseline)
    side = "below" if loss <= baseline else "above"
    return f"{baseline:.4f} ({abs(loss - baseline):.4f} {side})"


def change(run: LoggedRun, key: str, of: str) -> str:
    """The first and the last number under a key, of what, and at which steps; one number where they are the same."""
    steps, values = run.column("step"), run.column(key)
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return ""
    first, last = (f"{human_count(values[i])}" for i in known[[0, -1]])
    if first == last:
        return f"{first} {of}"
    return f"{first} {of} at step {steps[known[0]]:,.0f}, {last} at step {steps[known[-1]]:,.0f}"


def steps_saved(run: LoggedRun) -> str:
    """Return the steps that growth saved, as a share of those that the first batch throughout would have taken; ""
    where the batch, in tokens, did not grow."""
    batch, tokens = tokens_per_step(run), token_bounds(run)
    if not batch[-1] > 1.001 * batch[0]:
        return ""
    constant, steps = (tokens[-1] - tokens[0]) / batch[0], steps_taken(run).sum()
    return f"{1 - steps / constant:.0%} of {constant:,.0f} at the first batch throughout"


def time_saved(run: LoggedRun) -> str:
    """Return the training time that growth saved, by larger steps or on more ranks, as a share of what all tokens would
    have taken at the speed of the first batch; "" where the batch did not grow. Below 0 where it cost time."""
    batch, tokens, seconds = tokens_per_step(run), token_bounds(run), training_seconds(run)
    speeds = run.column("tokens_per_second")[batch <= 1.001 * batch[0]]
    if not batch[-1] > 1.001 * batch[0] or not np.isfinite(speeds).any():
        return ""
    constant = (tokens[-1] - tokens[0]) / np.nanmedian(speeds)
    return f"{1 - seconds / constant:.0%} of {human_duration(constant)} at the first batch's speed"


def tokens_per_step(run: LoggedRun) -> np.ndarray:
    """Return the tokens of one step of each record, the mean where it stands for several, [steps]; NaN where the log
    does not say."""
    steps, tokens = steps_taken(run), np.diff(token_bounds(run))
    return np.divide(tokens, steps, out=np.full(len(steps), np.nan), where=steps > 0)


def known(runs: Sequence[LoggedRun], *keys: str) -> bool:
    """Whether any step of any run holds a number under one of these keys."""
    return any(len(finite(run, key)) for run in runs for key in keys)


def course(x: np.ndarray, y: np.ndarray, points: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """The course of y: its mean over 2 % of the run around each point, or around at most so many of a long run's."""
    if len(x) > points:  # of means over short stretches: the work would grow as the square of the steps
        begins, known = np.linspace(0, len(x), points, endpoint=False).astype(int), np.isfinite(y)
        x = np.add.reduceat(x, begins) / np.diff(begins, append=len(x))
        total, count = (np.add.reduceat(each.astype(float), begins) for each in (np.where(known, y, 0), known))
        y = np.divide(total, count, out=np.full(points, np.nan), where=count > 0)
    return x, smooth(y, max(1, len(x) // 50))


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` points, the nearer counting more; NaN is left out of it, and stays NaN."""
    known = np.isfinite(values)
    weights = np.hanning(window + 2)[1:-1]
    total = np.convolve(np.where(known, values, 0.0), weights, mode="same")
    count = np.convolve(known, weights, mode="same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=known)


def thin(x: np.ndarray, y: np.ndarray, buckets: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """At most 2 * buckets + 2 of the points: the lowest and highest of every bucket, so that spikes stay."""
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
    """(kind, depth, examples) of the newest noise scales; `layers.3.norm` is of kind `layers.*.norm`.

    A layer without a number, the final norm for instance, stands one deeper than the layer before it.
    """
    points, depth = [], -1
    for name, value in run.layers.items():
        number = re.search(r"\d+", name)
        depth = int(number[0]) if number else depth + 1
        if value is not None:
            points.append((re.sub(r"\d+", "*", name), depth, value))
    return points


def layer_kinds(runs: Sequence[LoggedRun]) -> list[str]:
    """The kinds of norm layers that `layer_points` finds, in the order of `MARKERS`."""
    return list(dict.fromkeys(kind for run in runs for kind, _, _ in layer_points(run)))
