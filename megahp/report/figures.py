"""The figures of a report, as inline SVG.

Everything is drawn in the colours of `PALETTE`, which become the CSS variables of the page, so that one drawing works
in light and dark mode. A run has the same colour in every figure; a second quantity in the same figure is dashed. Text
stays text: it can be searched, copied and read aloud.
"""

import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megahp.errors import UserError
from megahp.log.metrics import LoggedRun, Record
from megahp.log.progress import human_count
from megahp.report import numbers

RUNS = ("#2b5fa8", "#b5539c", "#2d8a57", "#8a6d1a", "#6a55c2", "#1d8a99")
PALETTE = {
    "paper": "#fbfbfa",
    "ink": "#1c2128",
    "muted": "#69707d",
    "rule": "#e3e5e9",
    "accent": "#c8641e",
    "warn": "#b3261e",
    **{f"run{run}": hue for run, hue in enumerate(RUNS)},
}
STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "text.color": PALETTE["ink"],
    "text.parse_math": False,  # a $ in a name or a reason is no formula
    **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), PALETTE["muted"]),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), PALETTE["rule"]),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "svg.fonttype"), "none"),
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
}
MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"))  # in the figure, and in its caption
DOTTED = (0, (1, 2))
Mark = tuple[int, int, Record]  # (number in the table of events, index of the run, event)


def colour(run: int) -> str:
    """Return the name in `PALETTE` of a run's colour; they repeat after six."""
    return f"run{run % len(RUNS)}"


def loss_figure(runs: Sequence[LoggedRun]) -> str:
    """Draw loss against tokens: every step faintly, the trend, validations, skipped steps and baselines."""

    def draw(axes: Any) -> None:
        ticks = {"color": PALETTE["warn"], "ms": 9, "mew": 1.5, "clip_on": False}
        for index, run in enumerate(runs):
            hue, tokens, validation = PALETTE[colour(index)], run.column("tokens"), run.column("validation_loss")
            draw_trend(axes, run, "loss", hue)
            # An open circle for every validation, and a tick on the x axis for every skipped step.
            points = numbers.thin(tokens[np.isfinite(validation)], validation[np.isfinite(validation)])
            axes.plot(*points, "o", color=hue, ms=5, mew=1.4, mfc=PALETTE["paper"], zorder=4)
            at = tokens[numbers.skipped(run)]
            if len(at):  # even an empty line, if not clipped, would take up space in the layout
                axes.plot(*numbers.thin(at, np.zeros(len(at))), "|", transform=axes.get_xaxis_transform(), **ticks)
        draw_baselines(axes, runs)
        axes.set_ylabel("nats per token")

    return plot(draw, runs, "Loss against tokens", 10, 4.2)


def draw_baselines(axes: Any, runs: Sequence[LoggedRun]) -> None:
    """Fit the y axis, and draw a dotted line for every unigram and bigram baseline; one above the axis is only named.

    The axis covers 97 % of the steps and the bigram baselines: the initial fall would flatten all the rest.
    """
    losses = {(kind, run.baselines.get(kind)) for run in runs for kind in ("unigram", "bigram")}
    levels = sorted((level, kind) for kind, level in losses if level is not None)
    bigrams = [level for level, kind in levels if kind == "bigram"]
    low, high = axes.get_ylim()
    columns = [run.column("loss") for run in runs]
    tops = [np.nanpercentile(loss, 97) for loss in columns if np.isfinite(loss).any()]
    high = max([min(high, 1.05 * max(tops, default=high)), *(1.03 * level for level in bigrams)])
    low = min([low, *bigrams])
    axes.set_ylim(low - 0.04 * (high - low), high)

    above = ", ".join(f"{kind} {level:.2f}" for level, kind in levels if level > high)
    annotate(axes, f"{above} ↑" if above else "", (1, 1), ("axes fraction", "axes fraction"), "right")
    for level, kind in levels:
        if level <= high:
            axes.axhline(level, color=PALETTE["muted"], lw=1, ls=DOTTED)
            annotate(axes, f"{kind} {level:.2f}", (1, level), ("axes fraction", "data"), "right")


def learning_rate_figure(runs: Sequence[LoggedRun]) -> str:
    """Draw learning rate against tokens; for a growing batch also times the square root of its growth, dashed.

    The latter is the drift of a step, relative to the initial batch.
    """

    def draw(axes: Any) -> None:
        for index, run in enumerate(runs):
            tokens, batch = run.column("tokens"), numbers.tokens_per_step(run)
            axes.plot(*numbers.thin(tokens, run.column("lr")), color=PALETTE[colour(index)])
            if batch[-1] > 1.001 * batch[0]:
                axes.plot(*numbers.thin(tokens, run.column("lr") * np.sqrt(batch / batch[0])), **dashed(index, runs))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")

    return plot(draw, runs, "Learning rate against tokens", 5, 2.7)


