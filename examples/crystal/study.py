"""Crystal's three phases from text to code, and what each does to the loss of both.

    python examples/crystal/study.py [--jobs 2] [--seeds 1 2 3]

Phase 1 is text, phase 2 code and text, phase 3 mostly code (arXiv 2411.04156; shares of the tokens, mixtures and rates
as in its authors' parameter files). Phases 1 and 2 are one linear decay with a short second warm-up between them; phase
3 warms up once more, to a sixth of the first peak. Beside them, at equal tokens: phase 2 continued in place of phase 3,
and all of the same text and code mixed from the start.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from studies import Line, Run, Study, code, english, half_interval, main, mean_and_interval, prepare, print_table

# millions of tokens (Crystal's, in billions of tokens: 345, 927, 120), shares of text, and peak rates
TOKENS = 0.26, 0.70, 0.09
TEXT = 1.0, 0.372, 0.167
PEAKS = 0.012, 0.0087825, 0.002
WARMUPS = 0.01, 0.01, 0.05  # of a phase; Crystal's are shorter, 86 and 276 steps of 294 and 28 thousand


def runs(study: Study, seeds: list[int]) -> list[Run]:
    first, second, third = (study.tokens(sum(TOKENS[: n + 1])) for n in range(3))
    weights = [f"data.weights=[{share}, {1 - share}]" for share in TEXT]
    whole = sum(tokens * share for tokens, share in zip(TOKENS, TEXT, strict=True)) / sum(TOKENS)

    def phase(number: int, start: int, end: int, floor: float) -> list[str]:
        settings = [weights[number], f"schedule.start={start}", f"schedule.warmup={WARMUPS[number]}"]
        return [*settings, f"schedule.floor={floor}", f"optimizer.lr={PEAKS[number]}", f"train.tokens={end}"]

    found = []
    for seed in seeds:
        steps = first // 1024  # of a plan that would have ended with phase 2
        one = [weights[0], f"schedule.warmup={WARMUPS[0]}", f"train.tokens={second}", f"train.steps={steps}"]
        mixed = [f"data.weights=[{whole}, {1 - whole}]", f"schedule.warmup={WARMUPS[0]}", f"train.tokens={third}"]
        found += [
            Run(f"phase 1/{seed}", [*one, f"train.seed={seed}"]),
            Run(f"phase 2/{seed}", [*phase(1, first, second, 0.01557), f"train.seed={seed}"], f"phase 1/{seed}"),
            Run(f"phase 3/{seed}", [*phase(2, second, third, 0.1), f"train.seed={seed}"], f"phase 2/{seed}"),
            Run(
                f"phase 2 to the end/{seed}",
                [*phase(1, first, third, 0.01557), f"train.seed={seed}"],
                f"phase 1/{seed}",
            ),
            Run(f"mixed from the start/{seed}", [*mixed, f"train.seed={seed}"]),
        ]
    return found


def show(study: Study, lines: dict[str, Line], seeds: list[int]) -> None:
    """Print the losses of both after each phase and of the rivals, with differences to phase 3; draw them."""
    from megahp.report.figures import PALETTE, plot_in

    arms = list(dict.fromkeys(name.rpartition("/")[0] for name in lines))
    losses = {
        (arm, kind): [lines[f"{arm}/{seed}"]["losses"][kind] for seed in seeds]
        for arm in arms
        for kind in ("text", "code")
    }
    rows = []
    for arm in arms:
        cells = []
        for kind in ("text", "code"):
            other = [a - b for a, b in zip(losses[arm, kind], losses["phase 3", kind], strict=True)]
            cells += [mean_and_interval(losses[arm, kind]), "" if arm == "phase 3" else mean_and_interval(other)]
        rows.append([arm, *cells])
    print_table(("", "text", "to three phases", "code", "to three phases"), rows)
    with plot_in(study.figure, 6, 3.2) as figure:
        axes, ends = figure.add_subplot(), [sum(TOKENS[: n + 1]) for n in range(3)]
        for number, kind in enumerate(("text", "code")):
            hue = PALETTE[f"run{number}"]
            phases = [losses[f"phase {n}", kind] for n in (1, 2, 3)]
            style = {"color": hue, "ms": 4, "capsize": 2}
            axes.errorbar(
                ends, [sum(each) / len(each) for each in phases], [half_interval(each) for each in phases],
                fmt="o-", label=f"{kind}: phases 1, 2, 3", **style,
            )  # fmt: skip
            for mark, arm in (("s", "phase 2 to the end"), ("^", "mixed from the start")):
                each = losses[arm, kind]
                axes.errorbar(
                    ends[2:], [sum(each) / len(each)], [half_interval(each)], fmt=mark, label=f"{kind}: {arm}", **style
                )
        axes.set(xlabel="tokens, M", ylabel="held-out loss, nats per byte")
        axes.legend(frameon=False, fontsize=7)


def prepare_data() -> None:
    prepare("english", english)
    prepare("code", code)


if __name__ == "__main__":
    main(__file__, __doc__, prepare_data, runs, show)
