"""The Journey Matters: does a run that is pruned end level with a dense one of its average number of weights?

    python examples/pruning/study.py [--jobs 2] [--seeds 1 2 3]

A model is pruned gradually to half of its hidden weights, between three pairs of shares of the compute (arXiv
2501.12486; 25 and 75 % are the paper's near optimum). Beside each, on as many tokens, a dense model with as many hidden
weights as the pruned one has on average, by the width of its MLP; and the dense model that is pruned, and half of it.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from studies import Line, Run, Study, code, half_interval, main, mean_and_interval, prepare, print_table

from megahp.scaling.sparsity import average_density

MILLIONS = 0.6
DENSITY = 0.5
SPANS = {"25-75 %": (0.25, 0.75), "5-55 %": (0.05, 0.55), "45-95 %": (0.45, 0.95)}
WIDTH, MLP_WIDTH = 64, 192  # of run.toml


def mlp_width(share: float) -> int:
    """Return the MLP width of a model with this share of the hidden weights, 4 width^2 + 3 width mlp a layer."""
    return round(share * (4 * WIDTH / 3 + MLP_WIDTH) - 4 * WIDTH / 3)


def runs(study: Study, seeds: list[int]) -> list[Run]:
    arms = {"dense": [], f"dense, {DENSITY:.0%}": [f"model.mlp_width={mlp_width(DENSITY)}"]}
    for name, (begin, end) in SPANS.items():
        pruned = ["sparsity.method=gradual", f"sparsity.density={DENSITY}", "sparsity.every=20"]
        arms[f"pruned {name}"] = [*pruned, f"sparsity.begin={begin}", f"sparsity.end={end}"]
        arms[f"dense, N_avg of {name}"] = [f"model.mlp_width={mlp_width(average_density(DENSITY, begin, end))}"]
    end = f"train.tokens={study.tokens(MILLIONS)}"
    return [Run(f"{arm}/{seed}", [*words, end, f"train.seed={seed}"]) for seed in seeds for arm, words in arms.items()]


def measure(directory: Path) -> Line:
    """Return the average density over the run's tokens, and the last."""
    from megahp.log.metrics import read_run

    logged = read_run(directory)
    if "density" not in logged.columns:
        return {}
    densities = logged.columns["density"]
    return {"average density": float(densities.mean()), "density": float(densities[-1])}


def show(study: Study, lines: dict[str, Line], seeds: list[int]) -> None:
    """Print the losses, and what pruning ends above the dense model of as many weights; draw them."""
    from megahp.report.figures import PALETTE, plot_in

    def losses(arm: str) -> list[float]:
        return [lines[f"{arm}/{seed}"]["loss"] for seed in seeds]

    rows = []
    points: list[tuple[str, float, str]] = [("dense", 1.0, ""), (f"dense, {DENSITY:.0%}", DENSITY, "")]
    for name, (begin, end) in SPANS.items():
        average = average_density(DENSITY, begin, end)
        points += [(f"pruned {name}", average, f"dense, N_avg of {name}"), (f"dense, N_avg of {name}", average, "")]
    with plot_in(study.figure, 5, 3.2) as figure:
        axes = figure.add_subplot()
        for arm, average, rival in sorted(points, key=lambda point: -point[1]):
            mine, last = losses(arm), DENSITY if rival else average
            other = mean_and_interval([a - b for a, b in zip(mine, losses(rival), strict=True)], 4) if rival else ""
            if rival:
                average = lines[f"{arm}/{seeds[0]}"]["average density"]
            rows.append([arm, f"{average:.3f}", f"{last:.3f}", mean_and_interval(mine, 4), other])
            hue, mark = ("accent", "s") if rival else ("run1", "o")
            label = ("pruned" if rival else "dense") if arm in ("dense", "pruned 25-75 %") else None
            style = {"fmt": mark, "color": PALETTE[hue], "capsize": 2, "label": label}
            axes.errorbar([average], [sum(mine) / len(mine)], [half_interval(mine)], **style)
        axes.set(xlabel="hidden weights, average over the run, share of the dense model's", ylabel="held-out loss")
        axes.legend(frameon=False, fontsize=7)
    print_table(("", "hidden weights, average", "at the end", "loss", "to dense of N_avg"), rows)


if __name__ == "__main__":
    main(__file__, __doc__, partial(prepare, "code", code), runs, show, measure)
