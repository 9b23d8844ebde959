"""What do 4-bit products cost, and which choices make them cost less?

    python examples/fp4/study.py [--jobs 2] [--seeds 1 2 3]

A model in full precision, and for each simulated format (`compute.fp4_...`): forward products alone; gradients too,
rounded to nearest; these with random rounding of the outputs' gradients, with Hadamard rotations forward and backward,
with both; and without a scale of the whole tensor. All at one rate, the best of the run in full precision. Each is
measured twice: as it was trained, and with forward products in full precision.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from studies import (
    Line,
    Run,
    Study,
    code,
    half_interval,
    held_out_code,
    main,
    mean_and_interval,
    mean_loss,
    prepare,
    print_table,
)

LENGTH, WINDOWS = 128, 512
TOKENS = 0.2  # millions
FULL = "full precision"
FORMATS = "mxfp4", "nvfp4", "ue5m3"
STOCHASTIC, ROTATED = "compute.fp4_stochastic=true", "compute.fp4_hadamard=both"
CHOICES = {  # beside the formats, forward and backward
    "to nearest": [],
    "random": [STOCHASTIC],
    "rotated": [ROTATED],
    "random and rotated": [STOCHASTIC, ROTATED],
    "no tensor scale": ["compute.fp4_tensor_scale=none"],
}
COLUMNS = ["forward alone", *CHOICES]


def arms() -> dict[str, list[str]]:
    """Return the settings of each arm."""
    found: dict[str, list[str]] = {FULL: []}
    for kind in FORMATS:
        forward = f"compute.fp4_forward={kind}"
        found[f"{kind}, forward alone"] = [forward]
        for name, words in CHOICES.items():
            if kind != "mxfp4" or name != "no tensor scale":  # which it never has
                found[f"{kind}, {name}"] = [forward, f"compute.fp4_backward={kind}", *words]
    return found


def runs(study: Study, seeds: list[int]) -> list[Run]:
    common = [f"train.tokens={study.tokens(TOKENS)}"]
    return [
        Run(f"{arm}/{seed}", [*common, f"train.seed={seed}", *words]) for seed in seeds for arm, words in arms().items()
    ]


def measure(directory: Path) -> Line:
    """Return the mean loss of held-out windows with forward products in full precision, and as trained."""
    from megahp.evaluate.sample import load_trained
    from megahp.model.compute import simulate_fp4

    trained, rows, found = load_trained(directory), held_out_code(LENGTH, WINDOWS), {}
    for kind in ("read in full", "as trained"):
        found[kind] = mean_loss(trained.model, rows, 32)
        simulate_fp4(trained.model, trained.config.compute, trained.config.train.seed, trained.device)
    return found


def show(study: Study, lines: dict[str, Line], seeds: list[int]) -> None:
    """Print what each choice costs by format, and draw it."""
    from megahp.report.figures import PALETTE, plot_in

    def losses(arm: str, kind: str) -> list[float]:
        return [lines[f"{arm}/{seed}"][kind] for seed in seeds]

    whole = losses(FULL, "as trained")
    print(f"\n{FULL}: {mean_and_interval(whole)}")
    for kind in ("as trained", "read in full"):
        costs = {arm: [a - b for a, b in zip(losses(arm, kind), whole, strict=True)] for arm in arms() if arm != FULL}
        shown = {arm: mean_and_interval(cost) for arm, cost in costs.items()}
        rows = [[name, *(shown.get(f"{each}, {name}", "") for each in FORMATS)] for name in COLUMNS]
        print_table((kind, *FORMATS), rows)
        if kind != "as trained":
            continue
        nearest = np.mean([costs[f"{each}, to nearest"] for each in FORMATS], 0)
        for name in ("random", "rotated", "random and rotated"):
            change = np.mean([costs[f"{each}, {name}"] for each in FORMATS], 0) - nearest
            print(f"\n{name}: {mean_and_interval(change)} to nearest alone, mean of the formats")
        with plot_in(study.figure, 5.5, 3.2) as figure:
            axes = figure.add_subplot()
            for number, each in enumerate(FORMATS):
                found = [(x, costs[f"{each}, {name}"]) for x, name in enumerate(COLUMNS) if f"{each}, {name}" in costs]
                style = {"fmt": "o", "ms": 4, "capsize": 2, "color": PALETTE[f"run{number}"], "label": each}
                places = [x + (number - 1) / 6 for x, _ in found]
                axes.errorbar(
                    places, [np.mean(c) for _, c in found], [half_interval(np.array(c)) for _, c in found], **style
                )
            axes.axhline(0, color=PALETTE["muted"], lw=0.8)
            axes.set_xticks(range(len(COLUMNS)), [name.replace(" ", "\n", 1) for name in COLUMNS], fontsize=7)
            axes.set(ylabel="nats above full precision")
            axes.legend(frameon=False, fontsize=7)


if __name__ == "__main__":
    main(__file__, __doc__, partial(prepare, "code", code), runs, show, measure)
