"""Compare schedules at their own best rates: what study.sh and long.sh measured, and where the weights of each schedule
come from.

    python examples/decay-to-zero/compare.py [RESULTS.json ...] [--plot FILE.svg]

Prints a line per number of tokens and schedule: the best rate of the grid by its mean over the seeds, the loss there,
its paired difference to decay to zero at that one's best rate with a 95 % interval, and the share of the tokens with
which decay to zero reaches that loss, between its losses along the logarithm of the tokens. The figure has the
differences, and the dual coefficients of the schedules (megahp/scaling/schedules.py) at a timescale of a tenth of the
run.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megahp.config import ScheduleConfig
from megahp.diagnose.statistics import half_interval
from megahp.report.figures import PALETTE, logarithmic_x, plot_in
from megahp.scaling.schedules import dual_coefficients, fraction

HERE = Path(__file__).parent
WEIGHTS = 41_000  # of the model
SCHEDULES = {
    "D2Z": ScheduleConfig(name="decay-to-zero"),
    "cosine to 10 %": ScheduleConfig(name="cosine", floor=0.1),
    "WSD": ScheduleConfig(name="wsd", decay=0.2),
    "inverse sqrt": ScheduleConfig(name="inverse-sqrt"),
    "constant": ScheduleConfig(name="constant"),
}


def joined(curves: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one curve for each size and variant, with all rates of those there are."""
    found: dict[tuple[float, str], dict[float, list[float]]] = {}
    for curve in curves:
        rates = found.setdefault((curve["size"], curve["variant"]), {})
        rates.update(zip(curve["values"], curve["losses"], strict=True))
    return [
        {"size": size, "variant": variant, "values": sorted(rates), "losses": [rates[rate] for rate in sorted(rates)]}
        for (size, variant), rates in found.items()
    ]


def best(curve: dict[str, Any]) -> tuple[float, np.ndarray]:
    """Return the rate of the grid whose mean loss is least, and its losses, [seeds]."""
    losses = np.array(curve["losses"], float)
    at = int(losses.mean(1).argmin())
    return curve["values"][at], losses[at]


def rows(curves: list[dict[str, Any]]) -> Iterator[tuple[float, str, float, np.ndarray, np.ndarray, float]]:
    """Yield tokens, schedule, best rate, losses, differences to D2Z, share of the tokens that D2Z needs."""
    sizes = sorted({curve["size"] for curve in curves if curve["variant"] == "D2Z"})
    found = {(curve["size"], curve["variant"]): best(curve) for curve in curves if curve["size"] in sizes}
    own = [float(found[size, "D2Z"][1].mean()) for size in sizes]
    for size, variant in sorted(found, key=lambda key: (key[0], list(SCHEDULES).index(key[1]))):
        rate, losses = found[size, variant]
        reached = np.exp(np.interp(-losses.mean(), -np.array(own), np.log(sizes), left=np.nan, right=np.nan))
        yield size, variant, rate, losses, losses - found[size, "D2Z"][1], reached / size


def draw(curves: list[dict[str, Any]], file: Path) -> None:
    with plot_in(file, 9, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        table, steps = list(rows(curves)), np.arange(1, 1001)
        for number, (name, schedule) in enumerate(SCHEDULES.items()):
            mine = [row for row in table if row[1] == name]
            sizes, differences = [row[0] / WEIGHTS for row in mine], [row[4] for row in mine]
            means, errors = [each.mean() for each in differences], [half_interval(each) for each in differences]
            style = {"color": PALETTE[f"run{number}"], "label": name}
            left.errorbar(sizes, means, errors, fmt="o-", ms=4, capsize=2, **style)
            rates = np.array([fraction(schedule, step, 1000) for step in steps])
            right.plot(steps / 1000, 1000 * dual_coefficients(rates, np.full(1000, 0.01))[1], **style)
        left.set(xlabel="tokens per weight", ylabel="nats above decay to zero")
        logarithmic_x(left, sizes, [f"{size:.2g}" for size in sizes])
        right.set(xlabel="part of the run", ylabel="share in the last weights, per mille a step", ylim=(0, 4))
        left.legend(frameon=False, fontsize=7)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", default=sorted(HERE.glob("results*.json")))
    parser.add_argument("--plot", type=Path, default=Path("docs/figures/decay-to-zero.svg"))
    options = parser.parse_args()
    curves = joined([curve for file in options.results for curve in json.loads(file.read_text())["curves"]])
    print(f"{'tokens':>10} {'schedule':<16}{'best rate':>10}{'loss':>9}{'to D2Z':>10}{'(95 %)':>9}{'D2Z needs':>11}")
    for size, variant, rate, losses, differences, share in rows(curves):
        line = f"{size:>10,.0f} {variant:<16}{rate:>10.2g}{losses.mean():>9.4f}{differences.mean():>+10.4f}"
        needs = "-" if np.isnan(share) or variant == "D2Z" else f"{share:.0%}"
        print(f"{line}{half_interval(differences):>9.4f}{needs:>11}")
    draw(curves, options.plot)
