"""How much of a run must be quantisation-aware for int4 weights to cost nothing, at three budgets?

    python examples/qat/study.py [--jobs 2] [--seeds 1 2 3]

One schedule, decay to zero, at each budget: in full precision throughout, with int4 weights (`model.quantize`, groups
of 32) for the last 10, 25 or 50 % of the tokens, or throughout. So quantisation is fused with the decay, and no arm has
more tokens than another. The run in full precision is measured once more with its weights rounded at the end.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from studies import (
    STEP,
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

LENGTH, WINDOWS = 128, 1024
BUDGETS = 0.15, 0.3, 0.6  # millions of tokens
SHARES = 0.5, 0.25, 0.1  # of the tokens that are quantisation-aware
INT4 = "model.quantize=int4"
ARMS = ["full precision", "rounded at the end", "10 %", "25 %", "50 %", "100 %"]


def runs(study: Study, seeds: list[int]) -> list[Run]:
    found = []
    for seed in seeds:
        for budget in BUDGETS:
            tokens = study.tokens(budget)
            whole, parent = [f"train.tokens={tokens}", f"train.seed={seed}"], ""
            for share in SHARES:  # the run in full precision, in parts that the others branch from
                steps = round((1 - share) * tokens / STEP)
                part = Run(f"{budget} M, until {share:.0%}/{seed}", [*whole, f"train.steps={steps}"], parent)
                found += [part, Run(f"{budget} M, {share * 100:g} %/{seed}", [*whole, INT4], part.name)]
                parent = part.name
            found.append(Run(f"{budget} M, full precision/{seed}", whole, parent))
            found.append(Run(f"{budget} M, 100 %/{seed}", [*whole, INT4]))
    return found


def measure(directory: Path) -> Line:
    """Return the mean loss of held-out windows as the run's model reads its weights, and with int4 weights."""
    from megahp.config import with_values
    from megahp.evaluate.sample import load_trained
    from megahp.model.compute import quantize_products

    trained, rows, found = load_trained(directory), held_out_code(LENGTH, WINDOWS), {}
    for kind in ("as trained", "int4"):
        found[kind] = mean_loss(trained.model, rows, 32)
        quantize_products(trained.model, with_values(trained.config, {"model.quantize": "int4"}).model)
    return found


def show(study: Study, lines: dict[str, Line], seeds: list[int]) -> None:
    """Print what int4 weights cost by budget and share, and draw it."""
    from megahp.report.figures import PALETTE, plot_in

    def losses(budget: float, arm: str) -> list[float]:
        kind = "as trained" if arm == "full precision" else "int4"
        name = "full precision" if arm == "rounded at the end" else arm
        return [lines[f"{budget} M, {name}/{seed}"][kind] for seed in seeds]

    rows = []
    with plot_in(study.figure, 5.5, 3.2) as figure:
        axes = figure.add_subplot()
        for number, budget in enumerate(BUDGETS):
            whole = losses(budget, "full precision")
            costs = [[a - b for a, b in zip(losses(budget, arm), whole, strict=True)] for arm in ARMS[1:]]
            rows.append([f"{budget:g} M", mean_and_interval(whole), *(mean_and_interval(cost, 4) for cost in costs)])
            style = {
                "fmt": "o-",
                "ms": 4,
                "capsize": 2,
                "color": PALETTE[f"run{number}"],
                "label": f"{budget:g} M tokens",
            }
            axes.errorbar(ARMS[1:], [np.mean(cost) for cost in costs], [half_interval(cost) for cost in costs], **style)
        axes.axhline(0, color=PALETTE["muted"], lw=0.8)
        axes.set(xlabel="share of the tokens with int4 weights", ylabel="nats above full precision")
        axes.legend(frameon=False, fontsize=7)
    print_table(("tokens", *ARMS), rows)


if __name__ == "__main__":
    main(__file__, __doc__, partial(prepare, "code", code), runs, show, measure)
