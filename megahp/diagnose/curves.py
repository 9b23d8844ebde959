"""Show the results of `megahp transfer-sweep`: a table, JSON, a plot."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megahp.diagnose.transfer import Curve, Drift, Estimate

HEADER = f"{'variant':<20}{'size':>8}{'optimum':>12}{'octaves':>9}{'loss':>9}{'+-':>8}"
LINE = "{variant:<20}{size:>8g}{optimum:>12.4g}{octaves:>+9.2f}{loss:>9.4f}{scatter:>8.4f}{edge}"

Family = Mapping[float, Curve]  # by size, smallest first


def show(families: Mapping[str, Family], drifts: Mapping[str, Drift]) -> None:
    """Print a line per curve, and the drift of each variant.

    octaves: from the smallest size's optimum; loss: at the optimum; +-: its standard deviation over the seeds.
    """
    print(HEADER)
    for variant, family in families.items():
        first = next(iter(family.values()))
        for size, curve in family.items():
            losses = [seed.loss for seed in curve.optima]
            columns = {
                "variant": variant,
                "size": size,
                "optimum": curve.optimum,
                "octaves": math.log2(curve.optimum / first.optimum),
                "loss": np.mean(losses),
                "scatter": np.std(losses, ddof=1) if len(losses) > 1 else math.nan,
            }
            wider = " and ".join(f"{value:.3g}" for value in curve.beyond)
            notes = [f"at the grid's edge: extend it to {wider}"] if wider else []
            if len(curve.values) == 1:
                notes.append("one value, with nothing to compare")
            if curve.diverged:
                notes.append(f"{curve.diverged} of {curve.losses.size} runs diverged")
            print(LINE.format(**columns, edge=f"  {'; '.join(notes)}".rstrip()))
    for variant, drift in drifts.items():
        more = sorted({float(f"{value:.3g}") for curve in families[variant].values() for value in curve.beyond})
        add = ", ".join(f"{value:g}" for value in more)
        note = f"; an optimum is at the grid's edge, so it may be more: add {add} to --grid" if more else ""
        slope = f"{drift.slope.value:+.2f} octaves {interval(drift.slope)} by its slope"
        spread = f"{drift.spread.value:.2f} {interval(drift.spread)} from least to largest"
        print(f"{variant}: the optimum drifts {slope}, {spread}{note}")


def interval(estimate: Estimate) -> str:
    return f"[{estimate.low:.2f}, {estimate.high:.2f}]" if math.isfinite(estimate.low) else "(one seed: no interval)"


def tables(families: Mapping[str, Family]) -> list[dict[str, Any]]:
    """Return the curves with every loss, for a JSON file."""
    return [
        {
            "variant": variant,
            "size": size,
            "values": curve.values,
            "losses": curve.losses.tolist(),
            "optima": [asdict(seed) for seed in curve.optima],
            "optimum": curve.optimum,
        }
        for variant, family in families.items()
        for size, curve in family.items()
    ]


def plot(file: Path, families: Mapping[str, Family], key: str, size_key: str) -> None:
    """Draw loss against the grid: a panel per variant, a colour per size, a ring at each seed's optimum. Raises
    UserError."""
    from megahp.report.figures import logarithmic_x, plot_in

    sizes = sorted({size for family in families.values() for size in family})
    curves = [curve for family in families.values() for curve in family.values()]
    # show the better half of every curve: the losses of one that explodes would flatten the others
    finite = [curve.losses[np.isfinite(curve.losses)] for curve in curves]
    low, high = min(losses.min() for losses in finite), max(np.median(losses) for losses in finite)
    with plot_in(file, 2.3 * len(families) + 1.2, 2.9) as figure:
        from matplotlib import colormaps

        hues = dict(zip(sizes, colormaps["viridis_r"](np.linspace(0.15, 1, len(sizes))), strict=True))
        panels = figure.subplots(1, len(families), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (variant, family) in zip(panels, families.items(), strict=True):
            for size, curve in family.items():
                # the seeds' mean, and their range as a band, where all of them are finite
                shown = np.isfinite(curve.losses).all(1)
                at, losses, hue = np.array(curve.values)[shown], curve.losses[shown], hues[size]
                axes.plot(at, losses.mean(1), ".-", color=hue, label=f"{size:g}")
                axes.fill_between(at, losses.min(1), losses.max(1), color=hue, alpha=0.2, lw=0)
                for seed in curve.optima:
                    axes.plot(seed.value, seed.loss, "o", color=hue, ms=5, mfc="none", zorder=4)
            axes.set_title(variant, fontsize=8.5)
            axes.set_xlabel(key)
        values = sorted({value for curve in curves for value in curve.values})
        logarithmic_x(panels[0], values[::-2], [f"{value:g}" for value in values[::-2]])
        panels[0].set_ylabel("nats per token")
        panels[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles=handles, labels=labels, loc="outside right upper", frameon=False, title=size_key)
