"""Forecast the next values of series by a run that was trained on series.

    megahp forecast runs/mine series.csv [--horizon 24] [--samples 100] [--quantiles 0.1 0.5 0.9]
        [--output forecast.csv] [--plot forecast.svg] [--seed 1]

From the last values of each series, as many as a training window's given part, the run's newest checkpoint samples
paths of the next ones. You get their quantiles as CSV, a row per series and step.
"""

import csv
import io
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megahp.commands.arguments import add_column_arguments, check_minimum
from megahp.commands.output import begins_with, check_folder, check_replaceable
from megahp.errors import UserError
from megahp.files import replace_text
from megahp.log.progress import ProgressDisplay
from megahp.series.measures import QUANTILES
from megahp.series.tables import Columns, read_series, unusable

HEADING = ("series", "step")
MOST_DRAWN = 12  # series in a plot


def parse_quantile(text: str) -> float:
    """Parse a number between 0 and 1. Raises ArgumentTypeError."""
    try:
        if 0 < float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise ArgumentTypeError(f"{text!r} is not between 0 and 1, e.g. 0.5")


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory, or a checkpoint of it")
    add("files", type=Path, nargs="+", metavar="FILE", help="series, as for megahp preprocess --series")
    add_column_arguments(add)
    add("--horizon", type=int, metavar="N", help="values to forecast (default, and at most: as in training)")
    add("--samples", type=int, default=100, metavar="N", help="paths to sample (default 100)")
    add("--quantiles", type=parse_quantile, nargs="+", default=QUANTILES, metavar="Q", help="(default 0.1 to 0.9)")
    add("--output", type=Path, metavar="FILE", help="CSV file to write (default: print it)")
    drawn = f"draw the first {MOST_DRAWN} series with median, 50 and 80 %% intervals: .svg, .png or .pdf"
    add("--plot", type=Path, metavar="FILE", help=drawn)
    add("--seed", type=int, default=1, help="of the sampling (default 1)")


def run(options: Namespace, words: Sequence[str]) -> int:
    check_minimum(options, horizon=1, samples=1, seed=0)
    if options.output:
        check_folder(options.output)
        check_replaceable("--output", {options.output: begins_with(",".join(HEADING).encode())}, options.files)
    series = read_series(options.files, Columns(options.name_column, options.time_column, options.value_column))
    if not series:
        raise UserError(f"{options.files[0]} holds no series; name another file")

    from megahp.evaluate.forecast import coding_of, sample_paths  # imported late, with torch: only for valid files
    from megahp.evaluate.sample import load_trained

    trained = load_trained(options.run)
    coding = coding_of(trained)
    horizon = options.horizon or coding.horizon
    if horizon > coding.horizon:
        raise UserError(
            f"--horizon {horizon} is above {coding.horizon}, which {trained.path} was trained for; lower it"
        )
    refuse_unusable(series, horizon, coding.conditioning)
    paths = {}
    with ProgressDisplay(len(series) * options.samples * coding.horizon_tokens, stream=sys.stderr) as progress:
        for row, (name, values) in enumerate(series.items()):
            paths[name] = sample_paths(trained, values, options.samples, options.seed, row)[:, :horizon]
            progress.show((row + 1) * options.samples * coding.horizon_tokens, [("series", f"{row + 1:,}")])
    text = as_csv(paths, sorted(set(options.quantiles)))
    if options.output:
        replace_text(options.output, text)
    else:
        print(text, end="")
    if options.plot:
        plot(options.plot, series, paths, coding.conditioning)
    return 0


def refuse_unusable(series: Mapping[str, np.ndarray], horizon: int, conditioning: int) -> None:
    """Raise UserError for series that nothing can be forecast from: their history, or what is read of it."""
    found = {}
    for name, values in series.items():
        if why := unusable(values, horizon):
            found[name] = why
        elif why := unusable(values[-conditioning:], 0):
            found[name] = f"of its last {conditioning:,} values, which are read, {why}"
    if found:
        (name, why), others = next(iter(found.items())), len(found) - 1
        more = f", and {others:,} more," if others else ""
        raise UserError(f"series {name!r}{more} cannot be forecast: {why}; leave {'them' if more else 'it'} out")


def as_csv(paths: Mapping[str, np.ndarray], quantiles: Sequence[float]) -> str:
    """Return the quantiles of the paths [samples, horizon] as CSV: a row per series and step, a column per quantile."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*HEADING, *(f"{q:g}" for q in quantiles)])
    for name, drawn in paths.items():
        for step, row in enumerate(np.quantile(drawn, quantiles, axis=0).T, 1):
            writer.writerow([name, step, *(f"{value:.8g}" for value in row)])
    return table.getvalue()


def plot(file: Path, series: Mapping[str, np.ndarray], paths: Mapping[str, np.ndarray], conditioning: int) -> None:
    """Draw a panel per series: the end of its history, the median of its paths, and where 50 and 80 % of them lie.
    Raises UserError."""
    from megahp.report.figures import PALETTE, plot_in

    names = list(series)[:MOST_DRAWN]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    with plot_in(file, 3.6 * columns + 1, 2.2 * rows + 0.4) as figure:
        panels: list[Any] = [*figure.subplots(rows, columns, squeeze=False).flat]
        for axes, name in zip(panels, names, strict=False):
            horizon = paths[name].shape[1]
            history = series[name][-min(conditioning, 4 * horizon) :]
            axes.plot(np.arange(1 - len(history), 1), history, color=PALETTE["ink"], lw=1, label="history")
            steps, hue = np.arange(1, horizon + 1), PALETTE["run0"]
            low, lower, median, upper, high = np.quantile(paths[name], (0.1, 0.25, 0.5, 0.75, 0.9), axis=0)
            axes.fill_between(steps, low, high, color=hue, alpha=0.15, lw=0, label="80 %")
            axes.fill_between(steps, lower, upper, color=hue, alpha=0.3, lw=0, label="50 %")
            axes.plot(steps, median, color=hue, label="median")
            axes.set_title(name, fontsize=8.5)
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
