"""What do more experts learn at equal compute: the text they are trained on, or text like it?

    python examples/experts/study.py [--jobs 2] [--seeds 1 2 3]

A token passes MLPs of 256 hidden units in every arm, two experts of 128 unless the arm says otherwise, so active
weights and FLOPs are equal (but for the router's); the number of experts, and with it that of all weights, is not. A
sample of 120 kB of code is read four times. Loss on that sample says what was memorised, loss on held-out code what
was learned beyond it. Three rates are tried on the first seed, with the dense model and with 16 experts.
"""

import sys
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
    windows,
)

LENGTH, WINDOWS = 64, 1024
MILLIONS = 0.48  # of tokens, four times the sample's
PIECE, EVERY = 2048, 80  # bytes of a piece of the sample, which is every 80th
TUNED, RATES = ("dense", "2 of 16"), (0.004, 0.016)  # beside run.toml's
ARMS = {"dense": ["model.mlp_width=256"]}
for active, number in ((2, 4), (2, 8), (2, 16), (1, 4), (4, 16)):
    ARMS[f"{active} of {number}"] = [
        *(f"model.experts={number}", f"model.experts_per_token={active}", f"model.expert_width={256 // active}")
    ]
ARMS["1 of 4"].append("model.router_normalize=false")  # or its weight is 1, and the router gets no gradient
AS_MANY = "1 of 4", "2 of 8", "4 of 16"  # weights in all, in experts of other sizes


def sample() -> list[str]:
    """Return pieces from all over the library, none of the held-out modules'."""
    kept = [text for number, text in enumerate(code()) if number % 16 != 15]
    pieces = [text[start : start + PIECE] for text in kept for start in range(0, len(text), PIECE)]
    return pieces[::EVERY]


def corpora() -> tuple[Path, Path]:
    prepare("code", code)
    return prepare("code-sample", sample)


def runs(study: Study, seeds: list[int]) -> list[Run]:
    def run(arm: str, seed: int, name: str = "", *settings: str) -> Run:
        words = [*ARMS[arm], f"train.tokens={study.tokens(MILLIONS)}", f"train.seed={seed}", *settings]
        return Run(f"{arm}{name}/{seed}", words)

    tuning = [run(arm, seeds[0], f", rate {lr}", f"optimizer.lr={lr}") for arm in TUNED for lr in RATES]
    return [*tuning, *(run(arm, seed) for seed in seeds for arm in ARMS)]


def measure(directory: Path) -> Line:
    """Return all weights of a run's model, and its mean losses on the sample and on held-out code."""
    from megahp.evaluate.sample import load_trained
    from megahp.scaling import flops

    trained = load_trained(directory)
    found: Line = {"parameters": flops.parameters(trained.config.model, LENGTH)}
    texts = {"sample": windows(corpora()[0], LENGTH, 1)[:WINDOWS], "held-out": held_out_code(LENGTH, WINDOWS)}
    return found | {kind: mean_loss(trained.model, rows, 64) for kind, rows in texts.items()}


def show(study: Study, lines: dict[str, Line], seeds: list[int]) -> None:
    """Print the rates tried, then losses on the sample and on held-out code by arm; draw them over all weights."""
    from megahp.report.figures import PALETTE, logarithmic_x, plot_in

    def losses(arm: str, kind: str) -> np.ndarray:
        return np.array([lines[f"{arm}/{seed}"][kind] for seed in seeds])

    for arm in TUNED:
        tried = {"the file's": lines[f"{arm}/{seeds[0]}"]} | {lr: lines[f"{arm}, rate {lr}/{seeds[0]}"] for lr in RATES}
        print(f"{arm}: " + ", ".join(f"rate {lr}: {line['held-out']:.4f}" for lr, line in tried.items()))
    kinds, rows = ("sample", "held-out"), []
    for arm in ARMS:
        cells = [mean_and_interval(losses(arm, kind)) for kind in kinds]
        if arm != "dense":
            cells = [
                f"{cell}, {mean_and_interval(losses(arm, kind) - losses('dense', kind))} to dense"
                for cell, kind in zip(cells, kinds, strict=True)
            ]
        rows.append([arm, f"{lines[f'{arm}/{seeds[0]}']['parameters']:,}", *cells])
    print_table(("experts", "weights in all", "loss on the sample", "on held-out code"), rows)
    with plot_in(study.figure, 5.5, 3.2) as figure:
        axes = figure.add_subplot()
        curves = {"2 of N": [arm for arm in ARMS if arm not in AS_MANY or arm == "2 of 8"]}
        curves |= {arm: [arm] for arm in AS_MANY if arm != "2 of 8"}
        for number, kind in enumerate(kinds):
            for (label, arms), marker in zip(curves.items(), "osD", strict=True):
                x = [lines[f"{arm}/{seeds[0]}"]["parameters"] for arm in arms]
                errors = [half_interval(losses(arm, kind)) for arm in arms]
                style = {"fmt": f"{marker}-", "ms": 4, "capsize": 2, "color": PALETTE[f"run{number}"]}
                axes.errorbar(x, [losses(arm, kind).mean() for arm in arms], errors, label=f"{kind}, {label}", **style)
        axes.set(xlabel="weights in all", ylabel="nats per byte")
        logarithmic_x(axes, [2e5, 5e5, 1e6], ["0.2 M", "0.5 M", "1 M"])
        axes.legend(frameon=False, fontsize=7)


if __name__ == "__main__":
    main(__file__, __doc__, corpora, runs, show, measure)
