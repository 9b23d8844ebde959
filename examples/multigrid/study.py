"""Do sequences that double while a model trains save time at equal loss?

    python examples/multigrid/study.py [--jobs 1] [--seeds 1 2 3]

The same tokens, 1,024 a step, in sequences of 512 throughout; in 64 doubled three times to 512 (`data.lengths =
["doubling:3"]`, multigrid's long cycle, arXiv 1912.00998); and in 64 throughout. Each is measured on held-out text in
windows of 512. Seconds are those of its steps; they compare only if the machine was idle and --jobs is 1.
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

MILLIONS, LENGTH, WINDOWS = 0.6, 512, 256
ARMS = {
    "512": [f"data.sequence_length={LENGTH}", "batch.global_batch=2", "batch.micro_batch=2"],
    "64 to 512": ['data.lengths=["doubling:3"]'],
    "64": [],
}


def measure(directory: Path) -> Line:
    """Return the mean loss of held-out windows, and the seconds of all steps but the first ten."""
    from megahp.evaluate.sample import load_trained
    from megahp.log.metrics import read_metrics

    trained, rows = load_trained(directory), held_out_code(LENGTH, WINDOWS)
    seconds = sum(step["step_seconds"] for step in read_metrics(directory)[10:])
    return {"loss at 512": mean_loss(trained.model, rows, 8), "step seconds": seconds}


def show(study: Study, lines: dict[str, Line], seeds: list[int]) -> None:
    """Print losses, differences to 512 throughout, and seconds; draw one over the other."""
    from megahp.report.figures import PALETTE, plot_in

    def column(arm: str, key: str) -> list[float]:
        return [lines[f"{arm}/{seed}"][key] for seed in seeds]

    rows = []
    with plot_in(study.figure, 5, 3.2) as figure:
        axes = figure.add_subplot()
        for number, arm in enumerate(ARMS):
            losses, seconds = column(arm, "loss at 512"), column(arm, "step seconds")
            other = [a - b for a, b in zip(losses, column("512", "loss at 512"), strict=True)]
            difference = "" if arm == "512" else mean_and_interval(other, 4)
            rows.append([arm, mean_and_interval(losses), difference, mean_and_interval(seconds, 1)])
            style = {"fmt": "o", "capsize": 2, "color": PALETTE[f"run{number}"], "label": arm}
            axes.errorbar([np.mean(seconds)], [np.mean(losses)], [half_interval(losses)], **style)
        axes.set(xlabel="seconds of the steps", ylabel="loss at 512, nats per byte")
        axes.legend(frameon=False)
    print_table(("lengths", "loss at 512", "to 512 throughout", "seconds of the steps"), rows)


def runs(study: Study, seeds: list[int]) -> list[Run]:
    tokens = study.tokens(MILLIONS)
    return [
        Run(f"{arm}/{seed}", [*words, f"train.tokens={tokens}", f"train.seed={seed}"])
        for seed in seeds
        for arm, words in ARMS.items()
    ]


if __name__ == "__main__":
    main(__file__, __doc__, partial(prepare, "code", code), runs, show, measure)