def throughput_figure(runs: Sequence[LoggedRun]) -> str:
    """Draw tokens per second against tokens."""

    def draw(axes: Any) -> None:
        for index, run in enumerate(runs):
            draw_trend(axes, run, "tokens_per_second", PALETTE[colour(index)])
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: human_count(value))

    return plot(draw, runs, "Tokens per second against tokens", 5, 2.7)


def batch_figure(runs: Sequence[LoggedRun], marks: Sequence[Mark]) -> str:
    """Draw global batch, its target and the noise scale; events as vertical lines, numbered as in their table."""

    def draw(axes: Any) -> None:
        for index, run in enumerate(runs):
            tokens, hue = run.column("tokens"), PALETTE[colour(index)]
            axes.plot(*stairs(run, run.column("global_batch")), color=hue, ds="steps-pre")
            axes.plot(*numbers.thin(tokens, run.column("noise_scale_total")), **dashed(index, runs))
            for key in ("batch_bound_noise", "batch_bound_stability"):
                bound = run.column(key)
                if len(known := np.flatnonzero(np.isfinite(bound))):
                    axes.plot(*numbers.thin(tokens, bound), color=PALETTE["muted"], lw=0.8)
                    at = known[3 * len(known) // 4]  # named at three quarters of its length
                    annotate(axes, key.rpartition("_")[2], (tokens[at], bound[at]), ("data", "data"), "right")
            if numbers.recorded([run], "batch_target"):
                axes.plot(*numbers.thin(tokens, run.column("batch_target")), color=hue, ls=(0, (1, 1.2)), lw=1.6)
        logarithmic(axes, 2)
        fit_batch_axis(axes, runs)
        span = max(run.column("tokens")[-1] for run in runs) or 1
        labelled = -1.0
        for number, index, event in marks:
            if (at := event["tokens"]) > span:
                continue  # the run was rewound to before it
            # matplotlib writes the gid as the id of a group, from which plot() makes a tooltip.
            axes.axvline(at, color=PALETTE[colour(index)], lw=0.9, alpha=0.45, gid=f"event {number}")
            if at / span - labelled > 0.018:  # any nearer and two numbers would overlap
                annotate(axes, str(number), (at, 1), ("data", "axes fraction"), "center")
                labelled = at / span
        axes.set_ylabel("examples")

    reasons = {f"event {number}": f"{event['event']}: {event['reason']}" for number, _, event in marks}
    return plot(draw, runs, "Global batch and noise scale against tokens", 10, 3.4, reasons)


def fit_batch_axis(axes: Any, runs: Sequence[LoggedRun]) -> None:
    """Fit a logarithmic y axis to all batches, and to an octave around the middle 90 % of noise scales and targets.

    Estimates from a run's first steps may be wrong by orders of magnitude, and would flatten all the rest.
    """
    bounds: list[float] = []
    for run in runs:
        for key in ("global_batch", "noise_scale_total", "batch_target"):
            values = run.column(key)
            values = values[values > 0]
            if len(values) and key == "global_batch":
                bounds += [values.min() / 1.2, values.max() * 1.2]
            elif len(values):
                bounds += list(np.percentile(values, [5, 95]) * (0.5, 2))
    if bounds:
        axes.set_ylim(min(bounds), max(bounds))


def weights_figure(runs: Sequence[LoggedRun]) -> str:
    """Draw the share of each update in the final weights, per token, relative to an even average of all updates."""

    def draw(axes: Any) -> None:
        for index, run in enumerate(runs):
            if numbers.has_weight_decay(run):
                axes.plot(*stairs(run, numbers.update_density(run)), color=PALETTE[colour(index)], ds="steps-pre")
        axes.axhline(1, color=PALETTE["muted"], lw=1, ls=DOTTED)
        annotate(axes, "even average", (1, 1), ("axes fraction", "data"), "right")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("times an even average")

    return plot(draw, runs, "Share of each update in the weights against tokens", 10, 2.7)


def gradient_figure(runs: Sequence[LoggedRun]) -> str:
    """Draw the mean squared gradient norm of single examples, and the squared norm of the batch's mean gradient."""

    def draw(axes: Any) -> None:
        for index, run in enumerate(runs):
            tokens = run.column("tokens")
            axes.plot(*numbers.trend(tokens, run.column("grad_sq_example")), color=PALETTE[colour(index)])
            axes.plot(*numbers.trend(tokens, run.column("grad_sq_batch")), **dashed(index, runs))
        logarithmic(axes, 10)

    return plot(draw, runs, "Squared gradient norms against tokens", 5, 2.7)


def layer_figure(runs: Sequence[LoggedRun]) -> str:
    """Draw the newest noise scale of every norm layer over depth, with a marker for each kind of norm."""

    def draw(axes: Any) -> None:
        for number, kind in enumerate(numbers.layer_kinds(runs)):
            for index, run in enumerate(runs):
                at = [(depth, value) for name, depth, value in numbers.layer_points(run) if name == kind]
                depths, values = zip(*at, strict=True) if at else ((), ())
                marker, _ = MARKERS[number % len(MARKERS)]
                axes.plot(depths, values, color=PALETTE[colour(index)], lw=0.5, ms=4.5, marker=marker)
        logarithmic(axes, 2)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("layer")
        axes.set_ylabel("examples")

    return plot(draw, [], "Noise scale of each norm layer over depth", 5, 2.7)


def draw_trend(axes: Any, run: LoggedRun, key: str, hue: str) -> None:
    """Draw every point as a faint line, and their mean over 2 % of the run as a clear one."""
    x, y = run.column("tokens"), run.column(key)
    if len(x) >= 100:
        axes.plot(*numbers.thin(x, y), color=hue, lw=0.7, alpha=0.28)
    axes.plot(*numbers.trend(x, y), color=hue, marker="." if len(x) < 30 else None, zorder=3)


def stairs(run: LoggedRun, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the points of a "steps-pre" line: a record's value holds for all its tokens since the previous record."""
    return numbers.thin(numbers.token_bounds(run), np.append(values[0], values))


def dashed(index: int, runs: Sequence[LoggedRun]) -> dict[str, Any]:
    """Return the line style of a figure's second quantity."""
    return {"color": PALETTE["accent" if len(runs) == 1 else colour(index)], "ls": (0, (3, 1.3)), "lw": 1.3}


def annotate(axes: Any, text: str, at: tuple[float, float], coordinates: tuple[str, str], align: str) -> None:
    """Write a muted label just above a point."""
    style = {"ha": align, "color": PALETTE["muted"]}
    axes.annotate(text, at, xycoords=coordinates, xytext=(0, 3), textcoords="offset points", **style)


def logarithmic(axes: Any, base: int) -> None:
    """Make the y axis logarithmic, with a handful of plain numbers; linear if nothing drawn is positive."""
    if not np.isfinite(axes.dataLim.minposy):
        return
    axes.set_yscale("log", base=base, nonpositive="mask")
    _write_plain_ticks(axes.yaxis, base)


def _write_plain_ticks(axis: Any, base: int) -> None:
    """Give a logarithmic axis a handful of plain numbers, where matplotlib would write formulas."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_view_interval()
    narrow = base == 10 and high < 30 * low  # powers of ten alone would give one or two ticks
    axis.set_major_locator(LogLocator(base, subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1000 else human_count(value))


def logarithmic_x(axes: Any, values: Sequence[float], labels: Sequence[str]) -> None:
    """Make the x axis logarithmic, with ticks at these values only."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.set_xticks(values, labels)
    axes.xaxis.set_minor_locator(NullLocator())


def plot(
    draw: Callable[[Any], None],
    runs: Sequence[LoggedRun],
    title: str,
    width: float,
    height: float,
    tooltips: dict[str, str] | None = None,
) -> str:
    """Return one figure of width x height inches as SVG. The x axis is the tokens of `runs`, if there are any.

    tooltips: gid of a drawn element -> text.
    """
    # Without a salt of its own matplotlib would draw random ids, and the same run would not give the same page.
    with _styled("a report", width, height, {"svg.hashsalt": title}) as figure:
        axes = figure.add_subplot()
        axes.grid(axis="x", visible=False)
        if runs:
            axes.set_xlim(0, 1.01 * max(run.column("tokens")[-1] for run in runs) or 1)
            axes.xaxis.set_major_formatter(lambda value, _: human_count(value))
            axes.set_xlabel("tokens")
        draw(axes)
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg")
    svg = drawing.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    titled = {f'<g id="{gid}">': f"<g><title>{html.escape(text)}</title>" for gid, text in (tooltips or {}).items()}
    svg = re.sub(r'<g id="[^"]*">', lambda group: titled.get(group[0], group[0]), svg)
    svg = re.sub(r'(<\w+) id="[\w.]+_\d+"', r"\1", svg)  # each figure has an axes_1, but ids on a page must be unique
    for name, value in PALETTE.items():
        svg = svg.replace(value, f"var(--{name})")
    return svg


@contextmanager
def _styled(what: str, width: float, height: float, style: dict[Any, Any]) -> Iterator[Any]:
    """Yield a figure of width x height inches in the report's style, updated by `style`. what: for the error.

    Raises UserError if matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f"{what} needs matplotlib, which is missing; pip install matplotlib") from None
    with matplotlib.rc_context({**STYLE, **style}):
        yield Figure(figsize=(width, height), layout="constrained")


@contextmanager
def plot_in(file: Path, width: float, height: float) -> Iterator[Any]:
    """Yield a figure of width x height inches in the report's style, to be drawn on, then save it. Raises UserError."""
    with _styled(str(file), width, height, {"figure.facecolor": PALETTE["paper"]}) as figure:
        yield figure
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if axis.get_scale() == "log"):
            if axis.isDefault_majfmt:
                _write_plain_ticks(axis, 10)
            elif axis.isDefault_minfmt:
                axis.set_minor_formatter(lambda value, _: "")
        try:
            figure.savefig(file)
        except ValueError as error:
            raise UserError(f"{file} cannot be drawn ({error}); name a .svg, .png or .pdf file") from None
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error.strerror}); name another file") from None
