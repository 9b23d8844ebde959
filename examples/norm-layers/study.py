"""Do the norm layers' noise scale, smoothed in training, and the run's calibrated estimate follow the whole model's?

    python examples/norm-layers/study.py [--seeds 5] [--batches 12] [--only-show] [section.key=value ...]

For each seed a run of run.toml keeps twelve checkpoints, and `megahp measure noise-scale` finds the exact noise scale
of every kind of layer at each. Every run becomes twelve lines in results.jsonl; interrupted, the same command resumes.
Then the tables are printed, and the figure drawn: slope (through the origin) and Pearson's r of the whole model's noise
scale over each of the others along a run, mean over the seeds with 95 % intervals, with and without embedding and
unembedding, which the paper leaves out (Gray et al., arXiv 2411.00999). About 10 minutes of one free core.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megahp.diagnose.statistics import correlation, half_interval, slope
from megahp.log.metrics import read_run
from megahp.report.figures import PALETTE, plot_in

sys.path.insert(0, str(Path(__file__).parent.parent))
from studies import Study, read_lines, run_megahp

HERE = Path(__file__).parent
BATCH = 128  # sequences, of a measurement
EMBEDDINGS = ("embedding", "unembedding")
PARTS = {"first third": (0, 0.34), "second third": (0.34, 0.67), "until 92 %": (0.67, 0.95), "the end": (0.95, 1)}
TOTALS = ("total", "total without embeddings")
Line = dict[str, Any]


def measure(study: Study, seed: int, batches: int) -> list[Line]:
    """Train a run, and return a line for each of its checkpoints."""
    shutil.rmtree(study.runs / "run", ignore_errors=True)
    words = [f"train.seed={seed}", f"log.root={study.runs}", "log.name=run", *study.overrides]
    run_megahp("train", str(HERE / "run.toml"), *words)
    found = study.runs / "noise.json"
    measured = ["--batch", str(BATCH), "--batches", str(batches), "--json", str(found)]
    run_megahp("measure", "noise-scale", str(study.runs / "run"), *measured)
    logged, lines = read_run(study.runs / "run"), []
    tokens, last = logged.column("tokens"), float(logged.column("validation_loss")[-1])
    for at in json.loads(found.read_text())["checkpoints"]:
        (step,) = np.flatnonzero(tokens == at["tokens"])
        own = ("noise_scale", "noise_scale_total", "noise_scale_total_low", "noise_scale_total_high", "noise_to_total")
        lines.append(
            {
                "seed": seed,
                "part": at["tokens"] / tokens[-1],
                "loss": last,
                **{key: without_nan(logged.column(key)[step]) for key in own},
                "kinds": {
                    name: [kind["true_sq"], kind["noise"]] for name, kind in at["kinds"].items() if name != "total"
                },
            }
        )
    return lines


def without_nan(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def exact(line: Line, *kinds: str) -> float:
    """Return the noise scale of these kinds of layers together: |G|^2 and S are sums over layers."""
    true_sq, noise = np.sum([line["kinds"][kind] for kind in kinds], axis=0)
    return float(noise / true_sq) if true_sq > 0 else np.nan


def total(line: Line, name: str = "total") -> float:
    """Return that of the whole model, or of all but the embeddings."""
    return exact(line, *(kind for kind in line["kinds"] if name == "total" or kind not in EMBEDDINGS))


def estimates(lines: Sequence[Line]) -> dict[str, Callable[[Line], float]]:
    """Return what is set beside the whole model's noise scale: the run's own estimates, and each kind of layer."""
    own = {
        "norms, smoothed in training": lambda line: line["noise_scale"] or np.nan,
        "the run's calibrated total": lambda line: line["noise_scale_total"] or np.nan,
    }
    kinds = {f"{kind}, at the checkpoint": lambda line, kind=kind: exact(line, kind) for kind in lines[0]["kinds"]}
    return own | kinds


def runs_of(lines: Sequence[Line]) -> list[list[Line]]:
    """Return the lines of each seed."""
    return [[line for line in lines if line["seed"] == seed] for seed in sorted({line["seed"] for line in lines})]


def along(run: Sequence[Line], estimate: Callable[[Line], float], name: str, end: float) -> tuple[float, float]:
    """Return slope and correlation of a total over an estimate, of the checkpoints until the end."""
    pairs = np.array([(estimate(line), total(line, name)) for line in run if line["part"] <= end])
    x, y = pairs[np.isfinite(pairs).all(1)].T
    return float(slope(x, y)), float(correlation(x, y))


def over_seeds(values: Sequence[float]) -> str:
    return f"{np.mean(values):>8.2f} +-{half_interval(values):>5.2f}"


def report(lines: Sequence[Line]) -> Iterator[str]:
    """Yield the tables: slopes and correlations along a run, and ratios by part of the schedule."""
    runs, rows = runs_of(lines), estimates(lines)
    losses = [run[0]["loss"] for run in runs]
    yield f"{len(runs)} seeds, loss {np.mean(losses):.4f} +- {half_interval(losses):.4f}"
    for name in TOTALS:
        yield f"\n{name + ' over':<30}{'slope':>8}{'r':>16}{'before the end: slope':>32}{'r':>8}"
        for row, estimate in rows.items():
            columns = [zip(*(along(run, estimate, name, end) for run in runs), strict=True) for end in (1, 0.95)]
            yield f"{row:<30}" + "".join(over_seeds(values) for pair in columns for values in pair)
    yield f"\n{'total over':<30}" + "".join(f"{part:>16}" for part in PARTS)
    for row, estimate in rows.items():
        cells = ""
        for low, high in PARTS.values():
            inside = [[line for line in run if low < line["part"] <= high] for run in runs]
            cells += over_seeds([float(np.nanmean([total(line) / estimate(line) for line in run])) for run in inside])
        yield f"{row:<30}{cells}"
    known = [line for line in lines if line["noise_scale_total_low"]]
    held = [
        line["noise_scale_total_low"] <= total(line) <= (line["noise_scale_total_high"] or np.inf) for line in known
    ]
    yield f"the run's 95 % interval of the total holds the exact value at {sum(held)} of {len(held)} checkpoints"


def draw(lines: Sequence[Line], file: Path) -> None:
    """Draw the noise scales along a run, medians over the seeds, and the total's over the run's two estimates."""
    runs = runs_of(lines)
    kinds = {kind: f"run{number}" for number, kind in enumerate(lines[0]["kinds"])}
    with plot_in(file, 9, 3.4) as figure:
        along_run, against = figure.subplots(1, 2)

        def curve(of: Callable[[Line], float], **style: Any) -> None:
            scales = np.median([[of(line) for line in run] for run in runs], axis=0)
            along_run.plot([line["part"] for line in runs[0]], scales, marker="o", ms=3, **style)

        for kind, hue in kinds.items():
            curve(lambda line, kind=kind: exact(line, kind), label=kind, color=PALETTE[hue], lw=1)
        curve(total, label="total", color=PALETTE["ink"])
        curve(estimates(lines)["norms, smoothed in training"], label="norms, smoothed", color=PALETTE["muted"], ls="--")
        along_run.set(yscale="log", xlabel="part of the run", ylabel="noise scale, sequences")
        for (name, estimate), hue in zip(list(estimates(lines).items())[:2], ("run0", "run2"), strict=True):
            for mark, label in (("o", name), ("x", f"{name}: the end")):
                mine = [line for line in lines if (line["part"] > PARTS["the end"][0]) == (mark == "x")]
                x, y = [estimate(line) for line in mine], [total(line) for line in mine]
                against.plot(x, y, mark, ms=4, color=PALETTE[hue], label=label)
        ends = np.array([2, 1000])
        for factor, dash in ((1, ":"), (1.4, "-")):
            against.plot(ends, factor * ends, dash, color=PALETTE["accent"], lw=1, label=f"{factor:g} x")
        against.set(xscale="log", yscale="log", xlabel="the run's estimate, sequences", ylabel="total, sequences")
        along_run.legend(frameon=False, fontsize=7)
        against.legend(frameon=False, fontsize=7, loc="lower right")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override the run file; results in runs/"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=12, help=f"of {BATCH} sequences, of a measurement")
    parser.add_argument("--only-show", action="store_true", help="train nothing")
    options = parser.parse_intermixed_args()
    study = Study(HERE, overrides=options.overrides)
    if not options.only_show:
        subprocess.run(["sh", str(HERE.parent / "stdlib-bytes.sh")], check=True)
        done = {line["seed"] for line in read_lines(study.results)}
        began, left = time.monotonic(), [seed for seed in range(1, options.seeds + 1) if seed not in done]
        for number, seed in enumerate(left, start=1):
            lines = measure(study, seed, options.batches)
            with study.results.open("a") as out:
                out.writelines(json.dumps(line) + "\n" for line in lines)
            eta = (time.monotonic() - began) / number * (len(left) - number)
            print(f"seed {seed}; {number} of {len(left)}, {eta / 60:.0f} min left", flush=True)
    if not (lines := read_lines(study.results)):
        sys.exit(f"{study.results} has no results; repeat without --only-show")
    print("\n".join(report(lines)))
    draw(lines, study.figure)
